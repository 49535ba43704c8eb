"""Compiling blocks so that what brings their weights stays outside.

What was compiled belongs to the process, not to a plan: it serves the next one too, if that is for the same.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import nn

from autoflux.hardware.kernels import runs_kernels

RECOMPILATIONS = 64
"""Most compilations of one kind of block. At torch's limit of 8 a picture would break off: FLUX's single blocks are
given tensors that lie in two ways, in batches of one and of several, of one size and then of any, and each of these is
compiled by itself."""

_purpose: Hashable = None
"""What blocks were last compiled for."""


def compile_for(purpose: Hashable) -> None:
    """Let go of what was compiled for anything else.

    What was compiled for one way of attention may serve no plan with another, and torch does not ask. What was compiled
    for one size is compiled for any size when another comes, and is slower then.
    """
    global _purpose  # noqa: PLW0603 — torch's own is the process's too
    if _purpose not in (None, purpose):
        torch.compiler.reset()
    _purpose = purpose


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
