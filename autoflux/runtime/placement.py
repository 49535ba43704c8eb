"""Where the weights of a pipeline's components are while they are not used, as the plan says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from autoflux.errors import ContradictoryWishes
from autoflux.planning.values import ComponentPlan, Placement, Plan, Waiting
from autoflux.runtime.packed import PackStore
from autoflux.runtime.ring import Arena
from autoflux.runtime.sources import HostUnits, StagedUnits
from autoflux.runtime.stores import Store
from autoflux.runtime.streaming import NARROW, Holding, StreamedModule, StreamedTransformer, arena_for
from autoflux.runtime.units import sequence_atoms


class OwnOffload(Protocol):
    """A library's own way of bringing weights to the device, for components that the plan leaves to it."""

    def hold(self, network: nn.Module, planned: ComponentPlan) -> nn.Module:
        """Take a component over; gives what to call from now on.

        Raises:
            ContradictoryWishes: the library cannot hold it as planned.
        """

    def use(self, network: nn.Module) -> AbstractContextManager[None]:
        """For the time of the context, what `hold` gave can be called."""


class Residence:
    """Holds one component on the device, or in RAM until its phase.

    A visiting component's weights never change, so its RAM copy is kept and leaving the device costs nothing: the
    parameters are pointed back at it.
    """

    def __init__(
        self, module: nn.Module, placement: Placement, device: torch.device, own: OwnOffload | None = None
    ) -> None:
        """`own` brings the weights if given."""
        self.module = module
        self.device = device
        self._own = own
        self.visiting = placement == Placement.VISITING
        if placement == Placement.DEVICE:
            module.to(device)

    @contextmanager
    def on_device(self) -> Iterator[nn.Module]:
        """The module with its weights on the device, or streamed there, for the time of the block."""
        if not self.visiting:
            with self._own.use(self.module) if self._own else nullcontext():
                yield self.module
            return
        tensors = [*self.module.parameters(), *self.module.buffers()]
        in_ram = [tensor.data for tensor in tensors]
        try:
            for tensor in tensors:
                tensor.data = tensor.data.to(self.device)
            yield self.module
        finally:
            for tensor, data in zip(tensors, in_ram, strict=True):
                tensor.data = data


class Residences:
    """Every component of a pipeline, held as the plan says; streamed ones share one arena.

    `hold` each as soon as it is loaded, then `settle`.
    """

    def __init__(self, plan: Plan, *, block_lists: Sequence[str], own_offload: OwnOffload | None = None) -> None:
        """`block_lists` are the transformer's, in the order they run; `own_offload` is the backend's."""
        self._plan = plan
        self._device = torch.device(plan.device)
        self._block_lists = block_lists
        self._own_offload = own_offload
        self._held: dict[str, Residence] = {}
        self._transformer: StreamedTransformer | None = None
        self._others: dict[str, StreamedModule] = {}
        self._stores: dict[str, Store] = {}
        self._arena: Arena | None = None

    def __getitem__(self, name: str) -> Residence:
        return self._held[name]

    def hold(self, name: str, network: nn.Module, *, used: nn.Module | None = None, store: Store | None = None) -> None:
        """Take a component over. Of a streamed one only `used` is streamed, if given, and the rest stays in RAM; its
        weights come from `store`, if given, and are otherwise its own.

        Raises:
            ContradictoryWishes: weights that stay on the disk are to be held in another format than there, or the
                backend has no offload of its own that could hold the component as planned.
            torch.OutOfMemoryError: the device has less memory than the plan counts on.
        """
        planned = self._plan.component(name)
        if planned.placement == Placement.NATIVE:
            self._held[name] = self._left_to_backend(network, planned)
            return
        self._held[name] = Residence(network, planned.placement, self._device)
        if planned.placement != Placement.STREAMED:
            return
        if store and planned.storage in NARROW and not isinstance(store, PackStore):
            raise ContradictoryWishes(
                f"the weights of {name!r} are to wait on the disk and to be held as {planned.storage.value}",
                hint="choose a wide --precision, or leave more RAM with --ram",
            )
        if name == "transformer":
            holding = Holding(
                resident=frozenset(planned.resident),
                storage=planned.storage,
                native=planned.native,
                hoist=self._plan.hoist_modulation,
            )
            self._transformer = StreamedTransformer(network, self._block_lists, holding, self._device)
        else:
            part = used or network
            self._others[name] = StreamedModule(part, sequence_atoms(part))
        if store:
            self._stores[name] = store

    def _left_to_backend(self, network: nn.Module, planned: ComponentPlan) -> Residence:
        own = self._own_offload
        if own is None:
            raise ContradictoryWishes(
                f"the backend {self._plan.backend!r} has no offload of its own", hint="drop --offload, or take 'stream'"
            )
        return Residence(own.hold(network, planned), planned.placement, self._device, own)

    def settle(self) -> None:
        """Give the streamed components their memory on the device, once all are held.

        Raises:
            torch.OutOfMemoryError: the device has less memory than the plan counts on.
        """
        parts = {name: [part] for name, part in self._others.items()}
        if self._transformer:
            parts["transformer"] = self._transformer.parts
        if not parts:
            return
        every = [part for own in parts.values() for part in own]
        self._arena = arena = arena_for(every, self._plan.ring_bytes, self._device, parks=self._plan.park_for_decode)
        pinned = self._plan.waiting == Waiting.PINNED
        for name, own in parts.items():
            for part in own:
                part.attach(arena, store=self._stores.get(name), make_source=HostUnits if pinned else StagedUnits)

    @contextmanager
    def denoising(self) -> Iterator[nn.Module]:
        """The transformer on the device, or streamed there; back on it, should a decode have failed to leave room."""
        if self._arena:
            self._arena.unpark()
        with self._held["transformer"].on_device() as transformer:
            yield transformer

    @contextmanager
    def decoding(self) -> Iterator[nn.Module]:
        """The autoencoder on the device, or streamed there, with room for its activations."""
        arena = self._arena if self._plan.park_for_decode else None
        if arena:
            arena.park()
        try:
            with self._held["vae"].on_device() as vae:
                yield vae
        finally:
            if arena:
                arena.unpark()

    @property
    def hoists(self) -> bool:
        """Whether each picture's modulation is computed before its steps, and selected in each."""
        return self._transformer is not None and self._transformer.holding.hoist

    def modulation(self, embeddings: Sequence[Tensor]) -> Tensor:
        """See `StreamedTransformer.modulation`."""
        assert self._transformer is not None, "not streamed"  # noqa: S101
        return self._transformer.modulation(embeddings)

    def select(self, rows: Tensor) -> None:
        """See `StreamedTransformer.select`."""
        assert self._transformer is not None, "not streamed"  # noqa: S101
        self._transformer.select(rows)

    def close(self) -> None:
        """Drop the weights, on the device and in RAM."""
        for part in [*(self._transformer.parts if self._transformer else ()), *self._others.values()]:
            part.drop()
        self._transformer = None
        self._others.clear()
        self._held.clear()
        self._stores.clear()
        self._own_offload = None
        self._arena = None
