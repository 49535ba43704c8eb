"""Running a module whose weights do not fit the device: they pass through a ring while earlier ones compute."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from autoflux.planning.schedule import RingLayout, lay_out
from autoflux.runtime.bringing import bring, parts_of
from autoflux.runtime.lanes import Lane
from autoflux.runtime.ring import Arena
from autoflux.runtime.sources import HostUnits, Source
from autoflux.runtime.stores import ModuleStore, Store
from autoflux.runtime.telemetry import SILENT, Recorder
from autoflux.runtime.units import Atom, Unit, apart_from, staying_of

MakeSource = Callable[[Sequence[Unit], torch.device, Store], Source]
"""Makes the source of a streamer: its streamed units, the device, and where their bytes come from."""


class Streamer:
    """Attaches to a module and holds its weights: some on the device for good, the others brought when they run.

    The units run in order, once a pass. A streamed unit has a fixed place in the ring, so its parameters point there
    for good and nothing is allocated in a pass. When a unit has computed, those that were waiting for its room are
    copied; after the last unit of a pass come the first of the next one, unless `wraps` is False. A pass that breaks
    off (an error in a block) or skips blocks costs one restart of the ring and is otherwise safe.

    Units in `placed` stay as well, and are on the device already, in memory of their own.

    While attached, do not move the module or save its state; `detach` puts everything back.
    """

    @torch.inference_mode(mode=False)
    def __init__(
        self,
        module: nn.Module,
        units: Sequence[Unit],
        arena: Arena,
        resident: Collection[int] = (),
        *,
        placed: Sequence[Unit] = (),
        wraps: bool = True,
        store: Store | None = None,
        make_source: MakeSource = HostUnits,
    ) -> None:
        self._module = module
        self._arena, self._ring, self._lane = arena, arena.ring, arena.ring.lane
        self._wraps = wraps
        self._recorder: Recorder = SILENT
        self._homes = {id(t): t.device for t in (*module.parameters(), *module.buffers())}
        self._units = tuple(units)
        self._numbers = [i for i in range(len(units)) if i not in resident]
        self._streamed = [units[i] for i in self._numbers]
        self._placed = list(placed)
        staying = apart_from(placed, staying_of(module, units, resident))
        self._layout: RingLayout = lay_out([unit.nbytes for unit in self._streamed], self._ring.memory.numel())
        self._store = store or ModuleStore()
        self._kept = make_source(staying, arena.device, self._store) if arena.parks else None
        self._staying = [(unit, arena.take(unit.nbytes)) for unit in staying]
        self._settle()
        if self._kept:
            arena.when_unparked(self._bring_back)
        self._source = make_source(self._streamed, arena.device, self._store)
        self._targets = [
            self._ring.memory[offset : offset + unit.nbytes]
            for unit, offset in zip(self._streamed, self._layout.offsets, strict=True)
        ]
        for unit, target in zip(self._streamed, self._targets, strict=True):
            unit.point_at(target)
        self._arrived = [self._lane.mark() for _ in self._streamed]
        self._released = [self._lane.mark() for _ in self._streamed]
        # Counted on from pass to pass: the unit that runs next, the one that is copied next, and the first since the
        # ring was last cleared.
        self._next = self._sending = self._floor = 0
        # The streamed unit that was brought last: it is there until it is released or the ring begins anew.
        self._brought: int | None = None
        self._hooks = [hook for k in range(len(self._streamed)) for hook in self._hook(k)]
        self._watching: list[RemovableHandle] = []

    @property
    def lane(self) -> Lane:
        """The copy stream of its device, on whose clock a `Recording` is made."""
        return self._lane

    @property
    def resident_bytes(self) -> int:
        """Device bytes of weights that stay."""
        return sum(memory.numel() for _, memory in self._staying) + sum(unit.nbytes for unit in self._placed)

    @property
    def streamed_bytes(self) -> int:
        """Bytes copied in a pass."""
        return sum(unit.nbytes for unit in self._streamed)

    @property
    def pinned_bytes(self) -> int:
        """Host memory pinned for them, and for what stays if it can be parked."""
        return self._source.pinned_bytes + (self._kept.pinned_bytes if self._kept else 0)

    @property
    def streamed(self) -> tuple[Unit, ...]:
        """The units that are brought in a pass, in order."""
        return tuple(self._streamed)

    def record(self, recorder: Recorder) -> None:
        """Report to `recorder` from now on, resident units too; `SILENT` to stop."""
        self._recorder = recorder
        for hook in self._watching:
            hook.remove()
        self._watching.clear()
        if recorder is not SILENT:
            staying = set(range(len(self._units))) - set(self._numbers)
            self._watching = [hook for i in sorted(staying) for hook in self._watch(i)]

    def prefetch(self) -> None:
        """Begin to bring the first units before the first of them runs."""
        if self._streamed and not self._ring.held_by(self):
            self._begin(0)

    def forget(self) -> None:
        """The ring was lent to another."""
        self._floor = self._next = self._sending = 0
        self._brought = None

    @torch.inference_mode(mode=False)
    def detach(self) -> None:
        """Take the hooks away and put every weight back where it came from."""
        self._unhook()
        self._arena.unpark()
        if self._ring.held_by(self):
            self._ring.lend(None)
        try:
            self._wait_for_copies()
            for i, unit in enumerate(self._streamed):
                self._source.expect(i)
                self._restore(unit, self._source.get(i))
        finally:
            self._close_sources()
            for unit, memory in self._staying:
                self._restore(unit, memory)
                self._arena.give_back(memory)
            self._streamed.clear()
            self._staying.clear()
            self._placed.clear()

    def close(self) -> None:
        """Stop bringing weights without putting them back; the module must not be used any more."""
        self._unhook()
        try:
            self._wait_for_copies()
        finally:
            self._close_sources()

    def _close_sources(self) -> None:
        self._source.close()
        if self._kept:
            self._arena.leave(self._bring_back)
            self._kept.close()
            self._kept = None

    def _unhook(self) -> None:
        self.record(SILENT)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _wait_for_copies(self) -> None:
        # The host memory they read and the device memory they write may be freed by those who own it.
        copied = self._lane.mark()
        self._lane.set_copied(copied)
        copied.synchronize()

    def _settle(self) -> None:
        """Write what stays into its memory for the first time."""
        if self._kept:
            self._ring.clear()  # the memory may come from a tensor that is still computed with
            self._bring_back()
        elif self._arena.device.type == "cpu" or isinstance(self._store, ModuleStore):
            for unit, memory in self._staying:
                self._store.read(unit, memory)
        else:
            self._bring_staying()
        for unit, memory in self._staying:
            unit.point_at(memory)

    def _bring_staying(self) -> None:
        targets = [
            (part.unit, memory[part.begin : part.begin + part.unit.nbytes])
            for unit, memory in self._staying
            for part in parts_of(unit)
        ]
        bring(self._store, targets, self._arena.device, self._lane)

    def _bring_back(self) -> None:
        """Copy what stays into its memory again."""
        assert self._kept is not None  # noqa: S101 — called by an arena that parks
        for i, (unit, memory) in enumerate(self._staying):
            self._kept.expect(i)
            self._lane.copy(memory[: unit.nbytes], self._kept.get(i))
            copied = self._lane.mark()
            self._lane.set_copied(copied)
            self._kept.sent(i, copied)
            self._lane.computation_waits(copied)

    def _restore(self, unit: Unit, memory: Tensor) -> None:
        for piece, view in zip(unit.pieces, unit.views(memory), strict=True):
            piece.tensor.data = view.to(self._homes[id(piece.tensor)], copy=True)

    def _hook(self, k: int) -> list[RemovableHandle]:
        atoms = self._streamed[k].atoms

        def before(_module: nn.Module, _given: Any) -> None:
            self._bring(k)

        def before_others(_module: nn.Module, _given: Any) -> None:
            # The first may have been skipped.
            if self._brought != k:
                self._bring(k)

        def after(_module: nn.Module, _given: Any, _made: Any) -> None:
            self._release(k)

        others = [module for atom in atoms[1:] for module in atom.modules]
        return [
            *_around(atoms, before, after),
            *(module.register_forward_pre_hook(before_others) for module in others),
        ]

    def _watch(self, number: int) -> list[RemovableHandle]:
        atoms = self._units[number].atoms

        def before(_module: nn.Module, _given: Any) -> None:
            self._recorder.asked(number)
            self._recorder.began(number)

        def after(_module: nn.Module, _given: Any, _made: Any) -> None:
            self._recorder.ended(number)

        return _around(atoms, before, after)

    def _bring(self, k: int) -> None:
        count = len(self._streamed)
        in_order = self._next % count == k and (self._next < self._sending or self._may_send(count))
        if not in_order or not self._ring.held_by(self):
            self._begin(k)
        self._send(needed=True)
        self._recorder.asked(self._numbers[k])
        self._lane.computation_waits(self._arrived[k])
        self._recorder.began(self._numbers[k])
        self._brought = k

    def _release(self, k: int) -> None:
        self._lane.set_computed(self._released[k])
        self._recorder.ended(self._numbers[k])
        self._brought = None
        self._next += 1
        self._send()

    def _begin(self, k: int) -> None:
        self._ring.lend(self)
        self._floor = self._next = self._sending = k
        self._brought = None
        self._source.expect(k)
        self._send()

    def _send(self, *, needed: bool = False) -> None:
        """Copy every unit whose room has been released, as far as their bytes are there.

        Waits only for the next unit to compute, and only when it is `needed` now: while the host waits, it launches
        nothing, and units that have arrived would not be computed.
        """
        count = len(self._streamed)
        while self._may_send(count):
            if not self._source.ready() and not (needed and self._sending == self._next):
                return
            k = self._sending % count
            blocker = self._sending - self._layout.distances[k]
            if blocker >= self._floor:
                self._lane.copies_wait(self._released[blocker % count])
            waiting = self._source.get(k)
            self._recorder.sending(self._numbers[k])
            self._lane.copy(self._targets[k], waiting)
            self._lane.set_copied(self._arrived[k])
            self._recorder.sent(self._numbers[k])
            self._source.sent(k, self._arrived[k])
            self._sending += 1

    def _may_send(self, count: int) -> bool:
        if not self._wraps and self._sending >= count:
            return False
        return self._sending - self._layout.distances[self._sending % count] < self._next


def _around(atoms: Sequence[Atom], before: Callable[..., None], after: Callable[..., None]) -> list[RemovableHandle]:
    """Call `before` when the first of the atoms is called, and `after` when the last has returned."""
    return [
        *(module.register_forward_pre_hook(before) for module in atoms[0].modules),
        *(module.register_forward_hook(after) for module in atoms[-1].modules),
    ]
