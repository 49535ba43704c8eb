"""Batches for training the transformer: latents with noise, the text that goes with them, and positions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tools.sample_model.networks import SHIFT

TEXT_LENGTHS = (*(64,) * 19, 512)
"""Prompt lengths in training: the pipeline pads with tokens that are seen, so each length has to be learned."""

MAIN_SIZE_SHARE = 0.9


@dataclass(frozen=True)
class Latents:
    """Scenes of one picture size: `latents` (scenes, 16, h, w), token ids (scenes, captions, tokens)."""

    latents: Tensor
    clip_ids: Tensor
    t5_ids: Tensor


@dataclass(frozen=True)
class Noisy:
    """Packed latents (batch, tokens, 64) with noise of level sigma (batch,), and their positions (tokens, 3)."""

    latents: Tensor
    sigma: Tensor
    image_ids: Tensor


@dataclass(frozen=True)
class Batch:
    """Packed latents (batch, tokens, 64), noise like them, noise level (batch,), text, and positions."""

    clean: Tensor
    noise: Tensor
    sigma: Tensor
    clip_ids: Tensor
    t5_ids: Tensor
    image_ids: Tensor

    def at(self, sigma: Tensor) -> Noisy:
        """The latents with noise of those levels (batch,)."""
        share = sigma[:, None, None]
        return Noisy((1 - share) * self.clean + share * self.noise, sigma, self.image_ids)

    @property
    def noisy(self) -> Noisy:
        return self.at(self.sigma)

    @property
    def velocity(self) -> Tensor:
        return self.noise - self.clean


class Shape(NamedTuple):
    """The number of a set of latents, and how many text tokens go with it."""

    number: int
    text_tokens: int


class Sampler:
    """Draws batches of one size and text length at a time; the first set of latents is drawn most."""

    def __init__(self, sets: Sequence[Latents], empty: tuple[Tensor, Tensor], batch: int, seed: int) -> None:
        self.sets, self.empty, self.batch = sets, empty, batch
        self.rng = random.Random(seed)
        self.device = sets[0].latents.device

    def choose(self) -> Shape:
        """What the next batch is like."""
        number = 0 if self.rng.random() < MAIN_SIZE_SHARE else self.rng.randrange(len(self.sets))
        # Each pair of a size and a length is compiled anew, so the rarer sizes come with the usual length only.
        return Shape(number, TEXT_LENGTHS[0] if number else self.rng.choice(TEXT_LENGTHS))

    def draw(self, shape: Shape, *, empty_share: float) -> Batch:
        """A batch of that shape, drawn on the device without waiting for it."""
        data = self.sets[shape.number]
        area = data.latents[0, 0].numel() / self.sets[0].latents[0, 0].numel()
        count = int(self.batch / max(1.0, area))
        index = torch.randint(len(data.latents), (count,), device=self.device)
        variant = torch.randint(data.clip_ids.shape[1], (count,), device=self.device)
        clip_ids, t5_ids = data.clip_ids[index, variant].long(), data.t5_ids[index, variant].long()
        empty = torch.rand(count, 1, device=self.device) < empty_share
        clip_ids = torch.where(empty, self.empty[0], clip_ids)
        t5_ids = torch.where(empty, self.empty[1], t5_ids)
        clean = pack(data.latents[index].float())
        return Batch(
            clean=clean,
            noise=torch.randn_like(clean),
            sigma=_noise_levels(count, self.device),
            clip_ids=clip_ids,
            t5_ids=nn.functional.pad(t5_ids, (0, shape.text_tokens - t5_ids.shape[1])),
            image_ids=image_positions(data.latents),
        )


def pack(latents: Tensor) -> Tensor:
    """(batch, channels, h, w) to (batch, h/2 * w/2, 4 * channels), as FLUX's pipeline does."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, (height // 2) * (width // 2), channels * 4)


def image_positions(latents: Tensor) -> Tensor:
    """(h/2 * w/2, 3): zero, row and column of each image token of latents (batch, channels, h, w)."""
    height, width, device = latents.shape[-2] // 2, latents.shape[-1] // 2, latents.device
    grid = torch.zeros(height, width, 3, device=device)
    grid[..., 1] = torch.arange(height, device=device)[:, None]
    grid[..., 2] = torch.arange(width, device=device)[None]
    return grid.view(-1, 3)


def shifted(level: Tensor) -> Tensor:
    """Noise levels of even steps from 1 to 0, as the sampler's schedule has them."""
    return SHIFT * level / (1 + (SHIFT - 1) * level)


def _noise_levels(count: int, device: torch.device) -> Tensor:
    """Mostly logit-normal, a tenth uniform, then shifted like the sampler's schedule."""
    level = torch.where(
        torch.rand(count, device=device) < 0.9,
        torch.sigmoid(torch.randn(count, device=device)),
        torch.rand(count, device=device),
    )
    return shifted(level)
