"""Memory of this process: how much it took, and running out of it told as an error that says what to do."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from autoflux.errors import OutOfMemory
from autoflux.planning.values import Plan
from autoflux.process import is_own_process
from autoflux.units import MIB, format_bytes


@contextmanager
def translated_memory_errors(plan: Plan) -> Iterator[None]:
    """Turn torch's out-of-memory error into ours, after giving back what the allocator holds."""
    try:
        yield
    except Exception as error:
        # Looked up, not imported: a pipeline without torch can raise no error of torch's.
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(error, torch.OutOfMemoryError):
            raise
        give_back_unused()
        raise OutOfMemory(
            f"{plan.device} ran out of memory; the plan counted on {format_bytes(plan.vram_limit_bytes or 0)}",
            hint="close other programs on the device, or lower the ceiling with --vram so that more waits in RAM",
        ) from error


def give_back_unused() -> None:
    """Let devices have what torch's allocator keeps although no tensor takes it; waits until nothing computes."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.accelerator.is_available():
        # Each kind's own: that of `torch.accelerator` fails on Apple's (pytorch/pytorch#186430).
        getattr(torch, torch.accelerator.current_accelerator().type).empty_cache()


def give_back_much_unused(device: str, least_bytes: int) -> None:
    """The same if it is at least so much of that device, and torch says how much it is."""
    own: Any = getattr(sys.modules.get("torch"), device.partition(":")[0], None)
    if hasattr(own, "memory_reserved") and own.memory_reserved(device) - own.memory_allocated(device) >= least_bytes:
        give_back_unused()


@contextmanager
def freed_ram_given_back() -> Iterator[None]:
    """Let the system have what is freed in here at once, where the C library is glibc: for loading weights.

    glibc learns to keep pieces of up to 32 MB on its heap, which shrinks only from its end. Of a transformer that was
    made narrow as it was read, half again as much as was held stayed there.
    """
    _set_malloc(LOADING)
    try:
        yield
    finally:
        _set_malloc(COMPUTING)


@contextmanager
def collection_paused() -> Iterator[None]:
    """Collect no garbage in here: for imports, whose half a million objects stay, and are gone through again and again.

    torch, transformers and diffusers are imported in 9.1 s instead of 10.3 (two cores of a Xeon server). In a process
    of autoflux's own they are not gone through afterwards either, as a program's own objects have to be: a worker has
    the sample model ready after 2.3 s instead of 3.0 (two cores, `autoflux bench load`).
    """
    collects, known = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if collects:
            if is_own_process() and len(sys.modules) > known:  # else there may be garbage of what ran before
                gc.freeze()
            gc.enable()


class _Malloc(NamedTuple):
    """From how many bytes on a piece is the system's own, and how many free ones are kept at the end of the heap."""

    own_bytes: int
    kept_bytes: int


LOADING = _Malloc(MIB, MIB)
COMPUTING = _Malloc(32 * MIB, 64 * MIB)
"""As much as glibc learns to keep: to get pages anew for every activation would slow a processor down."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def _set_malloc(wanted: _Malloc) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(_M_MMAP_THRESHOLD, wanted.own_bytes)
        mallopt(_M_TRIM_THRESHOLD, wanted.kept_bytes)


def peak_vram_bytes(device: str) -> int:
    """What torch's allocator has taken of the device at most, without the driver's context; 0 on the CPU."""
    torch, kind = sys.modules.get("torch"), device.partition(":")[0]
    if torch is None:
        return 0
    if kind in ("cuda", "xpu"):
        return int(getattr(torch, kind).max_memory_reserved(device))
    return int(torch.mps.driver_allocated_memory()) if kind == "mps" else 0


def peak_ram_bytes(status: Path = Path("/proc/self/status")) -> int | None:
    """The most RAM that this process has had; None where the system does not tell."""
    try:
        # Not `ru_maxrss`, which Linux begins with that of the process that started this one.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return _peak_elsewhere()


def _peak_elsewhere() -> int | None:
    import psutil  # noqa: PLC0415 — only on systems without /proc

    peak = getattr(psutil.Process().memory_info(), "peak_wset", None)  # Windows
    if peak is None and sys.platform == "darwin":
        import resource  # noqa: PLC0415 — not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if peak else None
