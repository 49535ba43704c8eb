"""Host memory that a device can copy from at full speed, not a byte more than asked for.

torch rounds pinned tensors up to a power of two (24 GB of weights become 37 GB), so on CUDA ordinary pages are taken
and registered with the driver instead.
"""

from __future__ import annotations

import contextlib
import weakref

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
