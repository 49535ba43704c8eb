"""Host memory that a device can copy from at full speed, not a byte more than asked for.

torch rounds pinned tensors up to a power of two (24 GB of weights become 37 GB), so on CUDA ordinary pages are taken
and registered with the driver instead.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from autoflux.hardware.pages import own_pages


class PinnedBuffer:
    """Bytes on the host. `tensor` is a uint8 view of all of them; `pinned` says whether the device reads them directly.

    When no more can be pinned (the system's limit, a container) the bytes are ordinary memory.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes = nbytes
        self.tensor, self.pinned = _host_bytes(nbytes, device)
        if self.pinned and device.type == "cuda":
            weakref.finalize(self, _unregister, self.tensor)


class Offer(Protocol):
    """Buffers that are there, or soon will be, before anybody asks for them."""

    def take(self, nbytes: int) -> PinnedBuffer | None:
        """One of that size, which is the caller's then; None if there is none."""


class PinnedAhead:
    """Buffers of given sizes that threads pin before anybody asks for them, in that order.

    Pinning a gigabyte takes a quarter of a second in which Python could do something else.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device, *, threads: int = 2) -> None:
        self._wanted, self._device = deque(sizes), device
        self._ready: list[PinnedBuffer] = []
        self._making: list[int] = []
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._pin, name="pin-ahead", daemon=True) for _ in range(threads if sizes else 0)
        ]
        for thread in self._threads:
            thread.start()

    def take(self, nbytes: int) -> PinnedBuffer | None:
        """One of that size, waited for if it is being made; None if there is none, and then none is made either."""
        with self._changed:
            self._changed.wait_for(lambda: self._find(nbytes) is not None or nbytes not in self._making)
            found = self._find(nbytes)
            if found is not None:
                return self._ready.pop(found)
            with contextlib.suppress(ValueError):
                self._wanted.remove(nbytes)
            return None

    def close(self) -> None:
        """Make no more, and let go of what nobody took."""
        with self._changed:
            self._wanted.clear()
        for thread in self._threads:
            thread.join()
        self._ready.clear()

    def _find(self, nbytes: int) -> int | None:
        return next((i for i, buffer in enumerate(self._ready) if buffer.nbytes == nbytes), None)

    def _pin(self) -> None:
        while True:
            with self._changed:
                if not self._wanted:
                    return
                nbytes = self._wanted.popleft()
                self._making.append(nbytes)
            made = None
            with contextlib.suppress(MemoryError, OSError):  # raised again for whoever asks for it
                made = PinnedBuffer(nbytes, self._device)
            with self._changed:
                self._making.remove(nbytes)
                if made:
                    self._ready.append(made)
                if not made or not made.pinned:  # no more can be
                    self._wanted.clear()
                self._changed.notify_all()


_offers: list[Offer] = []


@contextmanager
def offered(offer: Offer) -> Iterator[None]:
    """For the time of the context, `exact_buffer` takes from it what it has."""
    _offers.append(offer)
    try:
        yield
    finally:
        _offers.remove(offer)


def exact_buffer(nbytes: int, device: torch.device) -> PinnedBuffer:
    """A buffer of that size, from what is offered if it has one."""
    made = (offer.take(nbytes) for offer in _offers)
    return next((buffer for buffer in made if buffer), None) or PinnedBuffer(nbytes, device)


def _host_bytes(nbytes: int, device: torch.device) -> tuple[Tensor, bool]:
    if device.type == "cuda":
        pages = _pages(nbytes)
        return pages, nbytes > 0 and _register(pages)
    if device.type == "xpu":
        try:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True), True
        except RuntimeError:
            pass
    return _pages(nbytes), device.type == "cpu"


def _pages(nbytes: int) -> Tensor:
    return torch.frombuffer(own_pages(nbytes), dtype=torch.uint8)[:nbytes]


def _register(pages: Tensor) -> bool:
    status = torch.cuda.cudart().cudaHostRegister(pages.data_ptr(), pages.numel(), 0)  # type: ignore[no-untyped-call]
    if int(status) == 0:
        return True
    # CUDA keeps the error and torch raises it at the next kernel, which has nothing to do with it: let this be the one.
    with contextlib.suppress(RuntimeError):
        torch.empty(1, device="cuda").fill_(1)
    return False


def _unregister(pages: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(pages.data_ptr())  # type: ignore[no-untyped-call]
