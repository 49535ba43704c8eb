"""What the fakes in `autoflux.testing` draw, how they misbehave, and a worker that is a thread."""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING

from autoflux.errors import OutOfMemory, describe
from autoflux.models.request import Request
from autoflux.serving.messages import Cancel, Ended, Finished, Load, Ready, Run, Started, Stepped, Stop, ToWorker
from autoflux.serving.supervisor import Listener, Worker
from autoflux.values import Value

if TYPE_CHECKING:
    from PIL.Image import Image

BEHAVIOUR_VARIABLE = "AUTOFLUX_FAKE"
"""Environment variable that holds a `Behaviour` as JSON, for fakes in processes that a test starts."""

CRASH, HANG, FAIL, BUG = "[crash]", "[hang]", "[fail]", "[bug]"
"""Words in a prompt that make the fake pipeline end its process, stop, raise OutOfMemory, or raise a ValueError.

A FakeDesk, which has no process of its own to lose, heeds the last two only."""


class Behaviour(Value, frozen=True, kw_only=True):
    """How a fake acts."""

    load_seconds: float = 0.0
    step_seconds: float = 0.0
    broken: bool = False
    """Whether `build` raises DamagedCheckpoint."""

    @classmethod
    def from_environment(cls) -> Behaviour:
        return cls.from_json(os.environ.get(BEHAVIOUR_VARIABLE, "{}"), origin=BEHAVIOUR_VARIABLE)


def fail_if_asked(prompt: str) -> None:
    """Raise what a word in the prompt asks for."""
    if FAIL in prompt:
        raise OutOfMemory("the device ran out of memory", hint="ask for a smaller picture")
    if BUG in prompt:
        raise ValueError("this is a bug")


def draw(request: Request) -> Image:
    """The picture of a request: the same for the same prompt, seed and size, another for every other."""
    from PIL import Image, ImageDraw  # noqa: PLC0415 — keeps PIL out of light starts

    digest = hashlib.sha256(f"{request.prompt}\0{request.seed}".encode()).digest()
    chance = random.Random(digest)  # noqa: S311 — pictures, not secrets
    width, height = request.size
    image = Image.new("RGB", request.size, _colour(chance, 60, 130))
    pen = ImageDraw.Draw(image)
    for _ in range(5):
        x, y, radius = chance.randrange(width), chance.randrange(height), chance.randrange(min(width, height) // 3) + 4
        shape = chance.choice((pen.ellipse, pen.rectangle))
        shape((x - radius, y - radius, x + radius, y + radius), fill=_colour(chance, 90, 255))
    return image


def _colour(chance: random.Random, low: int, high: int) -> tuple[int, int, int]:
    return chance.randint(low, high), chance.randint(low, high), chance.randint(low, high)


class FakeWorker(Worker):
    """Draws in a thread of this process."""

    def __init__(self, behaviour: Behaviour | None = None) -> None:
        self._behaviour = behaviour or Behaviour()
        self._runs: SimpleQueue[Run | None] = SimpleQueue()
        self._cancelled: set[str] = set()
        self._listener: Listener | None = None

    def start(self, load: Load, listener: Listener) -> None:
        self._listener = listener
        threading.Thread(target=self._serve, args=(load, listener, self._runs), daemon=True).start()

    def switch(self, load: Load) -> None:
        self.stop()
        self._runs = SimpleQueue()
        if self._listener:
            self.start(load, self._listener)

    def send(self, message: ToWorker) -> None:
        if isinstance(message, Run):
            self._runs.put(message)
        elif isinstance(message, Cancel):
            self._cancelled.add(message.job_id)
        elif isinstance(message, Stop):
            self.stop()

    def stop(self) -> None:
        self._runs.put(None)

    def _serve(self, load: Load, listener: Listener, runs: SimpleQueue[Run | None]) -> None:
        time.sleep(self._behaviour.load_seconds)
        listener.received(Ready(device=load.plan.device))
        while run := runs.get():
            listener.received(Started(job_id=run.job_id, attempt=run.attempt))
            ended = partial(Ended, job_id=run.job_id, attempt=run.attempt)
            try:
                listener.received(ended(cancelled=not self._draw(run, listener)))
            except Exception as error:  # noqa: BLE001 — as the real worker does
                listener.received(ended(error=describe(error)))

    def _draw(self, run: Run, listener: Listener) -> bool:
        """Draw the job; False when it was cancelled."""
        step = 0
        for index, request in enumerate(run.requests):
            for _ in range(request.steps):
                if run.job_id in self._cancelled:
                    return False
                fail_if_asked(request.prompt)
                time.sleep(self._behaviour.step_seconds)
                step += 1
                listener.received(Stepped(job_id=run.job_id, attempt=run.attempt, step=step))
            png = _png(request)
            listener.received(Finished(job_id=run.job_id, attempt=run.attempt, index=index, png=png, seconds=0.01))
        return True


def _png(request: Request) -> bytes:
    from autoflux.runtime.picture import Picture as Drawn  # noqa: PLC0415 — keeps PIL out of light starts

    return Drawn(draw(request), request, "fake", "fake", 0.01).png()
