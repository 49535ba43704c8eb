"""Rotary positions in one pass over memory. Importing this needs Triton, which not all systems have."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_PAIRS = 2048
"""That one program turns: 16 in each of 128 threads."""


def rotate_pairs(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """(batch, tokens, heads, width), of which the last lie side by side, turned by (tokens, width / 2) angles."""
    batch, tokens, heads, width = x.shape
    turned = torch.empty_like(x)
    pairs = heads * width // 2
    block = min(MOST_PAIRS, 1 << (pairs - 1).bit_length())
    _rotate_token[(tokens, batch, -(-pairs // block))](
        x,
        turned,
        cosine,
        sine,
        pairs,
        *x.stride()[:3],
        *turned.stride()[:3],
        *cosine.stride(),
        *sine.stride(),
        HALF=width // 2,
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=False,  # which would leave out a rounding
    )
    return turned


@triton.jit  # type: ignore[untyped-decorator]
def _rotate_token(  # type: ignore[no-untyped-def]  # noqa: ANN202, PLR0913, PLR0917 — Triton has its own types
    x,  # noqa: ANN001
    turned,  # noqa: ANN001
    cosine,  # noqa: ANN001
    sine,  # noqa: ANN001
    pairs,  # noqa: ANN001
    x_batch,  # noqa: ANN001
    x_token,  # noqa: ANN001
    x_head,  # noqa: ANN001
    turned_batch,  # noqa: ANN001
    turned_token,  # noqa: ANN001
    turned_head,  # noqa: ANN001
    cosine_token,  # noqa: ANN001
    cosine_pair,  # noqa: ANN001
    sine_token,  # noqa: ANN001
    sine_pair,  # noqa: ANN001
    HALF: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    token = tl.program_id(0).to(tl.int64)  # of many pictures the last numbers are beyond 2^31
    batch = tl.program_id(1).to(tl.int64)
    number = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    head, pair = number // HALF, number % HALF
    inside = number < pairs
    both = tl.arange(0, 2)[None, :]
    at = x + batch * x_batch + token * x_token + (head * x_head + 2 * pair)[:, None] + both
    even, odd = tl.split(tl.load(at, mask=inside[:, None], other=0.0).to(tl.float32))
    c = tl.load(cosine + token * cosine_token + pair * cosine_pair, mask=inside, other=0.0)
    s = tl.load(sine + token * sine_token + pair * sine_pair, mask=inside, other=0.0)
    made = tl.join(even * c - odd * s, odd * c + even * s).to(turned.dtype.element_ty)
    to = turned + batch * turned_batch + token * turned_token + (head * turned_head + 2 * pair)[:, None] + both
    tl.store(to, made, mask=inside[:, None])
