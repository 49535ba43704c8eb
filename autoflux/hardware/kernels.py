"""Which devices run kernels of our own, and the kernels that there are. Imports torch."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from autoflux.hardware.values import LEAST_KERNEL_CAPABILITY

_log = logging.getLogger(__name__)


def kernels(name: str) -> Any:
    """The module of that name, which imports Triton; None where no kernel can run."""
    if not torch.cuda.is_available() or torch.version.hip or find_spec("triton") is None:
        return None
    try:
        return import_module(name)
    except Exception as error:  # noqa: BLE001 — a Triton that is not for this system fails in many ways
        _log.warning("Triton cannot be imported, and torch's own operations are used: %s", error)
        return None


def runs_kernels(device: torch.device) -> bool:
    """Whether it runs what Triton compiles; always the same of a device, as compilers may be told.

    One is tried, because Triton also wants a C compiler for what launches its kernels.
    """
    runs = _RUNS_KERNELS.get(device)
    if runs is None:
        runs = torch.cuda.get_device_capability(device) >= LEAST_KERNEL_CAPABILITY and _is_tried(device)
        _RUNS_KERNELS[device] = runs
    return runs


def _is_tried(device: torch.device) -> bool:
    trial = kernels("autoflux.hardware.trial_kernel")
    if trial is None:
        return False
    try:
        with launching_on(device):
            trial.write_one(torch.zeros(1, device=device))
    except Exception as error:  # noqa: BLE001 — whatever it is, torch's own operations do without
        _log.warning("kernels of our own do not run on %s, and torch's own operations are used: %s", device, error)
        return False
    return True


def launching_on(device: torch.device) -> AbstractContextManager[None]:
    """Triton launches on the current device, whatever it is given."""
    here = device.index == torch.cuda.current_device()
    context: AbstractContextManager[None] = nullcontext() if here else torch.cuda.device(device)
    return context


_RUNS_KERNELS: dict[torch.device, bool] = {}
