"""Where the weights of a pipeline's components are while they are not used, as the plan says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from autoflux.errors import ContradictoryWishes
from autoflux.planning.terms import TRANSFORMER, Placement, TransferUnit, Waiting
from autoflux.planning.values import ComponentPlan, Plan
from autoflux.runtime.bringing import forget_ahead
from autoflux.runtime.compiling import compile_blocks
from autoflux.runtime.contradictions import check_narrow_on_disk, check_plan, check_resident
from autoflux.runtime.decoding import spare_memory
from autoflux.runtime.memory import give_back_much_unused, give_back_unused
from autoflux.runtime.order import layer_atoms
from autoflux.runtime.packed import fill
from autoflux.runtime.portions import holds_as_brought
from autoflux.runtime.quantized import has_narrow_layers
from autoflux.runtime.residence import OwnOffload, Residence, Visits
from autoflux.runtime.ring import Arena
from autoflux.runtime.sources import HostUnits, StagedUnits
from autoflux.runtime.stores import AheadStore, Store
from autoflux.runtime.streaming import (
    Holding,
    StreamedModule,
    StreamedTransformer,
    arena_for,
    load_narrow,
    narrow_blocks,
)
from autoflux.runtime.units import Atom, block_atoms, sequence_atoms
from autoflux.units import MIB

LEFT_BYTES = 128 * MIB
"""What a decode has to leave in pieces for these to be given back, for which the device empties its queue."""

RunOnce = Callable[[nn.Module], object]
"""Calls the transformer once, with small inputs made in the call and weights that may be anything."""


class Residences:
    """Every component of a pipeline, held as the plan says; streamed ones share one arena.

    `hold` each as soon as it is loaded, then `settle`.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        block_lists: Sequence[str],
        own_offload: OwnOffload | None = None,
        run_once: RunOnce | None = None,
    ) -> None:
        """`block_lists` are the transformer's, in the order they run; `own_offload` is the backend's; `run_once` is
        needed to stream layers.

        Raises:
            ContradictoryWishes: the plan combines what does not go together, see `check_plan`.
            UnknownName: nothing computes attention by the plan's name for it.
        """
        check_plan(plan)
        self._plan = plan
        self._run_once = run_once
        self._device = torch.device(plan.device)
        self._block_lists = block_lists
        self._own_offload = own_offload
        self._held: dict[str, Residence] = {}
        self._visits = Visits()
        self._transformer: StreamedTransformer | None = None
        self._others: dict[str, StreamedModule] = {}
        self._stores: dict[str, Store] = {}
        self._later: set[str] = set()
        """Streamed components whose weights are not there yet."""
        self._arena: Arena | None = None
        self._stop_compiling: Callable[[], None] | None = None
        self._decoded_size: tuple[int, int] | None = None

    def __getitem__(self, name: str) -> Residence:
        return self._held[name]

    def hold(
        self,
        name: str,
        network: nn.Module,
        *,
        used: nn.Module | None = None,
        store: Store | None = None,
        later: bool = False,
    ) -> None:
        """Take a component over. Of a streamed one only `used` is streamed, if given, and the rest stays in RAM; its
        weights come from `store`, if given, and are otherwise its own. If they are to be held in 8 bits, and are not
        yet, they are read and narrowed now, and the store is closed. With `later`, the store is read when the component
        is first used.

        Raises:
            ContradictoryWishes: the backend has no offload of its own that could hold the component as planned, or a
                block is to stay on the device that is not there.
            DamagedCheckpoint: the store cannot be read any more.
            torch.OutOfMemoryError: the device has less memory than the plan counts on.
        """
        planned = self._plan.component(name)
        if name == "vae":
            spare_memory(used or network)
        if planned.placement == Placement.NATIVE:
            self._held[name] = self._left_to_backend(network, planned)
            return
        if planned.is_narrow and not has_narrow_layers(network):
            check_narrow_on_disk(planned)
            self._narrow(network, planned, store)
            store = None
        if store:
            self._stores[name] = store
        fetch = partial(self._fetch, name, network) if later else None
        self._held[name] = Residence(
            network,
            planned.placement,
            self._device,
            fetch=fetch,
            visits=self._visits,
            lingers=name == TRANSFORMER,  # a picture takes many steps
        )
        if planned.placement == Placement.STREAMED:
            if later:
                self._later.add(name)
            self._stream(network, planned, used or network)
        elif name == TRANSFORMER and self._plan.compiled:
            self._stop_compiling = compile_blocks(block.module for block in self._blocks(network))

    def _blocks(self, transformer: nn.Module) -> list[Atom]:
        return block_atoms(transformer, self._block_lists)

    def _narrow(self, transformer: nn.Module, planned: ComponentPlan, store: Store | None) -> None:
        blocks = self._blocks(transformer)
        if store is None:
            narrow_blocks(blocks, planned.storage, native=planned.native, device=self._device)
            return
        try:
            load_narrow(transformer, blocks, store, planned.storage, native=planned.native, device=self._device)
        finally:
            store.close()

    def _stream(self, network: nn.Module, planned: ComponentPlan, used: nn.Module) -> None:
        if planned.name != TRANSFORMER:
            self._others[planned.name] = StreamedModule(used, sequence_atoms(used))
            return
        check_resident(planned, len(self._blocks(network)))
        holding = Holding(
            resident=frozenset(planned.resident),
            block_bytes=self._plan.block_bytes,
            storage=planned.storage,
            native=planned.native,
            hoist=self._plan.hoist_modulation,
            keep_modulation=self._plan.keep_modulation,
            compiled=self._plan.compiled,
            graphs=self._plan.graphs,
        )
        self._transformer = StreamedTransformer(
            network, self._block_lists, holding, self._device, atoms=self._layers(network)
        )

    def _layers(self, transformer: nn.Module) -> list[Atom] | None:
        """In the order they run, if that is what is to be streamed."""
        run_once = self._run_once
        if self._plan.unit != TransferUnit.LAYER:
            return None
        if run_once is None:
            raise ContradictoryWishes(
                f"the backend {self._plan.backend!r} cannot say in which order layers run", hint="stream whole blocks"
            )
        return layer_atoms(transformer, lambda: run_once(transformer))

    def _left_to_backend(self, network: nn.Module, planned: ComponentPlan) -> Residence:
        own = self._own_offload
        if own is None:
            raise ContradictoryWishes(
                f"the backend {self._plan.backend!r} has no offload of its own", hint="drop --offload, or take 'stream'"
            )
        return Residence(own.hold(network, planned), planned.placement, self._device, own, visits=self._visits)

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
        if holds_as_brought(self._plan):
            self._place_ahead(parts)
        self._arena = arena = arena_for(every, self._plan.ring_bytes, self._device, parks=self._plan.park_for_decode)
        for name, own in parts.items():
            if name not in self._later:
                self._attach(name, own, arena)

    def _place_ahead(self, parts: Mapping[str, Sequence[StreamedModule]]) -> None:
        for name, own in parts.items():
            store = self._stores.get(name)
            if isinstance(store, AheadStore) and name not in self._later:
                for part in own:
                    part.place_ahead(store, self._device)

    def _attach(self, name: str, parts: Sequence[StreamedModule], arena: Arena) -> None:
        pinned = self._plan.component(name).waiting == Waiting.PINNED
        store = self._stores.get(name)
        for part in parts:
            part.attach(arena, store=store, make_source=HostUnits if pinned else StagedUnits)
        forget_ahead(store)

    def _fetch(self, name: str, network: nn.Module) -> None:
        """Read the weights of a component to where they will be."""
        planned = self._plan.component(name)
        if planned.placement == Placement.STREAMED:
            assert self._arena, "not settled"  # noqa: S101
            self._arena.unpark()
            self._attach(name, [self._others[name]], self._arena)
            self._later.discard(name)
            return
        device = self._device if planned.placement == Placement.DEVICE else torch.device("cpu")
        fill(network, self._stores[name], device)
        self._stores.pop(name).close()

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """The text encoders where they compute. What leaves for each decode has to leave here, if there was none."""
        if self._transformer and self._plan.park_for_decode:
            self._transformer.forget_graphs()
        with ExitStack() as stack:
            for name in ("text_encoder", "text_encoder_2"):
                stack.enter_context(self._held[name].on_device())
            yield

    @contextmanager
    def denoising(self) -> Iterator[nn.Module]:
        """The transformer on the device, or streamed there; back on it, should a decode have failed to leave room."""
        if self._arena:
            self._arena.unpark()
        with self._held["transformer"].on_device() as transformer:
            yield transformer

    @contextmanager
    def decoding(self, width: int, height: int) -> Iterator[nn.Module]:
        """The autoencoder on the device, or streamed there, with room for its activations at that size.

        Pictures of one size take the same memory again and again. What is left of another size lies in pieces that a
        decode cannot use, so it is given back; and what a decode leaves in pieces that steps cannot use, if it is much.
        """
        if self._decoded_size != (width, height):
            self._decoded_size = width, height
            give_back_unused()
        arena = self._arena if self._plan.park_for_decode else None
        if arena:
            if self._transformer:
                self._transformer.forget_graphs()
            arena.park()
        try:
            with self._held["vae"].on_device() as vae:
                yield vae
            if arena or not self._plan.graphs:  # which keep the memory of all blocks
                give_back_much_unused(self._plan.device, LEFT_BYTES)
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
        """Drop the weights, on the device and in RAM, and close their files."""
        if self._transformer:
            self._transformer.run_as_written()
        if self._stop_compiling:
            self._stop_compiling()
        if self._plan.compiled:
            # Nothing that was compiled for one way of attention may serve a plan with another, and torch does not ask.
            torch.compiler.reset()
        for part in [*(self._transformer.parts if self._transformer else ()), *self._others.values()]:
            part.drop()
        self._transformer = None
        self._others.clear()
        self._held.clear()
        for store in self._stores.values():
            store.close()
        self._stores.clear()
        self._own_offload = self._run_once = self._stop_compiling = None
        self._arena = None
