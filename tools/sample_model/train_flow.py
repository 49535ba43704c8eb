"""Training the transformer and both text encoders on latents, by flow matching."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, T5EncoderModel

from tools.sample_model.batches import Noisy, Sampler, Shape
from tools.sample_model.optimize import Task, optimize

EMPTY_SHARE = 0.1
"""Captions replaced by the empty one: what guidance pushes away from."""

NO_GUIDANCE = 1.0
PEAK_RATE = 1.2e-3


@dataclass
class Networks:
    """What is trained."""

    transformer: FluxTransformer2DModel
    clip: CLIPTextModel
    t5: T5EncoderModel

    def all(self) -> nn.ModuleList:
        return nn.ModuleList([self.transformer, self.clip, self.t5])


Text = tuple[Tensor, Tensor]
"""What the encoders make of prompts: tokens (batch, text tokens, width) and pooled (batch, width)."""

Forward = Callable[[Noisy, Text, Tensor], Tensor]
"""Velocity (batch, tokens, 64) in float32, of noisy latents, text, and guidance (batch,)."""


def train_flow(networks: Networks, sampler: Sampler, *, minutes: float, on_milestone: Callable[[], None]) -> None:
    """Train transformer and encoders together; leaves the averaged weights in `networks`."""
    forward = forward_of(networks.transformer)

    def loss(shape: Shape) -> Tensor:
        batch = sampler.draw(shape, empty_share=EMPTY_SHARE)
        guidance = torch.full_like(batch.sigma, NO_GUIDANCE)
        predicted = forward(batch.noisy, encode_text(networks, batch.clip_ids, batch.t5_ids), guidance)
        return (predicted - batch.velocity).square().mean()

    optimize(networks.all(), Task(sampler.choose, loss, PEAK_RATE), minutes, on_milestone)


def forward_of(transformer: FluxTransformer2DModel) -> Forward:
    """The transformer as a function of noisy latents, text and guidance."""

    def forward(noisy: Noisy, text: Text, guidance: Tensor) -> Tensor:
        tokens, pooled = text
        with _exact_times(transformer, noisy.sigma, guidance):
            predicted: Tensor = transformer(
                hidden_states=noisy.latents.to(tokens.dtype),
                timestep=noisy.sigma,
                guidance=guidance,
                pooled_projections=pooled,
                encoder_hidden_states=tokens,
                txt_ids=torch.zeros(tokens.shape[1], 3, device=tokens.device),
                img_ids=noisy.image_ids,
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
