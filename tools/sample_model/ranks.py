"""Training on several GPUs: each draws batches of its own, and all step by the mean of their gradients.

`torchrun --nproc-per-node GPUS -m tools.sample_model.train` starts a process for each; without it there is one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from importlib import import_module

import torch
from torch import Tensor, distributed

FIRST = 0


def join() -> torch.device:
    """Meet the other processes, if there are any; the device of this one."""
    if "RANK" not in os.environ:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # An optimizer imports it, and it holds on to the group if there is one by then: gloo's threads would go on after
    # `leave`, and could abort the process when it ends.
    import_module("torch._dynamo")
    if not torch.cuda.is_available():
        distributed.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    # What is on processors goes by gloo, which does not wait for the device.
    distributed.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    return device


def leave() -> None:
    """Part from the others."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else FIRST


@torch.no_grad()
def share_first(weights: Sequence[Tensor]) -> None:
    """Give all processes the first one's weights."""
    if distributed.is_initialized():
        for weight in weights:
            distributed.broadcast(weight, FIRST)


@torch.no_grad()
def take_mean(gradients: Sequence[Tensor]) -> None:
    """Replace gradients by their mean over all processes. Can be recorded in a CUDA graph."""
    if not distributed.is_initialized():
        return
    joined = torch.cat([gradient.reshape(-1) for gradient in gradients])
    distributed.all_reduce(joined)
    joined /= distributed.get_world_size()
    parts = torch.split(joined, [gradient.numel() for gradient in gradients])
    torch._foreach_copy_(list(gradients), [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


class Clock:
    """How much of a stage's time is over. By the first process's clock, so that all take equally many steps."""

    def __init__(self, minutes: float) -> None:
        self._began = time.monotonic()
        self._limit = 60 * minutes

    @property
    def seconds(self) -> float:
        """Since the beginning, by this process's clock."""
        return time.monotonic() - self._began

    def share(self) -> float:
        """From 0; the stage is over at 1. All processes must ask equally often."""
        told = torch.tensor(self.seconds / self._limit, dtype=torch.float64)
        share_first([told])
        return told.item()
