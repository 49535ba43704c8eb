"""The page of the frontend `gradio`. Importing it imports gradio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
from fastapi import FastAPI

from autoflux import AutofluxError, Desk, Job

from .gradio_form import make_order, make_question, make_settings
from .gradio_style import CSS, make_theme
from .gradio_views import NOTHING, error_view, gallery_view, progress_view, status_view

REFRESH_SECONDS = 0.2
STATUS_SECONDS = 1.5

MOST_JOBS = 60
"""Jobs of one visit whose pictures stay on the page."""

Update = tuple[Any, ...]
"""New values of: progress, status, gallery, seed, draw button, cancel button."""


@dataclass
class Visit:
    """What one open page remembers: its jobs, newest first. Other visitors have their own."""

    jobs: list[str] = field(default_factory=list)
    cancelling: bool = False


def make_page_app(desk: Desk) -> FastAPI:
    """The page as an application for the path `/`."""
    page = _make_page(desk)
    page.queue(default_concurrency_limit=None, api_open=False)
    app: FastAPI = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        page,
        path="/",
        theme=make_theme(),
        css=CSS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        max_file_size="1mb",
        show_error=False,
    )
    return app


def _make_page(desk: Desk) -> gr.Blocks:
    page: gr.Blocks
    with gr.Blocks(title=f"autoflux · {desk.model.name}", analytics_enabled=False) as page:
        visit = gr.State(Visit())  # gradio gives every page its own copy
        status = gr.HTML(status_view(desk.status()), apply_default_css=False)
        with gr.Row(elem_id="af-main"):
            with gr.Column(elem_id="af-ask"):
                prompt, draw, cancel = make_question()
            with gr.Column(elem_id="af-result"):
                progress = gr.HTML(NOTHING, apply_default_css=False, elem_id="af-progress")
                gallery = gr.HTML(gallery_view(()), apply_default_css=False, elem_id="af-gallery")
            with gr.Column(elem_id="af-settings"):
                settings = make_settings(desk.model)
        counter = _Counter(desk)
        shown = [progress, status, gallery, settings.seed, draw, cancel]
        gr.on(
            [draw.click, prompt.submit],
            counter.draw,
            [visit, prompt, *settings.fields],
            shown,
            show_progress="hidden",
            trigger_mode="once",
            api_visibility="private",
        )
        cancel.click(counter.cancel, [visit], [cancel], show_progress="hidden", queue=False, api_visibility="private")
        timer = gr.Timer(STATUS_SECONDS)
        timer.tick(counter.status, None, [status], show_progress="hidden", queue=False, api_visibility="private")
    return page


class _Counter:
    """The page's side of the desk: what its buttons do."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def status(self) -> str:
        return status_view(self._desk.status())

    def cancel(self, visit: Visit) -> Any:
        """Cancel the job of this page that was ordered last."""
        visit.cancelling = True
        if visit.jobs:
            self._desk.cancel(visit.jobs[0])
        return gr.update(interactive=False)

    async def draw(self, visit: Visit, *values: Any) -> AsyncIterator[Update]:
        """Order pictures and show how they come, until the job is finished."""
        try:
            job = await asyncio.to_thread(self._desk.submit, make_order(*values))
        except AutofluxError as error:
            yield error_view(error), *[gr.skip()] * 5
            return
        visit.jobs[:] = [job.id, *visit.jobs[: MOST_JOBS - 1]]
        visit.cancelling = False
        yield self._shown(job, visit, seed=job.requests[0].seed)
        seen = job
        while not job.state.finished:
            await asyncio.sleep(REFRESH_SECONDS)
            job = self._desk.job(job.id)
            changed = len(job.pictures) != len(seen.pictures) or job.state is not seen.state
            yield self._shown(job, visit) if changed else (self._progress(job, visit), *[gr.skip()] * 5)
            seen = job

    def _progress(self, job: Job, visit: Visit) -> str:
        return progress_view(job, self._desk.status(), cancelling=visit.cancelling)

    def _shown(self, job: Job, visit: Visit, seed: int | None = None) -> Update:
        active = not job.state.finished
        return (
            self._progress(job, visit),
            self.status(),
            gallery_view(self._kept(visit)),
            gr.skip() if seed is None else seed,
            gr.update(interactive=not active),
            gr.update(interactive=active),
        )

    def _kept(self, visit: Visit) -> list[Job]:
        kept = {job.id: job for job in self._desk.jobs()}
        return [kept[job_id] for job_id in visit.jobs if job_id in kept]
