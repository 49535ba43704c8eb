"""Rotary positions: each pair of a head's numbers turned by an angle that its token's position says. Imports torch.

It is here because the probe times blocks as they are computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoflux.hardware.kernels import kernels, launching_on, runs_kernels

_KERNEL = kernels("autoflux.hardware.rotation_kernel")


def rotates(x: Tensor) -> bool:
    """Whether `rotate` can turn it; who asks does it in another way if not. Never while compiling, which fuses it."""
    there = _KERNEL is not None and x.is_cuda and not torch.compiler.is_compiling()
    return there and x.stride(-1) == 1 and runs_kernels(x.device)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """(batch, tokens, heads, width) turned by angles whose cosines and sines are (tokens, width / 2), in float32.

    The numbers of a pair lie side by side. They are multiplied and added in float32, each result rounded, and the sum
    rounded to x's format: the same bits as in diffusers and DiffSynth. Their eight operations, on copies in float32,
    read and write 740 MB for the queries of FLUX.1 at 1024x1024, and this kernel 57.
    """
    with launching_on(x.device):
        turned: Tensor = _KERNEL.rotate_pairs(x, cosine, sine)
    return turned
