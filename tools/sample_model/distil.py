"""Teaching the guidance input what classifier-free guidance gives: one pass through the transformer instead of two.

As FLUX.1-dev was made; after Meng et al., "On Distillation of Guided Diffusion Models" (CVPR 2023). It is taught where
it is needed: at the half-drawn pictures that the student itself makes, each of which moves on by one step of the
sampler in every training step, as in Ross et al., "A Reduction of Imitation Learning to No-Regret Online Learning"
(AISTATS 2011). That costs nothing, because the student's velocity is computed for the loss anyway.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from tools.sample_model.batches import Noisy, Sampler, Shape, shifted
from tools.sample_model.optimize import Task, optimize
from tools.sample_model.train_flow import NO_GUIDANCE, Forward, Networks, Text, encode_text, forward_of

STEPS, GUIDANCE = 12, 3.5
"""What the sample model asks for by itself: so many steps make a picture, and half of them have this guidance."""

GUIDANCE_RANGE = (1.0, 6.0)
USUAL_GUIDANCE = 0.5
FROM_NOISE = 0.5
"""Share of the pictures that begin at pure noise; the others begin as drawn scenes with any amount of it."""

PEAK_RATE = 2e-4


class Paths:
    """Half-drawn pictures of one shape, each with its caption, guidance and level: 1 is noise, 0 a picture.

    Everything stays where it is in memory and is written over, because steps are recorded and replayed.
    """

    def __init__(self, sampler: Sampler, shape: Shape) -> None:
        self._draw = partial(sampler.draw, shape, empty_share=0.0)
        batch = self._draw()
        self.level = torch.rand_like(batch.sigma)
        self.latents = batch.at(shifted(self.level)).latents
        self.guidance = _guidance_like(self.level)
        self.clip_ids, self.t5_ids, self.image_ids = batch.clip_ids, batch.t5_ids, batch.image_ids

    @property
    def now(self) -> Noisy:
        """The pictures as they are, safe from what happens to them next."""
        return Noisy(self.latents.clone(), shifted(self.level), self.image_ids)

    @property
    def next_level(self) -> Tensor:
        """Where each picture's stride ends; the last one may be shorter."""
        level = self.level - 1 / STEPS
        return torch.where(level < 1e-3 / STEPS, 0.0, level)

    def advance(self, velocity: Tensor) -> None:
        """Take the stride with that velocity (batch, tokens, 64); what is drawn makes room for a new picture."""
        level = self.next_level
        moved = self.latents + (shifted(level) - shifted(self.level))[:, None, None] * velocity
        batch, is_drawn = self._draw(), level == 0
        start = torch.where(torch.rand_like(level) < FROM_NOISE, 1.0, torch.rand_like(level))
        self.latents.copy_(torch.where(is_drawn[:, None, None], batch.at(shifted(start)).latents, moved))
        self.level.copy_(torch.where(is_drawn, start, level))
        self.guidance.copy_(torch.where(is_drawn, _guidance_like(level), self.guidance))
        self.clip_ids.copy_(torch.where(is_drawn[:, None], batch.clip_ids, self.clip_ids))
        self.t5_ids.copy_(torch.where(is_drawn[:, None], batch.t5_ids, self.t5_ids))


def _guidance_like(level: Tensor) -> Tensor:
    low, high = GUIDANCE_RANGE
    return torch.where(torch.rand_like(level) < USUAL_GUIDANCE, GUIDANCE, low + (high - low) * torch.rand_like(level))


def distil(
    networks: Networks, sampler: Sampler, *, minutes: float, teacher: FluxTransformer2DModel | None = None
) -> None:
    """Teach the transformer its own guided velocities; leaves the averaged weights in `networks`.

    `teacher` is what it was before, if it has been distilled in part already.
    """
    known = teacher if teacher is not None else copy.deepcopy(networks.transformer)
    forward, teach = forward_of(networks.transformer), forward_of(known.eval().requires_grad_(requires_grad=False))
    paths: dict[Shape, Paths] = {}

    def loss(shape: Shape) -> Tensor:
        if shape not in paths:
            paths[shape] = Paths(sampler, shape)
        path = paths[shape]
        now, guidance = path.now, path.guidance.clone()
        with torch.no_grad():
            text = encode_text(networks, path.clip_ids, path.t5_ids)
            target = guided_velocity(teach, now, text=text, nothing=_nothing(networks, sampler, text), scale=guidance)
        predicted = forward(now, text, guidance)
        path.advance(predicted.detach())
        # The error grows with the scale: without this, the largest would be all that is learned.
        return ((predicted - target) / guidance[:, None, None]).square().mean()

    optimize(networks.transformer, Task(sampler.choose, loss, PEAK_RATE), minutes)


def guided_velocity(teach: Forward, noisy: Noisy, *, text: Text, nothing: Text, scale: Tensor) -> Tensor:
    """Classifier-free guidance: away from what the empty caption gives, by scale (batch,)."""
    one = torch.full_like(scale, NO_GUIDANCE)
    with_text, without = teach(noisy, text, one), teach(noisy, nothing, one)
    return without + scale[:, None, None] * (with_text - without)


def _nothing(networks: Networks, sampler: Sampler, text: Text) -> Text:
    """The empty caption, as many times and as long as `text`."""
    clip_ids, t5_ids = sampler.empty
    padded = nn.functional.pad(t5_ids, (0, text[0].shape[1] - t5_ids.shape[1]))
    tokens, pooled = encode_text(networks, clip_ids, padded)
    return tokens.expand_as(text[0]), pooled.expand_as(text[1])
