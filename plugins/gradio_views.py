"""What the gradio page shows of jobs and of the service, as HTML. No gradio in here."""

from __future__ import annotations

import html
from collections.abc import Sequence

from autoflux import AutofluxError, Drawn, Job, JobState, Status, WorkerState, describe

NOTHING = '<div class="af-none"></div>'

STATE_WORDS = {
    WorkerState.STARTING: "starting",
    WorkerState.LOADING: "loading",
    WorkerState.READY: "ready",
    WorkerState.FAILED: "failed",
    WorkerState.STOPPED: "stopped",
}


def status_view(status: Status) -> str:
    """The head of the page: what model on what device, and how the worker is."""
    state = STATE_WORDS[status.worker]
    facts = [status.model, status.device, _doing(status)]
    line = " · ".join(html.escape(fact) for fact in facts if fact)
    detail = _problem(status.error.message, status.error.hint) if status.error else ""
    dot = f'<span class="af-dot af-{state}"></span>'
    return f'<div class="af-head"><h1>autoflux</h1><div class="af-status">{dot}{line}</div></div>{detail}'


def _doing(status: Status) -> str:
    if status.worker is WorkerState.READY:
        waiting = f", {status.queued} waiting" if status.queued else ""
        return f"drawing{waiting}" if status.running else "ready"
    if status.worker is WorkerState.LOADING and 0 < status.progress < 1:
        return f"{status.stage}, {status.progress:.0%}"
    return status.stage or STATE_WORDS[status.worker]


def progress_view(job: Job, status: Status, *, cancelling: bool = False) -> str:
    """How far a job is; empty when it is done."""
    if job.state is JobState.FAILED and job.error:
        return _problem(job.error.message, job.error.hint)
    if job.state is JobState.CANCELLED:
        return '<div class="af-card" role="status">Cancelled.</div>'
    if job.state is JobState.DONE:
        return NOTHING
    if cancelling:
        return _bar("Cancelling after this step", job.step / job.steps)
    if job.state is JobState.RUNNING:
        return _bar(_drawing(job), job.step / job.steps)
    return _bar(_waiting(job, status), 0.0)


def _drawing(job: Job) -> str:
    if job.step == 0:
        return "Reading the prompt"
    again = f" (attempt {job.attempt})" if job.attempt > 1 else ""
    if job.step == job.steps:
        return f"Developing the picture{again}"
    return f"Step {job.step} of {job.steps}{again}"


def _waiting(job: Job, status: Status) -> str:
    if status.worker is not WorkerState.READY:
        return f"Waiting for the model: {_doing(status)}"
    if job.position:
        return f"In the queue, {job.position} before it"
    return "In the queue, next"


def error_view(error: AutofluxError) -> str:
    """What went wrong and what to try."""
    report = describe(error)
    return _problem(report.message, report.hint)


def gallery_view(jobs: Sequence[Job]) -> str:
    """The pictures of these jobs, newest first, each with its seed, its time, and the file to save."""
    figures = [_figure(job, drawn) for job in jobs for drawn in reversed(job.pictures)]
    if not figures:
        return '<div class="af-empty">Your pictures will appear here.</div>'
    return f'<div class="af-gallery">{"".join(figures)}</div>'


def _figure(job: Job, drawn: Drawn) -> str:
    # The link leads to the file as it was drawn, so that its metadata is kept.
    link = f"/api/jobs/{job.id}/pictures/{drawn.index}.png"
    prompt = html.escape(job.requests[drawn.index].prompt, quote=True)
    size = f"{drawn.width}&times;{drawn.height}"
    warnings = "".join(f'<p class="af-warning">{html.escape(warning)}</p>' for warning in drawn.warnings)
    return (
        f'<figure><a href="{link}" target="_blank" title="{size}, open in full size">'
        f'<img src="{link}" alt="{prompt}" width="{drawn.width}" height="{drawn.height}"></a>'
        f'<figcaption><span class="af-prompt" title="{prompt}">{prompt}</span>'
        f'<span class="af-facts">seed {drawn.seed} · {_duration(drawn.seconds)}</span>'
        f'<a class="af-save" href="{link}" download="autoflux-{drawn.seed}.png">Save</a>{warnings}'
        "</figcaption></figure>"
    )


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def _bar(text: str, share: float) -> str:
    percent = round(100 * share)
    values = f'aria-valuemin="0" aria-valuemax="100" aria-valuenow="{percent}"'
    track = f'<div class="af-track" role="progressbar" {values}><div style="width:{percent}%"></div></div>'
    return f'<div class="af-card" role="status"><div>{html.escape(text)}</div>{track}</div>'


def _problem(message: str, hint: str | None) -> str:
    advice = f"<div class='af-hint'>{html.escape(_sentence(hint))}</div>" if hint else ""
    return f'<div class="af-card af-error" role="alert"><div>{html.escape(_sentence(message))}</div>{advice}</div>'


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
