"""Muon for the weight matrices of a transformer's blocks: momentum made orthogonal before it is applied.

Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), with the scale of Liu et al.,
"Muon is Scalable for LLM Training" (2025), by which one learning rate suits it and AdamW. Matrices of one shape are
orthogonalized together, and the rate is a tensor, so that a step can be recorded as a CUDA graph; `torch.optim.Muon`
does neither.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MOMENTUM = 0.95
ITERATIONS = 5
_QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the Newton-Schulz iteration, from the first of the sources."""
_LIKE_ADAM = 0.2
"""Root mean square of AdamW's updates, from the second source."""


class Muon:
    """Updates matrices; `rate` is a tensor that others may change between steps."""

    def __init__(self, matrices: Sequence[Tensor], rate: Tensor, *, weight_decay: float) -> None:
        self._rate = rate
        self._decay = weight_decay
        shapes = dict.fromkeys(matrix.shape for matrix in matrices)
        self._groups = [[matrix for matrix in matrices if matrix.shape == shape] for shape in shapes]
        self._momenta = [torch.zeros_like(torch.stack(group)) for group in self._groups]

    @torch.no_grad()
    def step(self) -> None:
        """Take one step along the matrices' gradients, which must all be there."""
        for group, momentum in zip(self._groups, self._momenta, strict=True):
            gradients = torch.stack([matrix.grad for matrix in group if matrix.grad is not None])
            momentum.lerp_(gradients, 1 - MOMENTUM)
            ahead = torch.lerp(gradients, momentum, MOMENTUM)
            size = _LIKE_ADAM * max(group[0].shape) ** 0.5
            updates = (orthogonal(ahead) * (size * self._rate)).unbind()
            torch._foreach_mul_(group, 1 - self._decay * self._rate)
            torch._foreach_sub_(group, list(updates))


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (count, rows, columns) with singular values all near 1 and the same singular vectors."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    wide = matrices.mT if tall else matrices
    # Processors multiply bf16 slowly.
    x: Tensor = (wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(torch.bfloat16 if wide.is_cuda else None)
    a, b, c = _QUINTIC
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT.to(matrices.dtype) if tall else x.to(matrices.dtype)
