"""Which devices run kernels of our own, and the kernels that there are. Imports torch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

LEAST_KERNEL_CAPABILITY = (8, 0)
"""The oldest cards that Triton supports, by its README."""


def kernels(name: str) -> Any:
    """The module of that name, which imports Triton; None where no kernel can run."""
    return import_module(name) if torch.cuda.is_available() and find_spec("triton") else None


def runs_kernels(device: torch.device) -> bool:
    """Whether it runs what Triton compiles; always the same of a device, as compilers may be told."""
    runs = _RUNS_KERNELS.get(device)
    if runs is None:
        runs = torch.version.hip is None and torch.cuda.get_device_capability(device) >= LEAST_KERNEL_CAPABILITY
        _RUNS_KERNELS[device] = runs
    return runs


def launching_on(device: torch.device) -> AbstractContextManager[None]:
    """Triton launches on the current device, whatever it is given."""
    here = device.index == torch.cuda.current_device()
    context: AbstractContextManager[None] = nullcontext() if here else torch.cuda.device(device)
    return context


_RUNS_KERNELS: dict[torch.device, bool] = {}
