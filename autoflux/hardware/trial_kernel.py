"""A kernel to see whether any runs. Importing this needs Triton, which not all systems have."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def write_one(to: Tensor) -> None:
    """Into a tensor of float32."""
    _write_one[(1,)](to)


@triton.jit
def _write_one(to):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202 — Triton has its own types
    tl.store(to, 1.0)
