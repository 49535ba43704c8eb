"""diffusers' FLUX pipeline taken apart into verbs, with the tensor operations of `FluxPipeline.__call__`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from PIL.Image import Image
from torch import nn

from autoflux import HOISTED_STEPS, Conditioning, Model, Plan, PluginFailure, Request, State, give_back_unused

from .diffusers_loading import DIFFUSERS, DTYPES, Components, Library
from .diffusers_positions import KeptPositions

PACKED = ("tokens", "pooled", "token_ids")
"""The tensors of a `FluxConditioning`."""


@dataclass(frozen=True)
class FluxConditioning:
    """An encoded prompt: `tokens` (1, text tokens, 4096) from T5, `pooled` (1, 768) from CLIP in FLUX.1's sizes."""

    tokens: torch.Tensor
    pooled: torch.Tensor
    token_ids: torch.Tensor
    dropped_text: str

    def given_as(self, dtype: torch.dtype) -> FluxConditioning:
        """For a transformer that computes in another format than the encoders. What is kept is what they made."""
        return replace(self, **{name: getattr(self, name).to(dtype) for name in PACKED})


@dataclass(frozen=True)
class Hoisted:
    """Modulation of some steps beforehand: `rows` (steps, width), the first of them for step `first`."""

    rows: torch.Tensor
    first: int

    def row(self, step: int) -> torch.Tensor | None:
        """(1, width), None if that step is not among them."""
        at = step - self.first
        return self.rows[at : at + 1] if 0 <= at < len(self.rows) else None


@dataclass
class FluxState:
    """A picture under way. `latents` are packed, (1, image tokens, 64); `timesteps` has one entry a step."""

    request: Request
    conditioning: FluxConditioning
    latents: torch.Tensor
    image_ids: torch.Tensor
    timesteps: torch.Tensor
    scheduler: Any
    guidance: torch.Tensor | None
    modulation: Hoisted | None = None
    step: int = 0

    @property
    def row(self) -> torch.Tensor | None:
        """The modulation of the step that it is at, if it is there."""
        return self.modulation.row(self.step) if self.modulation else None


class DiffusersPipeline:
    """A pipeline's verbs over a loaded `FluxPipeline`."""

    library: ClassVar[Library] = DIFFUSERS

    def __init__(self, components: Components, plan: Plan, model: Model) -> None:
        self._pipe = components.pipe
        self._transformer: Any = components.transformer
        self._positions = KeptPositions.placed_in(self._transformer) if self.library is DIFFUSERS else None
        self._residences = components.residences
        self._architecture = model.architecture
        self._device = torch.device(plan.device)
        self._dtype = DTYPES[plan.component("transformer").arithmetic]
        self._decoder_dtype = DTYPES[plan.component("vae").arithmetic]
        self._attention = plan.attention
        self._text_tokens = model.defaults.text_tokens

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """Encode each prompt by itself, so that its result does not depend on its company."""
        with self._residences.encoding():
            return list(map(self._encode, prompts))

    def pack(self, conditioning: Conditioning) -> dict[str, torch.Tensor]:
        """The three tensors. The text that was dropped is part of the prompt: `unpack` finds it out again."""
        assert isinstance(conditioning, FluxConditioning)  # noqa: S101 — our own encode made it
        return {name: getattr(conditioning, name) for name in PACKED}

    def unpack(self, tensors: dict[str, torch.Tensor], prompt: str) -> FluxConditioning:
        """The tensors on the device, and what the tokenizer, which is quick, says was dropped."""
        return FluxConditioning(
            **{name: tensors[name].to(self._device) for name in PACKED}, dropped_text=self._dropped_text(prompt)
        )

    @torch.inference_mode()
    def start(self, request: Request, conditioning: Conditioning) -> FluxState:
        """Noise drawn on the CPU, so that a seed means the same on every device, and the schedule of the steps."""
        assert isinstance(conditioning, FluxConditioning)  # noqa: S101 — our own encode made it
        pipe = self._pipe
        generator = torch.Generator("cpu").manual_seed(request.seed)
        channels = self._architecture.latent_channels
        latents, image_ids = pipe.prepare_latents(
            1, channels, request.height, request.width, self._dtype, self._device, generator
        )
        scheduler, timesteps = self._schedule(request.steps, latents.shape[1])
        guidance = None
        if self._architecture.guidance:
            guidance = torch.full([1], request.guidance, device=self._device, dtype=torch.float32)
        given = conditioning.given_as(self._dtype)
        return FluxState(request, given, latents, image_ids, timesteps, scheduler, guidance)

    @torch.inference_mode()
    def denoise(self, states: Sequence[State]) -> None:
        """Advance each state by one step in one pass through the transformer."""
        flux = [state for state in states if isinstance(state, FluxState)]
        with self._residences.denoising(), self.library.attending(self._attention):
            if self._residences.hoists:
                self._residences.select(torch.cat(list(self._rows(flux))))
            velocity = self._velocity(flux)
        for i, state in enumerate(flux):
            time = state.timesteps[state.step]
            state.latents = state.scheduler.step(velocity[i : i + 1], time, state.latents, return_dict=False)[0]
            state.step += 1

    @torch.inference_mode()
    def decode(self, states: Sequence[State]) -> list[Image]:
        """Decode one picture at a time: the VAE's memory peak is the largest of the pipeline."""
        flux = [state for state in states if isinstance(state, FluxState)]
        for state in flux:
            state.modulation = None  # the decode takes the most, and is planned without it
        with self._residences.decoding(flux[0].request.width, flux[0].request.height):
            return [self._decode(state) for state in flux]

    def block_lists(self) -> dict[str, nn.ModuleList]:
        """Double blocks, then single blocks."""
        return {name: getattr(self._transformer, name) for name in self.library.block_lists}

    def close(self) -> None:
        """Drop the weights."""
        self._residences.close()
        self._pipe = self._transformer = None
        give_back_unused()

    def _velocity(self, states: Sequence[FluxState]) -> torch.Tensor:
        """What the transformer makes of each state at its step, packed: (states, image tokens, 64)."""
        first, guidance = states[0], [state.guidance for state in states if state.guidance is not None]
        if self._positions:
            self._positions.expect(first.request.height, first.request.width, len(first.conditioning.token_ids))
        velocity: torch.Tensor = self._transformer(
            hidden_states=torch.cat([state.latents for state in states]),
            timestep=torch.stack([self._time(state.timesteps[state.step]) for state in states]),
            guidance=torch.cat(guidance) if guidance else None,
            pooled_projections=torch.cat([state.conditioning.pooled for state in states]),
            encoder_hidden_states=torch.cat([state.conditioning.tokens for state in states]),
            txt_ids=first.conditioning.token_ids,
            img_ids=first.image_ids,
            return_dict=False,
        )[0]
        return velocity

    def _time(self, timestep: torch.Tensor) -> torch.Tensor:
        """0 to 1, rounded as `FluxPipeline` does."""
        return timestep.to(self._dtype) / 1000

    def _encode(self, prompt: str) -> FluxConditioning:
        # Each encoder is given its tokens where it computes, and what it makes goes to the device.
        tokens, pooled, token_ids = self._pipe.encode_prompt(
            prompt, prompt_2=None, device=self._device, max_sequence_length=self._text_tokens
        )
        return FluxConditioning(tokens, pooled, token_ids, self._dropped_text(prompt))

    def _dropped_text(self, prompt: str) -> str:
        tokenizer = self._pipe.tokenizer_2
        ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
        # The last of the kept tokens is the end mark, so one more word piece is lost than the limit says.
        dropped: str = tokenizer.decode(ids[self._text_tokens - 1 : -1])
        return dropped if len(ids) > self._text_tokens else ""

    def _rows(self, states: Sequence[FluxState]) -> Iterator[torch.Tensor]:
        """Modulation of the step that each picture is at, (1, width).

        Of those that lack it it is computed together, so that its weights pass through the device once for all.
        """
        lacking = [state for state in states if state.row is None]
        if lacking:
            embeddings = [self._embeddings(state) for state in lacking]
            for state in lacking:
                state.modulation = None  # of the steps before, to make room
            rows = self._residences.modulation(list(chain.from_iterable(embeddings)))
            for state, own in zip(lacking, torch.split(rows, list(map(len, embeddings))), strict=True):
                state.modulation = Hoisted(own, state.step)
        for state in states:
            row = state.row
            assert row is not None  # noqa: S101 — it was computed
            yield row

    def _embeddings(self, state: FluxState) -> list[torch.Tensor]:
        """Of as many steps, from the one that the picture is at, as modulation is computed for at once."""
        times = state.timesteps[state.step : state.step + HOISTED_STEPS]
        return [self._embedding(time, state) for time in torch.split(times, 1)]

    def _embedding(self, time: torch.Tensor, state: FluxState) -> torch.Tensor:
        """What the transformer's forward makes of timestep, guidance and pooled prompt, with the same roundings."""
        given = [self._time(time) * 1000]
        if state.guidance is not None:
            given.append(state.guidance.to(self._dtype) * 1000)
        embedding: torch.Tensor = self._transformer.time_text_embed(*given, state.conditioning.pooled)
        return embedding

    def _schedule(self, steps: int, image_tokens: int) -> tuple[Any, torch.Tensor]:
        scheduler = copy.deepcopy(self._pipe.scheduler)
        config = scheduler.config
        shift = calculate_shift(
            image_tokens,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        sigmas = None if config.get("use_flow_sigmas") else np.linspace(1.0, 1 / steps, steps)
        timesteps, _ = retrieve_timesteps(scheduler, steps, self._device, sigmas=sigmas, mu=shift)
        scheduler.set_begin_index(0)
        return scheduler, timesteps

    def _decode(self, state: FluxState) -> Image:
        pipe, request = self._pipe, state.request
        latents = pipe._unpack_latents(state.latents, request.height, request.width, pipe.vae_scale_factor)  # noqa: SLF001
        latents = latents.to(self._residences["vae"].device, self._decoder_dtype)
        latents = (latents / pipe.vae.config.scaling_factor) + pipe.vae.config.shift_factor
        decoded = pipe.vae.decode(_laid_out(latents), return_dict=False)[0]
        if not torch.isfinite(decoded).all():
            raise PluginFailure(
                f"the picture came out as numbers that are not finite in {str(self._dtype).removeprefix('torch.')}",
                hint="the weights are damaged: download them again"
                if self._dtype == torch.float32
                else "--precision float32, or bfloat16 where it was float16",
            )
        image: Image = pipe.image_processor.postprocess(decoded, output_type="pil")[0]
        return image


def _laid_out(latents: torch.Tensor) -> torch.Tensor:
    """Latents (1, channels, h, w), in memory as they are decoded fastest; that of the latents is that of all after it.

    Processors without instructions for bfloat16 convolve it 14 times as fast with channels side by side (AVX2, the
    sample model: 2.1 s instead of 30). In float32 a picture is the same as by diffusers' own pipeline, to the bit.
    """
    on_processor = latents.device.type == "cpu" and latents.dtype != torch.float32
    return latents.to(memory_format=torch.channels_last) if on_processor else latents
