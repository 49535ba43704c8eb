"""Training steps recorded as CUDA graphs: small networks spend more time on launching kernels than on running them."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

EAGER_CALLS = 3
"""Calls before a step is recorded: kernels are chosen, blocks compiled and the optimizer's memory taken in them."""


class Replayed:
    """A step that draws its own random numbers on the device, has no inputs, and returns its loss.

    Steps of one `pool` share the memory of their activations, so they must not run at the same time. What cannot be
    recorded is called as it is.
    """

    def __init__(self, step: Callable[[], Tensor], pool: object | None = None) -> None:
        self._step = step
        self._pool = pool
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._loss: Tensor | None = None

    def __call__(self) -> Tensor:
        """Take one step; the loss holds until the next step of any kind."""
        self._calls += 1
        if self._calls == EAGER_CALLS + 1 and torch.cuda.is_available():
            self._record()
        if self._graph is None or self._loss is None:
            return self._step()
        self._graph.replay()
        return self._loss

    def _record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph, pool=self._pool):  # type: ignore[arg-type]
                self._loss = self._step()
        except RuntimeError as error:
            torch.cuda.synchronize()
            sys.stderr.write(f"a step is not recorded: {str(error).splitlines()[0]}\n")
            return
        self._graph = graph


def shared_pool() -> object | None:
    """A pool for steps that take turns; None without CUDA."""
    return torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
