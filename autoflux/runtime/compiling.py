"""Compiling blocks so that what brings their weights stays outside."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def compile_blocks(blocks: Iterable[nn.Module], **options: Any) -> Callable[[], None]:
    """Compile the `forward` of each block; returns what undoes it.

    `Module.compile` would trace the hooks as well. Blocks of one class share one compilation: their weights are inputs
    of the graph. `options` are those of `torch.compile`.
    """
    done: list[nn.Module] = []
    for block in blocks:
        block.forward = torch.compile(block.forward, **{"fullgraph": True, **options})
        done.append(block)

    def undo() -> None:
        for block in done:
            del block.forward

    return undo
