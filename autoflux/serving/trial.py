"""Running a plan for real, once and shortly, in a process of its own: what it takes there is its own, and what it
breaks too."""

from __future__ import annotations

import time
from collections.abc import Callable

from autoflux.errors import ErrorReport
from autoflux.models.request import Request
from autoflux.models.values import Model
from autoflux.planning.fitting import Measured
from autoflux.planning.tuning import Trial
from autoflux.planning.values import Plan
from autoflux.serving.messages import Broken, Ended, FromWorker, Load, Loading, Ready, Run, Stepped, Took
from autoflux.serving.process import Deadlines, WorkerProcess

JOB = "trial"


def run_trial(
    plan: Plan,
    model: Model,
    requests: tuple[Request, ...],
    *,
    on_stage: Callable[[str], None] | None = None,
    deadlines: Deadlines | None = None,
) -> Trial:
    """Draw the requests as one job and measure it; the pictures are not kept. A failure is part of the answer.

    When it is interrupted its process is ended first.
    """
    process = WorkerProcess((deadlines or Deadlines()).allowing(plan))
    listener = _Listener(process, requests, on_stage or (lambda _text: None))
    process.send(Load(plan=plan, model=model, warm_up=False))
    try:
        process.read(listener.received)
    except BaseException:
        process.stop()
        process.read(lambda _message: None)
        raise
    reason = process.post_mortem()
    if listener.measured is None:
        return Trial(plan=plan, error=listener.error or reason)
    return Trial(plan=plan, measured=listener.measured)


class _Listener:
    """Hears the worker out: it loads, draws the requests, and is told to end."""

    def __init__(self, process: WorkerProcess, requests: tuple[Request, ...], on_stage: Callable[[str], None]) -> None:
        self._process = process
        self._requests = requests
        self._on_stage = on_stage
        self._began = time.perf_counter()
        self._start_seconds = 0.0
        self.measured: Measured | None = None
        self.error: ErrorReport | None = None

    def received(self, message: FromWorker) -> None:
        match message:
            case Loading():
                self._on_stage(message.stage)
            case Ready():
                self._start_seconds = time.perf_counter() - self._began
                self._on_stage("encoding")
                self._process.send(Run(job_id=JOB, attempt=1, requests=self._requests, measured=True, afresh=True))
            case Stepped():
                self._on_stage(f"step {message.step} of {sum(request.steps for request in self._requests)}")
            case Took() if self.measured is None:
                self.measured = message.measured.replace(start_seconds=self._start_seconds)
            case Broken():
                self.error = message.error
            case Ended():
                self.error = message.error
                self._process.stop()
            case _:
                pass
