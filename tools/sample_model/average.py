"""Exponential moving average of weights, and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

WARM_UP_STEPS = 300


class MovingAverage:
    """Averaged parameters of a network; early on it follows faster, so that the start is forgotten."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.values = [p.detach().clone() for p in network.parameters()]

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move towards the network's present weights."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.values, [p.detach() for p in network.parameters()], 1 - decay)

    @torch.no_grad()
    def copy_to(self, network: nn.Module) -> None:
        """Write the averages into a network of the same shape."""
        for parameter, value in zip(network.parameters(), self.values, strict=True):
            parameter.copy_(value)


def learning_rate(step: int, share: float) -> float:
    """Share of the peak rate: a linear warm-up in steps, then half a cosine over the share of the time used."""
    return min(1.0, (step + 1) / WARM_UP_STEPS) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(share, 1.0))))
