"""What a machine can do at best: how fast its link copies and its card multiplies."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
import torch

GB = 1e9


class Ceilings(msgspec.Struct, kw_only=True):
    """What this machine can do at best."""

    link_gb_per_s: float
    link_while_computing_gb_per_s: float
    """The link again, while the card multiplies: what it copies beside its work may be slower."""
    tflops: dict[str, float]


def measure_ceilings(device: torch.device, *, tiny: bool) -> Ceilings:
    """The link with large pinned copies, and square matrix products of half a second each."""
    if device.type != "cuda":
        return Ceilings(link_gb_per_s=5.0, link_while_computing_gb_per_s=5.0, tflops={})
    from autoflux.runtime.pinned import PinnedBuffer

    nbytes = 1 << (26 if tiny else 30)
    source, target = PinnedBuffer(nbytes, device), torch.empty(nbytes, dtype=torch.uint8, device=device)
    link = nbytes / GB / min(timed(lambda: target.copy_(source.tensor, non_blocking=True)) for _ in range(6))
    side = 8192
    wide = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    narrow, whole = wide.to(torch.float8_e4m3fn), (wide * 40).clamp(-127, 127).to(torch.int8)
    ones = torch.ones(side, 1, device=device)
    products: dict[str, Callable[[], torch.Tensor]] = {
        "bfloat16": lambda: wide @ wide,
        "float8_e4m3fn": lambda: torch._scaled_mm(  # noqa: SLF001
            narrow, narrow.t(), scale_a=ones, scale_b=ones.t(), out_dtype=torch.bfloat16, use_fast_accum=True
        ),
        "int8": lambda: torch._int_mm(whole, whole.t()),  # noqa: SLF001
    }
    return Ceilings(
        link_gb_per_s=link,
        link_while_computing_gb_per_s=busy_link(source.tensor, target, products["bfloat16"]),
        tflops={name: sustained(product, side) for name, product in products.items()},
    )


def busy_link(
    source: torch.Tensor, target: torch.Tensor, product: Callable[[], torch.Tensor], copies: int = 8
) -> float:
    """GB/s of copies on a stream of their own, between two moments at which the card multiplies."""
    timed(product)
    once = timed(product)
    lane = torch.cuda.Stream()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    lane.wait_stream(torch.cuda.current_stream())
    for _ in range(3):
        product()
    with torch.cuda.stream(lane):
        target.copy_(source, non_blocking=True)  # the products are under way when this one ends
        begin.record()
        for _ in range(copies):
            target.copy_(source, non_blocking=True)
        end.record()
    # Twice as long as the copies would take at 50 GB/s.
    for _ in range(int(2 * (copies + 1) * source.numel() / 50e9 / once)):
        product()
    torch.cuda.synchronize()
    return copies * source.numel() / GB / (begin.elapsed_time(end) / 1e3)


def sustained(product: Callable[[], torch.Tensor], side: int) -> float:
    """TFLOP/s over half a second, after which a card runs at the clock that it can keep."""
    timed(product)
    once = timed(product)
    count = max(5, int(0.5 / once))
    seconds = timed(lambda: [product() for _ in range(count)][-1])
    return count * 2 * side**3 / seconds / 1e12


def timed(work: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began
