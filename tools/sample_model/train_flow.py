"""Training the transformer and both text encoders on latents, by flow matching; then distilling guidance into it."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, T5EncoderModel

from tools.sample_model.average import MasterWeights, MovingAverage
from tools.sample_model.networks import SHIFT
from tools.sample_model.replay import Replayed, shared_pool

TEXT_LENGTHS = (*(64,) * 19, 512)
"""Prompt lengths in training: the pipeline pads with tokens that are seen, so each length has to be learned."""

MAIN_SIZE_SHARE = 0.9
EMPTY_SHARE = 0.1
"""Captions replaced by the empty one: what guidance pushes away from."""

NO_GUIDANCE = 1.0
GUIDANCE_RANGE = (1.0, 6.0)
PEAK_RATE, DISTILL_RATE = 1.2e-3, 3e-4
MILESTONE = 0.3
"""Share of the training after which the weights so far are written."""


@dataclass(frozen=True)
class Latents:
    """Scenes of one picture size: `latents` (scenes, 16, h, w), token ids (scenes, captions, tokens)."""

    latents: Tensor
    clip_ids: Tensor
    t5_ids: Tensor


@dataclass
class Networks:
    """What is trained."""

    transformer: FluxTransformer2DModel
    clip: CLIPTextModel
    t5: T5EncoderModel

    def all(self) -> nn.ModuleList:
        return nn.ModuleList([self.transformer, self.clip, self.t5])


@dataclass(frozen=True)
class Batch:
    """Packed latents (batch, tokens, 64), noise like them, noise level (batch,), text, and positions."""

    clean: Tensor
    noise: Tensor
    sigma: Tensor
    clip_ids: Tensor
    t5_ids: Tensor
    image_ids: Tensor

    @property
    def noisy(self) -> Tensor:
        sigma = self.sigma[:, None, None]
        return (1 - sigma) * self.clean + sigma * self.noise

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


@dataclass(frozen=True)
class Task:
    """What to minimize over which batches, and how fast."""

    sampler: Sampler
    loss: Callable[[Batch], Tensor]
    peak_rate: float
    empty_share: float


def train_flow(networks: Networks, sampler: Sampler, *, minutes: float, on_milestone: Callable[[], None]) -> None:
    """Train transformer and encoders together; leaves the averaged weights in `networks`."""
    forward = forward_of(networks.transformer)

    def loss(batch: Batch) -> Tensor:
        guidance = torch.full_like(batch.sigma, NO_GUIDANCE)
        predicted = forward(batch, encode_text(networks, batch.clip_ids, batch.t5_ids), guidance)
        return (predicted - batch.velocity).square().mean()

    _optimize(networks.all(), Task(sampler, loss, PEAK_RATE, EMPTY_SHARE), minutes, on_milestone)


def distil_guidance(networks: Networks, sampler: Sampler, *, minutes: float) -> None:
    """Teach the guidance input what classifier-free guidance of that scale gives, as FLUX.1-dev was."""
    teacher = copy.deepcopy(networks.transformer).eval().requires_grad_(requires_grad=False)
    forward, teach = forward_of(networks.transformer), forward_of(teacher)
    low, high = GUIDANCE_RANGE

    def loss(batch: Batch) -> Tensor:
        scale = low + (high - low) * torch.rand_like(batch.sigma)
        with torch.no_grad():
            text = encode_text(networks, batch.clip_ids, batch.t5_ids)
            empty_t5 = nn.functional.pad(sampler.empty[1], (0, batch.t5_ids.shape[1] - sampler.empty[1].shape[1]))
            empty_tokens, empty_pooled = encode_text(networks, sampler.empty[0], empty_t5)
            nothing = (empty_tokens.expand_as(text[0]), empty_pooled.expand_as(text[1]))
            one = torch.full_like(scale, NO_GUIDANCE)
            with_text, without = teach(batch, text, one), teach(batch, nothing, one)
            target = without + scale[:, None, None] * (with_text - without)
        return (forward(batch, text, scale) - target).square().mean()

    _optimize(networks.transformer, Task(sampler, loss, DISTILL_RATE, 0.0), minutes)


Text = tuple[Tensor, Tensor]
"""What the encoders make of prompts: tokens (batch, text tokens, width) and pooled (batch, width)."""

Forward = Callable[[Batch, Text, Tensor], Tensor]


def _optimize(trained: nn.Module, task: Task, minutes: float, on_milestone: Callable[[], None] = lambda: None) -> None:
    weights = MasterWeights(trained, task.peak_rate, weight_decay=0.01, by_muon=_is_hidden)
    average = MovingAverage(weights.master, 0.9995)
    steps: dict[Shape, Replayed] = {}
    pool = shared_pool()
    begin, milestone, share = time.monotonic(), 1, 0.0
    running = torch.zeros((), device=weights.live[0].device)
    while share < 1:
        share = (time.monotonic() - begin) / (60 * minutes)
        shape = task.sampler.choose()
        if shape not in steps:
            steps[shape] = Replayed(partial(_step, task, weights, shape), pool)
        weights.schedule(share)
        loss = steps[shape]()
        average.update(weights.master)
        running.lerp_(loss, 0.02 if weights.steps > 1 else 1.0)
        if weights.steps % 500 == 1:
            seconds = time.monotonic() - begin
            print(f"step {weights.steps} share {share:.2f} loss {running.item():.4f} {seconds:.0f} s", flush=True)
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
    loss = task.loss(task.sampler.draw(shape, empty_share=task.empty_share))
    weights.step(loss)
    return loss.detach()


def forward_of(transformer: FluxTransformer2DModel) -> Forward:
    """The transformer as a function of a batch, text and guidance."""

    def forward(batch: Batch, text: Text, guidance: Tensor) -> Tensor:
        tokens, pooled = text
        with _exact_times(transformer, batch.sigma, guidance):
            predicted: Tensor = transformer(
                hidden_states=batch.noisy.to(tokens.dtype),
                timestep=batch.sigma,
                guidance=guidance,
                pooled_projections=pooled,
                encoder_hidden_states=tokens,
                txt_ids=torch.zeros(tokens.shape[1], 3, device=tokens.device),
                img_ids=batch.image_ids,
                return_dict=False,
            )[0]
        return predicted.float()

    return forward


@contextmanager
def _exact_times(transformer: FluxTransformer2DModel, sigma: Tensor, guidance: Tensor) -> Iterator[None]:
    """Embed noise level and guidance in float32.

    In bf16 the transformer rounds a timestep of 742 to 744, and its embedding's fast waves are then those of another
    time; a model trained so has never seen the embeddings that it gets where it runs in float32.
    """

    def exact(_module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return sigma * 1000, guidance * 1000, given[2]

    hook = transformer.time_text_embed.register_forward_pre_hook(exact)
    try:
        yield
    finally:
        hook.remove()


def encode_text(networks: Networks, clip_ids: Tensor, t5_ids: Tensor) -> Text:
    """Token ids of both tokenizers, (batch, tokens), through both encoders."""
    return networks.t5(t5_ids.long())[0], networks.clip(clip_ids.long()).pooler_output


def _noise_levels(count: int, device: torch.device) -> Tensor:
    """Mostly logit-normal, a tenth uniform, then shifted like the sampler's schedule."""
    level = torch.where(
        torch.rand(count, device=device) < 0.9,
        torch.sigmoid(torch.randn(count, device=device)),
        torch.rand(count, device=device),
    )
    return SHIFT * level / (1 + (SHIFT - 1) * level)
