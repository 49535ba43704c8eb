"""Drawing pictures with a built pipeline, step by step, so that whoever drives it can report, cancel and batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from types import TracebackType
from typing import Self, TypeVar

from autoflux.errors import OutOfMemory, UsageError
from autoflux.models.request import Order, Request, check, make_order, make_requests
from autoflux.models.values import Model
from autoflux.planning.fit import batch_limit
from autoflux.planning.values import Plan
from autoflux.process import is_own_process
from autoflux.runtime.ceiling import Ceiling
from autoflux.runtime.memory import translated_memory_errors
from autoflux.runtime.picture import Picture
from autoflux.runtime.pipeline import Conditioning, Pipeline, State
from autoflux.runtime.prompt_cache import PromptCache

T = TypeVar("T")

StepListener = Callable[[int, int], None]
"""Called after each step with the steps done and the steps in all, over all pictures asked for."""


@dataclass
class Drawing:
    """A picture under way."""

    request: Request
    state: State
    began: float
    warnings: tuple[str, ...] = ()

    @property
    def finished(self) -> bool:
        return self.state.step >= self.request.steps


@dataclass
class Session:
    """A model ready to draw. Use it from one thread at a time; close it, or use it as a context manager.

    Example::

        with autoflux.load("sample") as session:
            picture, = session.generate("a red circle on a blue background", seed=7)
            picture.image.save("circle.png")
    """

    pipeline: Pipeline
    plan: Plan
    model: Model
    deferred: bool = False
    """Whether text encoders are read when a prompt comes that was not encoded before."""
    keeps_to_plan: bool = field(default_factory=is_own_process)
    """Whether torch is told to take no more of the device than is planned, which holds for the whole process."""
    measured: bool = False
    """Whether what pictures take of the device is being measured: then nothing is taken before it is asked for."""
    _prompts: PromptCache = field(init=False, repr=False)
    _ceiling: Ceiling = field(init=False, repr=False)
    _closed: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        self._prompts = PromptCache.open(self.model, self.plan)
        self._ceiling = Ceiling(self.plan, self.model, active=self.keeps_to_plan)

    def generate(self, prompt: str, *, on_step: StepListener | None = None, **order: object) -> list[Picture]:
        """Draw what an `Order` of this prompt asks for: `seed`, `steps`, `guidance`, `width`, `height`, `count`.

        Raises:
            InvalidRequest: there is no such field, or it is of another type or out of the model's limits.
            UsageError: the session is closed.
            DoesNotFit: a picture of this size does not fit this plan.
            OutOfMemory: the device ran out of memory after all; the session stays usable.
        """
        return self.draw(make_requests(self.model, make_order(prompt, **order)), on_step=on_step)

    def draw(self, requests: Sequence[Request], *, on_step: StepListener | None = None) -> list[Picture]:
        """Draw all requests, those of equal size and steps together, and return the pictures in the order asked."""
        total, done = sum(r.steps for r in requests), 0
        pictures: dict[int, Picture] = {}
        for group in self.groups(requests):
            drawings = [self.begin(requests[i]) for i in group]
            while not all(d.finished for d in drawings):
                active = [d for d in drawings if not d.finished]
                self.advance(active)
                done += len(active)
                if on_step:
                    on_step(done, total)
            pictures.update(zip(group, self.finish(drawings), strict=True))
        return [pictures[i] for i in range(len(requests))]

    def groups(self, requests: Sequence[Request]) -> list[list[int]]:
        """Indexes of requests that can be drawn together: one size, as many as the plan's memory allows."""
        order = sorted(range(len(requests)), key=lambda i: (requests[i].size, i))
        found = []
        for _, same_size in groupby(order, key=lambda i: requests[i].size):
            members = list(same_size)
            limit = self.batch_limit(*requests[members[0]].size)
            found += [members[i : i + limit] for i in range(0, len(members), limit)]
        return found

    def batch_limit(self, width: int, height: int) -> int:
        """How many pictures of that size can be drawn at once.

        Raises:
            DoesNotFit: not even one.
        """
        return batch_limit(self.plan, self.model, width, height)

    def begin(self, request: Request, *, afresh: bool = False) -> Drawing:
        """Encode the prompt, unless this run or an earlier one has, and prepare the noise.

        With `afresh` it is encoded in any case, and not remembered.
        """
        return self._begin(request, self._encode if afresh else self._remembered)

    def _begin(self, request: Request, encode: Callable[[str], Conditioning]) -> Drawing:
        if self._closed:
            raise UsageError("this session is closed", hint="load the model again")
        began = time.perf_counter()
        self._ceiling.begin(measured=self.measured)
        check(request, self.model.limits)
        self.batch_limit(request.width, request.height)
        conditioning = self._within_plan(lambda: encode(request.prompt))
        state = self._within_plan(lambda: self.pipeline.start(request, conditioning))
        return Drawing(request, state, began, _prompt_warnings(conditioning))

    def advance(self, drawings: Iterable[Drawing]) -> None:
        """One denoise step for each; they must have one size and be unfinished."""
        together = list(drawings)
        done = [drawing.state.step for drawing in together]

        def advance_rest() -> None:
            """Those that are still where they were: done a second time, some may be further."""
            states = [drawing.state for drawing, step in zip(together, done, strict=True) if drawing.state.step == step]
            if states:
                self.pipeline.denoise(states)

        self._hold(together)
        self._within_plan(advance_rest)

    def finish(self, drawings: Sequence[Drawing]) -> list[Picture]:
        """Decode finished drawings."""
        states = [drawing.state for drawing in drawings]
        self._hold(drawings, decoding=True)
        images = self._within_plan(lambda: self.pipeline.decode(states))
        now = time.perf_counter()
        return [
            Picture(image, d.request, self.model.name, self.model.revision, (now - d.began) / len(drawings), d.warnings)
            for image, d in zip(images, drawings, strict=True)
        ]

    def warm_up(self) -> None:
        """Draw one step of a default picture, so that the first real one pays for no initialization.

        Reads what was deferred.
        """
        (request,) = make_requests(self.model, Order(prompt="warm up", seed=0, steps=1))
        drawing = self.begin(request, afresh=True)  # a remembered prompt would leave the text encoders cold
        self.advance([drawing])
        self.finish([drawing])

    def close(self) -> None:
        """Give back the device's memory. A closed session cannot draw."""
        self._closed = True
        self._prompts.clear()
        try:
            self.pipeline.close()
        finally:
            self._ceiling.release()

    @property
    def exceeded_plan(self) -> bool:
        """Whether pictures needed more of the device than is planned, where it is kept to that."""
        return self._ceiling.is_lifted

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def _hold(self, drawings: Sequence[Drawing], *, decoding: bool = False) -> None:
        """Keep to what is planned for these, which have one size."""
        steps = max(drawing.request.steps for drawing in drawings)
        self._ceiling.hold(*drawings[0].request.size, len(drawings), steps, decoding=decoding)

    def _within_plan(self, work: Callable[[], T]) -> T:
        """Do that, which can be done a second time, in the memory that is planned; in more, if it is not enough."""
        while True:
            try:
                with translated_memory_errors(self.plan):
                    return work()
            except OutOfMemory:
                if not self._ceiling.lift():
                    raise

    def _remembered(self, prompt: str) -> Conditioning:
        if (kept := self._prompts.find(prompt)) is not None:
            try:
                return self.pipeline.unpack(kept, prompt)
            except (KeyError, ValueError):
                self._prompts.forget(prompt)  # another version of the pipeline packed it
        conditioning = self._encode(prompt)
        if packed := self.pipeline.pack(conditioning):
            self._prompts.keep(prompt, packed)
        return conditioning

    def _encode(self, prompt: str) -> Conditioning:
        (conditioning,) = self.pipeline.encode([prompt])
        self.deferred = False
        return conditioning


def _prompt_warnings(conditioning: Conditioning) -> tuple[str, ...]:
    if not conditioning.dropped_text:
        return ()
    return (f"the prompt is too long for the model; it did not read: {conditioning.dropped_text!r}",)
