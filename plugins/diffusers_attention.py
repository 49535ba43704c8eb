"""Attention of diffusers' FLUX blocks, with rotary positions in one pass over memory where the device can."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from autoflux import rotate, rotates


class RotatedAttention:
    """In the place of `FluxAttnProcessor`, for blocks whose projections are not joined: the same bits.

    Attributes and arguments are what diffusers asks of a processor.
    """

    _attention_backend = None
    _parallel_config = None

    @classmethod
    def placed_in(cls, transformer: Any) -> None:
        """Have all blocks of a transformer use it."""
        transformer.set_attn_processor(cls())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(batch, tokens, width) of the image or of all, and of the text in a double block; the same of each back."""
        query, key, value = _projected(attn, hidden_states, attn.to_q, attn.to_k, attn.to_v)
        if encoder_hidden_states is None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        else:
            of_text = _projected(attn, encoder_hidden_states, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            query = torch.cat([attn.norm_added_q(of_text[0]), attn.norm_q(query)], dim=1)
            key = torch.cat([attn.norm_added_k(of_text[1]), attn.norm_k(key)], dim=1)
            value = torch.cat([of_text[2], value], dim=1)
        if image_rotary_emb is not None:
            query, key = (_rotated(x, image_rotary_emb) for x in (query, key))
        attended = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        of_all: Tensor = attended.flatten(2, 3).to(query.dtype)
        if encoder_hidden_states is None:
            return of_all
        tokens = encoder_hidden_states.shape[1]
        of_image: Tensor = attn.to_out[1](attn.to_out[0](of_all[:, tokens:].contiguous()))
        return of_image, attn.to_add_out(of_all[:, :tokens].contiguous())


def _rotated(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    if rotates(x) and x.device == rotary[0].device:
        # diffusers has each angle twice, once for each number of a pair.
        return rotate(x, *(angle[:, ::2] for angle in rotary))
    turned: Tensor = apply_rotary_emb(x, rotary, sequence_dim=1)
    return turned


def _projected(attn: Any, x: Tensor, *layers: Any) -> list[Tensor]:
    """Queries, keys and values, each (batch, tokens, heads, head width)."""
    return [layer(x).unflatten(-1, (-1, attn.head_dim)) for layer in layers]
