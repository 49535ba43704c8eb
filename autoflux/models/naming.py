"""Other names for the same weights: Black Forest Labs' transformer and the original autoencoder, in diffusers' words.

Some stored tensors are several of diffusers' one above the other (`qkv` is q, k and v), and one has its halves the
other way round. A test holds these tables against the converters of diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from autoflux.models.values import Naming

FINAL_MODULATION = "final_layer.adaLN_modulation.1"
"""Stored as shift above scale; diffusers has scale above shift."""


class Stored(NamedTuple):
    """What one stored tensor holds."""

    names: tuple[str, ...]
    """The weights, one above the other, by diffusers' names."""
    swapped: bool = False
    """Whether its upper and lower half change places."""


_BFL_REST = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    FINAL_MODULATION: "norm_out.linear",
}
_BFL_BLOCKS: dict[str, dict[str, tuple[str, ...]]] = {
    "double_blocks": {
        "img_mod.lin": ("norm1.linear",),
        "txt_mod.lin": ("norm1_context.linear",),
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "img_attn.norm.query_norm": ("attn.norm_q",),
        "img_attn.norm.key_norm": ("attn.norm_k",),
        "txt_attn.norm.query_norm": ("attn.norm_added_q",),
        "txt_attn.norm.key_norm": ("attn.norm_added_k",),
        "img_attn.proj": ("attn.to_out.0",),
        "txt_attn.proj": ("attn.to_add_out",),
        "img_mlp.0": ("ff.net.0.proj",),
        "img_mlp.2": ("ff.net.2",),
        "txt_mlp.0": ("ff_context.net.0.proj",),
        "txt_mlp.2": ("ff_context.net.2",),
    },
    "single_blocks": {
        "modulation.lin": ("norm.linear",),
        "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        "linear2": ("proj_out",),
        "norm.query_norm": ("attn.norm_q",),
        "norm.key_norm": ("attn.norm_k",),
    },
}
_BFL_PATHS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
_BFL_BLOCK = re.compile(r"(?P<list>double_blocks|single_blocks)\.(?P<index>\d+)\.(?P<layer>.+)")

_LDM_BLOCK = re.compile(r"(?P<half>encoder|decoder)\.(?P<way>down|up)\.(?P<level>\d{1,3})\.(?P<rest>.+)")
_LDM_SPELLINGS = (
    (re.compile(r"\bblock\.(\d+)\."), r"resnets.\1."),
    (re.compile(r"\b(down|up)sample\."), r"\1samplers.0."),
    (re.compile(r"\.mid\.block_1\."), ".mid_block.resnets.0."),
    (re.compile(r"\.mid\.block_2\."), ".mid_block.resnets.1."),
    (re.compile(r"\.mid\.attn_1\.norm\."), ".mid_block.attentions.0.group_norm."),
    (re.compile(r"\.mid\.attn_1\.([qkv])\."), r".mid_block.attentions.0.to_\1."),
    (re.compile(r"\.mid\.attn_1\.proj_out\."), ".mid_block.attentions.0.to_out.0."),
    (re.compile(r"\bnin_shortcut\."), "conv_shortcut."),
    (re.compile(r"\bnorm_out\."), "conv_norm_out."),
)

OLD_CLIP = "text_model."
"""What transformers before 5 put before the names of CLIP's weights."""

_TIED = {"encoder.embed_tokens.weight": "shared.weight"}
"""T5's table of words goes by two names."""


def meaning_of(naming: Naming, key: str, levels: int = 0) -> Stored | None:
    """What the tensor stored as `key` (without prefix) holds, None if it is no weight of that naming.

    `levels` are those of an autoencoder in its original names, by `decoder_levels`.
    """
    if naming == Naming.BFL:
        return _bfl(key)
    if naming == Naming.LDM:
        return _ldm(key, levels)
    return Stored((plain_name(key),))


def decoder_levels(keys: Iterable[str]) -> int:
    """How many levels the decoder with these original names has."""
    found = (match for key in keys if (match := _LDM_BLOCK.fullmatch(key)) and match["way"] == "up")
    return 1 + max((int(match["level"]) for match in found), default=-1)


def plain_name(name: str) -> str:
    """The one name that a weight goes by here, of those that versions of transformers give it."""
    name = name.removeprefix(OLD_CLIP)
    return _TIED.get(name, name)


def _bfl(key: str) -> Stored | None:
    layer, _, kind = key.rpartition(".")
    kind = "weight" if kind == "scale" else kind
    if layer in _BFL_REST:
        return Stored((f"{_BFL_REST[layer]}.{kind}",), swapped=layer == FINAL_MODULATION)
    match = _BFL_BLOCK.fullmatch(layer)
    parts = _BFL_BLOCKS[match["list"]].get(match["layer"]) if match else None
    if match is None or parts is None:
        return None
    return Stored(tuple(f"{_BFL_PATHS[match['list']]}.{match['index']}.{part}.{kind}" for part in parts))


def _ldm(key: str, levels: int) -> Stored:
    if match := _LDM_BLOCK.fullmatch(key):
        level = int(match["level"])
        if match["way"] == "up":
            # The original counts the decoder's levels from full resolution, diffusers in the order they run.
            level = levels - 1 - level
        key = f"{match['half']}.{match['way']}_blocks.{level}.{match['rest']}"
    for spelling, ours in _LDM_SPELLINGS:
        key = spelling.sub(ours, key)
    return Stored((key,))
