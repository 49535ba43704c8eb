"""Where one component's weights are: on the device, in RAM, or on a visit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from autoflux.planning.terms import Placement
from autoflux.planning.values import ComponentPlan


class OwnOffload(Protocol):
    """A library's own way of bringing weights to the device, for components that the plan leaves to it."""

    def hold(self, network: nn.Module, planned: ComponentPlan) -> nn.Module:
        """Take a component over; gives what to call from now on.

        Raises:
            ContradictoryWishes: the library cannot hold it as planned.
        """

    def use(self, network: nn.Module) -> AbstractContextManager[None]:
        """For the time of the context, what `hold` gave can be called."""


class Visits:
    """Which component is on the device although its turn is over: the next turn may be its own."""

    def __init__(self) -> None:
        self.lingering: Residence | None = None

    def make_room_for(self, residence: Residence) -> None:
        """Send away the one that lingers, unless its turn has come again."""
        if self.lingering not in (None, residence):
            self.lingering.leave()
            self.lingering = None


class Residence:
    """Holds one component on the device, or in RAM: until its phase, or for the processor.

    A visiting component's weights never change, so its RAM copy is kept and leaving the device costs nothing: the
    parameters are pointed back at it. One that `lingers` leaves only when another component has its turn.
    """

    def __init__(
        self,
        module: nn.Module,
        placement: Placement,
        device: torch.device,
        own: OwnOffload | None = None,
        fetch: Callable[[], None] | None = None,
        visits: Visits | None = None,
        *,
        lingers: bool = False,
    ) -> None:
        """`own` brings the weights if given; `fetch` reads them to where they will be, before their first use; `visits`
        is shared by all components of a pipeline."""
        self.module = module
        self.device = torch.device("cpu") if placement == Placement.HOST else device
        """Where it computes, and so wants its inputs."""
        self._own = own
        self._fetch = fetch
        self._visits = visits or Visits()
        self._lingers = lingers
        self._in_ram: list[Tensor] = []
        """Where the weights are that are on the device for now."""
        self.visiting = placement == Placement.VISITING
        if placement == Placement.DEVICE and not fetch:
            module.to(device)

    @contextmanager
    def on_device(self) -> Iterator[nn.Module]:
        """The module with its weights on the device, or streamed there, for the time of the block.

        Raises:
            AutofluxError: weights that are read only now cannot be.
        """
        self._visits.make_room_for(self)
        if self._fetch:
            self._fetch()
            self._fetch = None
        if not self.visiting:
            with self._own.use(self.module) if self._own else nullcontext():
                yield self.module
            return
        try:
            self._arrive()
            yield self.module
        except BaseException:
            self.leave()
            raise
        if self._lingers:
            self._visits.lingering = self
        else:
            self.leave()

    def _arrive(self) -> None:
        if self._in_ram:
            return
        tensors = [*self.module.parameters(), *self.module.buffers()]
        self._in_ram = [tensor.data for tensor in tensors]
        for tensor in tensors:
            tensor.data = tensor.data.to(self.device)

    def leave(self) -> None:
        """Back to RAM, if its weights are on the device."""
        if self._in_ram:
            tensors = [*self.module.parameters(), *self.module.buffers()]
            for tensor, data in zip(tensors, self._in_ram, strict=True):
                tensor.data = data
            self._in_ram = []
