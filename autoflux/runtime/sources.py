"""Where the bytes of streamed units wait on the host, ready for the device to copy."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from autoflux.planning.schedule import lay_out
from autoflux.runtime.lanes import Mark
from autoflux.runtime.pinned import PinnedBuffer, exact_buffer
from autoflux.runtime.stores import AheadStore, KeptStore, ModuleStore, Store
from autoflux.runtime.units import Unit


class Source(Protocol):
    """Gives the bytes of units, asked for in the order of a pass, again and again."""

    pinned_bytes: int

    def ready(self) -> bool:
        """Whether the next `get` would not wait."""

    def get(self, index: int) -> Tensor:
        """The bytes of that unit, uint8, from which the device can copy; waits until they are there."""

    def sent(self, index: int, copied: Mark) -> None:
        """The copy of what `get` gave is under way; after `copied` its memory may be used again."""

    def expect(self, index: int) -> None:
        """The next `get` will be for this unit: prepare it."""

    def close(self) -> None:
        """Give back the memory."""


READ_AT_ONCE = 3
"""Units that are read while memory for the next is pinned, or one before them is on its way, so that neither waits for
the other."""


def in_order(
    store: Store, units: Iterable[Unit], memory_for: Callable[[Unit], Tensor], *, at_once: int
) -> Iterator[tuple[Unit, Tensor]]:
    """Read units in order, `at_once` of them side by side; gives each with its memory once it is there.

    `memory_for` is called by the thread that iterates, while earlier units are being read.

    Raises:
        As `Store.read`; those that are being read meanwhile are waited for.
    """
    with ThreadPoolExecutor(at_once, thread_name_prefix="read-units") as pool:
        under_way: deque[tuple[Unit, Tensor, Future[None]]] = deque()
        for unit in units:
            memory = memory_for(unit)
            under_way.append((unit, memory, pool.submit(store.read, unit, memory)))
            if len(under_way) == at_once:
                yield _finished(under_way)
        while under_way:
            yield _finished(under_way)


def _finished(under_way: deque[tuple[Unit, Tensor, Future[None]]]) -> tuple[Unit, Tensor]:
    unit, memory, reading = under_way.popleft()
    reading.result()
    return unit, memory


class HostUnits:
    """Every unit in host memory of its own, pinned as far as the system lets us: the fastest, if RAM allows."""

    def __init__(self, units: Sequence[Unit], device: torch.device, store: Store) -> None:
        ahead = [store.buffer_ahead(unit) if isinstance(store, AheadStore) else None for unit in units]
        missing = [unit for unit, buffer in zip(units, ahead, strict=True) if not buffer]
        made: list[PinnedBuffer] = []

        def pinned(unit: Unit) -> Tensor:
            made.append(exact_buffer(unit.nbytes, device))
            return made[-1].tensor

        # A module's own tensors are freed one by one, so that both copies of a model never lie in RAM together.
        at_once = 1 if isinstance(store, ModuleStore) else READ_AT_ONCE
        for unit, memory in in_order(store, missing, pinned, at_once=at_once):
            unit.point_at(memory)
        for unit, buffer in zip(units, ahead, strict=True):
            if buffer:
                unit.point_at(buffer.tensor)
        read = iter(made)
        self._buffers = [buffer or next(read) for buffer in ahead]
        self.pinned_bytes = sum(buffer.nbytes for buffer in self._buffers if buffer.pinned)

    def ready(self) -> bool:
        return True

    def get(self, index: int) -> Tensor:
        return self._buffers[index].tensor

    def sent(self, index: int, copied: Mark) -> None:
        """Nothing is reused."""

    def expect(self, index: int) -> None:
        """Everything is ready."""

    def close(self) -> None:
        self._buffers.clear()


class StagedUnits:
    """Units read ahead from a store into a small pinned ring, by a thread of its own.

    For weights in RAM that cannot all be pinned, and for weights that stay on the disk.
    """

    def __init__(self, units: Sequence[Unit], device: torch.device, store: Store, *, stage_bytes: int = 0) -> None:
        """`stage_bytes` is raised to hold the largest unit twice."""
        sizes = [unit.nbytes for unit in units]
        stage = max(stage_bytes, 2 * max(map(_page, sizes), default=0))
        # The module's tensors will point at the device while the thread reads.
        self._units, self._store = units, KeptStore(units) if isinstance(store, ModuleStore) else store
        self._layout = lay_out(sizes, stage)
        self._buffer = PinnedBuffer(stage, device)
        self.pinned_bytes = stage if self._buffer.pinned else 0
        self._marks: dict[int, Mark] = {}
        # Counted on from pass to pass, as the streamer does.
        self._read = self._sent = self._floor = 0
        self._epoch = 0
        self._failure: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read_ahead, name="read-ahead", daemon=True)
        if units:
            self._thread.start()

    def ready(self) -> bool:
        with self._changed:
            return self._failure is None and self._read > self._sent

    def get(self, index: int) -> Tensor:
        with self._changed:
            self._changed.wait_for(lambda: self._failure or self._closed or self._read > self._sent)
            if self._closed:
                raise RuntimeError(f"{self._units[index].name!r} was asked for after the end")
            if failure := self._failure:
                self._restart(index)
                raise failure
        return self._place(index)

    def sent(self, index: int, copied: Mark) -> None:
        with self._changed:
            self._marks[index] = copied
            self._sent += 1
            self._changed.notify_all()

    def expect(self, index: int) -> None:
        with self._changed:
            if self._sent % len(self._units) != index:
                self._restart(index)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _restart(self, index: int) -> None:
        # What is on its way to the device must leave before its place is written again.
        for mark in self._marks.values():
            mark.synchronize()
        self._marks.clear()
        self._failure = None
        self._epoch += 1
        self._read = self._sent = self._floor = index
        self._changed.notify_all()

    def _place(self, k: int) -> Tensor:
        offset = self._layout.offsets[k]
        return self._buffer.tensor[offset : offset + self._units[k].nbytes]

    def _read_ahead(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._has_room())
                if self._closed:
                    return
                epoch, number = self._epoch, self._read
                k = number % len(self._units)
                blocker = number - self._layout.distances[k]
                leaving = self._marks.get(blocker % len(self._units)) if blocker >= self._floor else None
            failure = self._fetch(k, leaving)
            with self._changed:
                if epoch == self._epoch:
                    self._read += failure is None
                    self._failure = failure
                    self._changed.notify_all()

    def _has_room(self) -> bool:
        if self._failure:
            return False
        return self._read - self._layout.distances[self._read % len(self._units)] < self._sent

    def _fetch(self, k: int, leaving: Mark | None) -> BaseException | None:
        try:
            if leaving is not None:
                leaving.synchronize()
            self._store.read(self._units[k], self._place(k))
        except Exception as error:  # noqa: BLE001 — handed to the thread that asks for the unit
            return error
        return None


def _page(nbytes: int) -> int:
    return -(-nbytes // 4096) * 4096
