"""Times copies between host and device, inside the host, and how long memory takes to be pinned."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from autoflux.hardware.device import Device, Findings, measured
from autoflux.hardware.pages import own_pages
from autoflux.hardware.timing import Call, keep_busy, round_seconds
from autoflux.hardware.values import DeviceKind, Figure, Transfer
from autoflux.units import KIB, MIB

COPY_BYTES = (256 * KIB, 1 * MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB)
"""From the smallest piece worth streaming to beyond a FLUX double block in 8 bits (340 MB)."""

WAKE_SECONDS = 0.3
"""An idle card sits in a low-power link state and its clocks are down. On one H200 (PCIe 5 x16) both are up in less."""

COPY_ROUNDS = 3
COPY_SECONDS = 0.1
"""No new round of one size and direction is begun after this: all 24 of them take some 3 s."""

LARGEST_COPY_SECONDS = 0.25
"""A larger copy is timed only if it will take less than this; on a slow link the smaller ones have reached its rate."""

PIN_BYTES = 256 * MIB
PIN_ROUNDS = 3


def transfers(
    device: Device,
    free_bytes: int,
    host_bytes: int,
    findings: Findings,
    *,
    largest_seconds: float = LARGEST_COPY_SECONDS,
) -> list[Transfer]:
    """Both directions, from pinned and from pageable memory, by size of the copy."""
    # A quarter of what the card has free and an eighth of the RAM: measuring must not push others out of memory.
    largest = min(free_bytes // 4, host_bytes // 8, COPY_BYTES[-1])
    sizes = [size for size in COPY_BYTES if size <= largest]
    found: list[Transfer] = []
    for memory, pinned in (("pinned", True), ("pageable", False)):
        action = partial(_curve, device, sizes, largest_seconds, pinned=pinned)
        found += findings.attempt(f"{memory} copies", action) or []
    return found


def _curve(device: Device, sizes: list[int], largest_seconds: float, *, pinned: bool) -> list[Transfer]:
    if not sizes:
        return []
    torch = device.torch
    host = torch.ones(sizes[-1], dtype=torch.uint8, pin_memory=pinned)  # written, so that its pages are there
    card = torch.empty(sizes[-1], dtype=torch.uint8, device=device.name)
    awake = min(16 * MIB, sizes[-1])
    keep_busy(partial(card[:awake].copy_, host[:awake], non_blocking=pinned), device.synchronize, WAKE_SECONDS)
    found: list[Transfer] = []
    for size in sizes:
        if found and _seconds(found[-1]) * size / found[-1].block_bytes > largest_seconds:
            break
        found.append(_transfer(device, host[:size], card[:size], pinned=pinned))
    return found


def _seconds(copied: Transfer) -> float:
    rate = min(copied.to_device_gb_per_s.value, copied.to_host_gb_per_s.value)
    return copied.block_bytes / 1e9 / rate


def _transfer(device: Device, host: Any, card: Any, *, pinned: bool) -> Transfer:
    return Transfer(
        block_bytes=host.numel(),
        pinned=pinned,
        to_device_gb_per_s=_copy_rate(card, host, device.synchronize, pinned=pinned),
        to_host_gb_per_s=_copy_rate(host, card, device.synchronize, pinned=pinned),
    )


def _copy_rate(target: Any, source: Any, synchronize: Call, *, pinned: bool) -> Figure:
    copy = partial(target.copy_, source, non_blocking=pinned)
    taken = round_seconds(copy, synchronize, rounds=COPY_ROUNDS, budget_seconds=COPY_SECONDS)
    return measured(source.numel() / min(taken) / 1e9, f"best of {len(taken)}")


def host_copy_rate(torch: Any, host_bytes: int) -> Figure:
    """Rate of copying inside the RAM, in 10^9 bytes a second."""
    count = max(MIB, min(256 * MIB, host_bytes // 8))
    source, target = torch.ones(count, dtype=torch.uint8), torch.zeros(count, dtype=torch.uint8)
    taken = round_seconds(partial(target.copy_, source), _nothing)
    return measured(count / min(taken) / 1e9, "bytes copied, each read once and written once")


def pin_seconds_per_gb(device: Device, host_bytes: int) -> Figure | None:
    """How long pages take to be found and registered with CUDA's driver, as the engine does it; None elsewhere.

    Raises:
        RuntimeError: the driver refused.
    """
    if device.kind != DeviceKind.CUDA:
        return None
    runtime = device.torch.cuda.cudart()
    device.synchronize()  # the context, if there is none yet, is not what is timed

    def register(address: int, nbytes: int) -> None:
        if status := int(runtime.cudaHostRegister(address, nbytes, 0)):
            # CUDA keeps the error and torch raises it at the next kernel: let this be the one.
            with contextlib.suppress(RuntimeError):
                device.torch.empty(1, device=device.name).fill_(1)
            raise RuntimeError(f"cudaHostRegister refused {nbytes} bytes with error {status}")

    nbytes = max(MIB, min(PIN_BYTES, host_bytes // 8))
    return pinning_seconds_per_gb(device.torch, nbytes, register, runtime.cudaHostUnregister)


def pinning_seconds_per_gb(
    torch: Any, nbytes: int, register: Callable[[int, int], object], unregister: Callable[[int], object]
) -> Figure:
    """The same with any driver, given as what takes (address, bytes) and what takes the address back."""
    taken = [_pin_seconds(torch, nbytes, register, unregister) for _ in range(PIN_ROUNDS)]
    return measured(min(taken) / nbytes * 1e9, f"best of {len(taken)} of {nbytes // MIB} MiB")


def _pin_seconds(
    torch: Any, nbytes: int, register: Callable[[int, int], object], unregister: Callable[[int], object]
) -> float:
    pages = torch.frombuffer(own_pages(nbytes), dtype=torch.uint8)  # new ones each time: finding them is most of it
    begun = time.perf_counter()
    register(pages.data_ptr(), nbytes)
    seconds = time.perf_counter() - begun
    unregister(pages.data_ptr())
    return seconds


def _nothing() -> None:
    pass
