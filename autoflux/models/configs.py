"""Configurations of the networks: FLUX.1's own, and those that can be told from the shapes of the weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from autoflux.models.shapes import Shape

CLASSES = {
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "T5EncoderModel",
    "transformer": "FluxTransformer2DModel",
    "vae": "AutoencoderKL",
}
"""The networks of a FLUX pipeline in the order they run, and what diffusers and transformers call them."""

FLUX_DEV: dict[str, dict[str, Any]] = {
    "text_encoder": {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "projection_dim": 768,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-05,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    },
    "text_encoder_2": {
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-06,
        "eos_token_id": 1,
        "pad_token_id": 0,
    },
    "transformer": {
        "patch_size": 1,
        "in_channels": 64,
        "out_channels": None,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": [16, 56, 56],
    },
    "vae": {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": 16,
        "norm_num_groups": 32,
        "act_fn": "silu",
        "mid_block_add_attention": True,
        "sample_size": 1024,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "force_upcast": True,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}
"""FLUX.1-dev's, as its `config.json` files have them. The others differ in the transformer's `in_channels` (384 of
Fill) and `guidance_embeds` (not schnell)."""

SCHEDULERS: dict[bool, dict[str, Any]] = {
    True: {
        "num_train_timesteps": 1000,
        "shift": 3.0,
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    },
    False: {
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "use_dynamic_shifting": False,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    },
}
"""The scheduler of models with guidance (dev and its kin) and without (schnell), from their `scheduler_config.json`."""


def told_by_shapes(component: str, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The part of a configuration that the weights' shapes (by diffusers' names) decide.

    Raises:
        KeyError, IndexError: a weight is missing or has another rank.
    """
    return _TELLERS[component](shapes)


def _transformer(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    hidden, channels = shapes["x_embedder.weight"]
    head = shapes["single_transformer_blocks.0.attn.norm_q.weight"][0]
    out = shapes["proj_out.weight"][0]
    return {
        "in_channels": channels,
        "out_channels": None if out == channels else out,
        "num_layers": _count(shapes, "transformer_blocks"),
        "num_single_layers": _count(shapes, "single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
    }


def _clip(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    vocabulary, hidden = shapes["embeddings.token_embedding.weight"]
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _count(shapes, "encoder.layers"),
        "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
    }


def _t5(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    vocabulary, hidden = shapes["shared.weight"]
    attention = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = shapes[f"{attention}.relative_attention_bias.weight"]
    return {
        "vocab_size": vocabulary,
        "d_model": hidden,
        "d_kv": shapes[f"{attention}.q.weight"][0] // heads,
        "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wo.weight"][1],
        "num_layers": _count(shapes, "encoder.block"),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


def _vae(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    levels = _count(shapes, "encoder.down_blocks")
    widths = [shapes[f"encoder.down_blocks.{level}.resnets.0.conv1.weight"][0] for level in range(levels)]
    return {
        "block_out_channels": widths,
        "layers_per_block": _count(shapes, "encoder.down_blocks.0.resnets"),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "mid_block_add_attention": "decoder.mid_block.attentions.0.to_q.weight" in shapes,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def _count(names: Iterable[str], path: str) -> int:
    """How many blocks are there, and not the highest of their numbers, which may be any."""
    numbered = re.compile(rf"{re.escape(path)}\.(\d+)\.")
    return len({match[1] for name in names if (match := numbered.match(name))})


_TELLERS: dict[str, Callable[[Mapping[str, Shape]], dict[str, Any]]] = {
    "text_encoder": _clip,
    "text_encoder_2": _t5,
    "transformer": _transformer,
    "vae": _vae,
}
