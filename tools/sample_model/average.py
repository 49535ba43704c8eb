"""Weights in full precision behind a bf16 network, their moving average, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import compress

import torch
from torch import Tensor, nn

from tools.sample_model.muon import Muon
from tools.sample_model.ranks import share_first, take_mean

WARM_UP_STEPS = 300
LARGEST_GRADIENT = 1.0


class MasterWeights:
    """Trains a network that computes in bf16 through float32 copies of its parameters.

    With AdamW, but for those that `by_muon` names, which Muon trains.
    """

    def __init__(
        self,
        network: nn.Module,
        peak_rate: float,
        *,
        weight_decay: float,
        by_muon: Callable[[str, Tensor], bool] = lambda _name, _parameter: False,
    ) -> None:
        named = dict(network.named_parameters())
        self.live: list[Tensor] = list(named.values())
        share_first(self.live)
        self.master = [p.detach().float().clone().requires_grad_() for p in self.live]
        self.peak_rate = peak_rate
        self.steps = 0
        on_card = self.live[0].is_cuda
        self._rate = torch.zeros((), device=self.live[0].device)
        chosen = [by_muon(name, parameter) for name, parameter in named.items()]
        self._muon = Muon(list(compress(self.master, chosen)), self._rate, weight_decay=weight_decay)
        self.optimizer = torch.optim.AdamW(
            [master for master, is_chosen in zip(self.master, chosen, strict=True) if not is_chosen],
            # A tensor, so that steps that are replayed follow the schedule too.
            lr=self._rate if on_card else peak_rate,
            betas=(0.9, 0.98),
            weight_decay=weight_decay,
            fused=on_card,
            capturable=on_card,
        )

    def schedule(self, share: float) -> None:
        """Set the rate of the next update; `share` is how much of the training is over."""
        rate = self.peak_rate * learning_rate(self.steps, share)
        self._rate.fill_(rate)
        if not self._rate.is_cuda:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
        self.steps += 1

    def step(self, loss: Tensor) -> None:
        """One update, at the rate that was scheduled. Never waits for the device."""
        torch.autograd.backward(loss)
        for master, live in zip(self.master, self.live, strict=True):
            master.grad = None if live.grad is None else live.grad.float()
            live.grad = None
        take_mean([master.grad for master in self.master if master.grad is not None])
        nn.utils.clip_grad_norm_(self.master, LARGEST_GRADIENT)
        self.optimizer.step()
        self._muon.step()
        self.show(self.master)

    @torch.no_grad()
    def show(self, values: Iterable[Tensor]) -> None:
        """Let the network compute with these values."""
        torch._foreach_copy_(self.live, list(values))


class MovingAverage:
    """Averaged weights; early on the average follows faster, so that the start is forgotten."""

    def __init__(self, values: Iterable[Tensor], decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.values = [value.detach().clone() for value in values]

    @torch.no_grad()
    def update(self, values: Iterable[Tensor]) -> None:
        """Move towards these values."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.values, [value.detach() for value in values], 1 - decay)


def learning_rate(step: int, share: float) -> float:
    """Share of the peak rate: a linear warm-up in steps, then half a cosine over the share of the time used."""
    return min(1.0, (step + 1) / WARM_UP_STEPS) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(share, 1.0))))
