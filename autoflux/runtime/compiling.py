"""Compiling blocks so that what brings their weights stays outside."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from autoflux.hardware.kernels import runs_kernels

RECOMPILATIONS = 64
"""Most compilations of one kind of block. At torch's limit of 8 a picture would break off: FLUX's single blocks are
given tensors that lie in two ways, in batches of one and of several, of one size and then of any, and each of these is
compiled by itself."""


def compile_blocks(blocks: Iterable[nn.Module], **options: Any) -> Callable[[], None]:
    """Compile the `forward` of each block; returns what undoes it.

    `Module.compile` would trace the hooks as well. Blocks of one class share one compilation: their weights are inputs
    of the graph. `options` are those of `torch.compile`.
    """
    torch.compiler.assume_constant_result(runs_kernels)  # type: ignore[no-untyped-call]
    config = torch._dynamo.config  # noqa: SLF001 — where torch's documentation of recompilations says it is set
    config.recompile_limit = max(config.recompile_limit, RECOMPILATIONS)
    done: list[nn.Module] = []
    for block in blocks:
        block.forward = torch.compile(block.forward, **{"fullgraph": True, **options})
        done.append(block)

    def undo() -> None:
        for block in done:
            del block.forward

    return undo
