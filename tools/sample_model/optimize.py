"""The loop that every stage of the transformer's training shares: a loss, minimized until its time is over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tools.sample_model.average import MasterWeights, MovingAverage
from tools.sample_model.batches import Shape
from tools.sample_model.ranks import Clock
from tools.sample_model.replay import Replayed, shared_pool

AVERAGED = 0.9995
MILESTONE = 0.3
"""Share of the training after which the weights so far are written."""


@dataclass(frozen=True)
class Task:
    """What to minimize, how fast, and of which shape the next batch is.

    `loss` draws its batch itself, because steps are recorded and replayed without inputs.
    """

    choose: Callable[[], Shape]
    loss: Callable[[Shape], Tensor]
    peak_rate: float


def optimize(trained: nn.Module, task: Task, minutes: float, on_milestone: Callable[[], None] = lambda: None) -> None:
    """Train for that long; leaves the averaged weights in `trained`."""
    weights = MasterWeights(trained, task.peak_rate, weight_decay=0.01, by_muon=_is_hidden)
    average = MovingAverage(weights.master, AVERAGED)
    steps: dict[Shape, Replayed] = {}
    pool = shared_pool()
    clock, milestone, share = Clock(minutes), 1, 0.0
    running = torch.zeros((), device=weights.live[0].device)
    while share < 1:
        share = clock.share()
        shape = task.choose()
        if shape not in steps:
            steps[shape] = Replayed(partial(_step, task, weights, shape), pool)
        weights.schedule(share)
        loss = steps[shape]()
        average.update(weights.master)
        running.lerp_(loss, 0.02 if weights.steps > 1 else 1.0)
        if weights.steps % 500 == 1:
            told = f"loss {running.item():.4f} {clock.seconds:.0f} s"
            print(f"step {weights.steps} share {share:.2f} {told}", flush=True)
        if share > MILESTONE * milestone:
            milestone += 1
            weights.show(average.values)
            on_milestone()
            weights.show(weights.master)
    weights.show(average.values)


def _is_hidden(name: str, parameter: Tensor) -> bool:
    """Whether it is a matrix that takes tokens to tokens inside a block of the transformer."""
    return parameter.ndim == 2 and "transformer_blocks" in name and "norm" not in name


def _step(task: Task, weights: MasterWeights, shape: Shape) -> Tensor:
    loss = task.loss(shape)
    weights.step(loss)
    return loss.detach()
