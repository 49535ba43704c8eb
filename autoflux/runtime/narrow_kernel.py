"""Rows of activations to one byte a number, each read once. Importing this needs Triton, which not all systems have."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_ROW = 32768
"""Numbers of a row that one program can hold in registers: 64 in each of 512 threads."""

NUMBERS_A_WARP = 1024
"""How many of them a warp gets, as long as there are no more than 16 warps: 32 in each of its threads."""

HALFWAY: tl.constexpr = tl.constexpr(1.5 * 2**23)
"""A float32 below 2^22 to which this is added, and taken away again, is the nearest integer, of two the even one."""


def narrow_rows(x: Tensor, dtype: torch.dtype, largest: float, smallest_scale: float) -> tuple[Tensor, Tensor]:
    """(rows, in) to `dtype` (rows, in) and float32 scales (rows, 1), so that each row's largest becomes `largest`.

    The numbers of a row lie side by side, and are `LARGEST_ROW` at most. No scale is below `smallest_scale`.
    """
    rows, columns = x.shape
    narrow = torch.empty((rows, columns), dtype=dtype, device=x.device)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    block = 1 << (columns - 1).bit_length()
    _narrow_row[(rows,)](
        x,
        narrow,
        scale,
        columns,
        x.stride(0),
        LARGEST=largest,
        SMALLEST_SCALE=smallest_scale,
        BLOCK=block,
        num_warps=max(4, min(16, block // NUMBERS_A_WARP)),
    )
    return narrow, scale


@triton.jit  # type: ignore[untyped-decorator]
def _narrow_row(  # type: ignore[no-untyped-def]  # noqa: ANN202 — what Triton compiles has its types, not Python's
    x,  # noqa: ANN001
    narrow,  # noqa: ANN001
    scale,  # noqa: ANN001
    columns,  # noqa: ANN001
    stride,  # noqa: ANN001
    LARGEST: tl.constexpr,  # noqa: N803 — constants, as inductor takes a float given at run time for a float64
    SMALLEST_SCALE: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0).to(tl.int64)  # of many rows the last numbers are beyond 2^31
    at = tl.arange(0, BLOCK)
    inside = at < columns
    numbers = tl.load(x + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    # By their bits, in which what is not a number is the largest: a maximum of floats would leave it out.
    bits = tl.max(tl.abs(numbers).to(tl.int32, bitcast=True), axis=0)
    row_scale = bits.to(tl.float32, bitcast=True) / LARGEST
    factor = tl.maximum(row_scale, SMALLEST_SCALE, propagate_nan=tl.PropagateNan.ALL)
    # Division by number would take longer than the memory does. This is off by 2^-23 at most, and rows by 2^-5.
    scaled = numbers * (1.0 / factor)
    if narrow.dtype.element_ty == tl.int8:
        scaled = (scaled + HALFWAY) - HALFWAY
    tl.store(narrow + row * columns + at, scaled.to(narrow.dtype.element_ty), mask=inside)
    tl.store(scale + row, factor)
