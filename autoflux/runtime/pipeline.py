"""What a backend builds and a session drives. This module does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

from autoflux.models.request import Request
from autoflux.models.values import Model
from autoflux.planning.values import Plan

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn


class Conditioning(Protocol):
    """An encoded prompt. `dropped_text` is the end of the prompt that the model's token limit cut off."""

    @property
    def dropped_text(self) -> str: ...


class State(Protocol):
    """A picture being drawn: its request, its latents, and how many of its steps are done."""

    request: Request
    step: int


class Pipeline(Protocol):
    """A loaded model. One picture goes encode → start → denoise (once a step) → decode.

    `pack` and `unpack` let the session keep encoded prompts, in this run and from one run to the next.
    States in one `denoise` call have the same size but may be at different steps of different prompts. The same
    request gives the same picture however it is grouped, up to rounding (1/255 a channel).
    """

    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """One conditioning a prompt, in order."""

    def pack(self, conditioning: Conditioning) -> dict[str, Tensor]:
        """What `unpack` needs to make the same conditioning again, on any device; empty if it is not worth keeping.

        Nothing of the prompt's text, which may not get onto the disk: `unpack` is told it.
        """

    def unpack(self, tensors: dict[str, Tensor], prompt: str) -> Conditioning:
        """The conditioning of that prompt that was packed, bit for bit. The tensors are on the CPU; do not change them.

        Raises:
            KeyError, ValueError: they are not what `pack` gives, but perhaps what an earlier version gave.
        """

    def start(self, request: Request, conditioning: Conditioning) -> State:
        """Noise from the request's seed, and the schedule of its steps."""

    def denoise(self, states: Sequence[State]) -> None:
        """Advance each state by one step."""

    def decode(self, states: Sequence[State]) -> list[Image]:
        """One RGB picture a state; the states must be at their last step."""

    def block_lists(self) -> dict[str, nn.ModuleList]:
        """The transformer's block lists by attribute path, in the order they run."""

    def close(self) -> None:
        """Give back device memory. The pipeline cannot be used afterwards."""


LoadProgress = Callable[[str, float], None]
"""Called with what is being loaded and the share done so far, 0 to 1."""


class Backend(Protocol):
    """A library that can build pipelines. Creating it must not import the library; `build` does.

    Registered by a plugin::

        class EchoBackend:
            name = "echo"
            def missing(self):
                return None
            def build(self, plan, model, progress):
                return EchoPipeline(plan)

        @autoflux.hookimpl
        def register_backends(register):
            register(EchoBackend())

    Three more it may have, which autoflux asks for by name. `facts(model)` gives `BackendFacts`: why it cannot run a
    model, and what it takes to start; the planner chooses by it. `defers = True` says that `build` takes a fourth
    argument, names of components whose weights are to be read only when they are used. `as_packed = True` says that
    its transformer has the tensors that packs have, none joined: those that stay are brought to the device before it
    is made, where it would not hold them twice.
    """

    name: ClassVar[str]

    def missing(self) -> str | None:
        """The pip command that would make this backend work here, None when it works. Must be quick."""

    def build(self, plan: Plan, model: Model, progress: LoadProgress) -> Pipeline:
        """Load the weights as the plan says.

        Raises:
            MissingExtra: the library is not installed.
            DamagedCheckpoint: the weights cannot be loaded.
            OutOfMemory: they do not fit after all.
        """
