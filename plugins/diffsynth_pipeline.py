"""The verbs of the diffusers pipeline with DiffSynth's transformer and step function."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, ClassVar, Self

import torch

from autoflux import LoadProgress, Model, Plan, attending

from .diffsynth_backend import unreadable
from .diffsynth_offload import VramManagement
from .diffsynth_transformer import (
    BLOCK_LISTS,
    Conditioned,
    bare_transformer,
    embedding_of,
    load_transformer,
    open_transformer,
)
from .diffusers_loading import Library, load_components
from .diffusers_pipeline import DiffusersPipeline, FluxState

# isort: split
from diffsynth.pipelines.flux_image import model_fn_flux_image


def _run_once(dit: Any) -> object:
    dtype = dit.x_embedder.weight.dtype
    steps = torch.zeros(1, dtype=dtype)
    return model_fn_flux_image(
        dit=dit,
        latents=torch.zeros(1, dit.x_embedder.in_features // 4, 4, 4, dtype=dtype),
        timestep=steps,
        prompt_emb=torch.zeros(1, 4, dit.context_embedder.in_features, dtype=dtype),
        pooled_prompt_emb=torch.zeros(1, dit.pooled_text_embedder[0].in_features, dtype=dtype),
        guidance=steps if dit.guidance_embedder else None,
        text_ids=torch.zeros(1, 4, 3),
    )


DIFFSYNTH = Library(
    name="diffsynth",
    block_lists=BLOCK_LISTS,
    load=load_transformer,
    open=open_transformer,
    bare=bare_transformer,
    own_offload=VramManagement.planned,
    run_once=_run_once,
    attending=attending,
    refuses=unreadable,
)


class DiffSynthPipeline(DiffusersPipeline):
    """Noise, schedule, encoders and decoder are the base's, so that a seed means the same in both."""

    library: ClassVar[Library] = DIFFSYNTH

    @classmethod
    def load(cls, plan: Plan, model: Model, progress: LoadProgress, later: Collection[str] = ()) -> Self:
        """Load every component as planned, those named in `later` when they are used."""
        return cls(load_components(plan, model, progress, DIFFSYNTH, later), plan, model)

    def _velocity(self, states: Sequence[FluxState]) -> torch.Tensor:
        dit, request = self._transformer, states[0].request
        # The step function takes latents as pictures, 8 pixels a side to one, whose sides are even.
        height, width = (2 * (side // self._architecture.patch_pixels) for side in (request.height, request.width))
        times = torch.stack([self._thousandths(state.timesteps[state.step]) for state in states])
        pooled = torch.cat([state.conditioning.pooled for state in states])
        ids = states[0].conditioning.token_ids
        velocity = model_fn_flux_image(
            dit=Conditioned(dit, embedding_of(dit, times, pooled, self._guidance(states))),
            latents=dit.unpatchify(torch.cat([state.latents for state in states]), height, width),
            timestep=times,
            prompt_emb=torch.cat([state.conditioning.tokens for state in states]),
            pooled_prompt_emb=pooled,
            text_ids=ids.expand(len(states), *ids.shape),
        )
        packed: torch.Tensor = dit.patchify(velocity)
        return packed

    def _embedding(self, time: torch.Tensor, state: FluxState) -> torch.Tensor:
        """What `_velocity` gives the step function, with the same roundings."""
        pooled, guidance = state.conditioning.pooled, self._guidance([state])
        return embedding_of(self._transformer, self._thousandths(time), pooled, guidance)

    def _guidance(self, states: Sequence[FluxState]) -> torch.Tensor | None:
        """In thousandths; None for a model that takes none."""
        given = [state.guidance for state in states if state.guidance is not None]
        return torch.cat(given).to(self._dtype) * 1000 if given else None

    def _thousandths(self, timestep: torch.Tensor) -> torch.Tensor:
        """0 to 1000, with the roundings that it has in diffusers."""
        return self._time(timestep) * 1000
