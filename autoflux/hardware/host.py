"""The computer around the accelerators: memory and cores that this process may really use."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import psutil

from autoflux.hardware import cgroup
from autoflux.hardware.values import Host, Size, Source
from autoflux.units import GIB

PINNABLE_SHARE = 0.75
"""Share of the available RAM that is counted as pinnable: pinned pages cannot be swapped out, and the rest of the
system must live on what is left. A cautious convention, not a measurement."""

WINDOWS_PINNABLE_SHARE = 0.5
"""Windows (WDDM) lets devices share at most half of the RAM."""


def read(root: Path = Path("/")) -> Host:
    """Everything about the host that needs no measuring."""
    total, available = _physical_memory()
    limits = cgroup.memory_limits(root)
    limit = container_limit(total.value, limits)
    available = _within(available, limits)
    return Host(
        system=system(),
        processor=processor(root),
        cores=cores(root),
        total_bytes=_capped(total, limit),
        available_bytes=available,
        container_limit_bytes=limit,
        pinnable_bytes=pinnable(available.value, windows=sys.platform == "win32"),
    )


def container_limit(total_bytes: int, limits: list[cgroup.MemoryLimit]) -> int | None:
    """The tightest limit, if it is below what the machine has anyway."""
    tightest = min((limit.limit for limit in limits), default=total_bytes)
    return tightest if tightest < total_bytes else None


def cores(root: Path = Path("/")) -> int:
    """Whole processors' worth of time: those this process may run on, and no more than the container's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup.cpu_quota(root)
    return max(1, min(allowed, int(quota)) if quota else allowed)


def processor(root: Path = Path("/")) -> str:
    """The processor's product name as far as the system tells it."""
    name = _cpuinfo_name(root) if sys.platform == "linux" else _sysctl_name() if sys.platform == "darwin" else ""
    return name or platform.processor() or platform.machine()


def system() -> str:
    """`Linux 6.8 x86_64`."""
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def is_wddm() -> bool:
    """Whether device memory is managed by Windows: there, and in its Linux subsystem."""
    return sys.platform == "win32" or "microsoft" in platform.release().lower()


def pinnable(available_bytes: int, *, windows: bool) -> Size:
    """How much RAM can be locked for fast copies. cudaHostAlloc is not held to the memory-lock limit (ulimit -l)."""
    share = WINDOWS_PINNABLE_SHARE if windows else PINNABLE_SHARE
    return Size(value=int(available_bytes * share), source=Source.ASSUMED, note=f"{share:.0%} of available RAM")


def _physical_memory() -> tuple[Size, Size]:
    try:
        memory = psutil.virtual_memory()
    except Exception as error:  # noqa: BLE001 — psutil reads many files; without them we still have to say something
        guess = Size(value=4 * GIB, source=Source.ASSUMED, note=f"the system does not tell: {error}")
        return guess, guess.replace(value=2 * GIB)
    return (
        Size(value=int(memory.total), source=Source.REPORTED),
        Size(value=int(memory.available), source=Source.REPORTED),
    )


def _capped(total: Size, limit: int | None) -> Size:
    return total.replace(value=limit, note="container's limit") if limit else total


def _within(available: Size, limits: list[cgroup.MemoryLimit]) -> Size:
    free = min((limit.free for limit in limits), default=available.value)
    return available.replace(value=free, note="container's limit") if free < available.value else available


def _cpuinfo_name(root: Path) -> str:
    try:
        lines = (root / "proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _sysctl_name() -> str:
    command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
