"""What a network of a given configuration is made of: every weight by name and shape. No weights, no torch.

Names are those of diffusers and transformers, without the `text_model.` that earlier versions put before CLIP's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Config = Mapping[str, Any]
Shape = tuple[int, ...]
Weights = Iterator[tuple[str, Shape]]

MLP_RATIO = 4
"""Width of a block's feed-forward in hidden sizes."""

TIME_CHANNELS = 256
"""Sines and cosines that stand for a timestep."""


def weights_of(component: str, config: Config) -> dict[str, Shape]:
    """Name and shape of every weight of `component` (`transformer`, `vae`, …).

    Raises:
        As `each_weight`.
    """
    return dict(each_weight(component, config))


def each_weight(component: str, config: Config) -> Weights:
    """The same one by one, for a configuration that may name more than there are.

    Raises:
        KeyError, TypeError, ValueError: the configuration lacks or misstates what the message names.
    """
    return _MAKERS[component](config)


def transformer_weights(config: Config) -> Weights:
    """FluxTransformer2DModel's."""
    heads, head = int(config["num_attention_heads"]), int(config["attention_head_dim"])
    hidden, channels = heads * head, int(config["in_channels"])
    yield from _linear("context_embedder", int(config["joint_attention_dim"]), hidden)
    yield from _linear("x_embedder", channels, hidden)
    embedders = {"timestep": TIME_CHANNELS, "text": int(config["pooled_projection_dim"])}
    if config["guidance_embeds"]:
        embedders["guidance"] = TIME_CHANNELS
    for name, width in embedders.items():
        yield from _linear(f"time_text_embed.{name}_embedder.linear_1", width, hidden)
        yield from _linear(f"time_text_embed.{name}_embedder.linear_2", hidden, hidden)
    for i in range(int(config["num_layers"])):
        yield from _double_block(f"transformer_blocks.{i}", hidden, head)
    for i in range(int(config["num_single_layers"])):
        yield from _single_block(f"single_transformer_blocks.{i}", hidden, head)
    yield from _linear("norm_out.linear", hidden, 2 * hidden)
    yield from _linear("proj_out", hidden, int(config.get("out_channels") or channels))


def _double_block(name: str, hidden: int, head: int) -> Weights:
    for norm in ("norm1", "norm1_context"):
        yield from _linear(f"{name}.{norm}.linear", hidden, 6 * hidden)
    for part in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"):
        yield from _linear(f"{name}.attn.{part}", hidden, hidden)
    for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        yield f"{name}.attn.{norm}.weight", (head,)
    for part in ("ff", "ff_context"):
        yield from _linear(f"{name}.{part}.net.0.proj", hidden, MLP_RATIO * hidden)
        yield from _linear(f"{name}.{part}.net.2", MLP_RATIO * hidden, hidden)


def _single_block(name: str, hidden: int, head: int) -> Weights:
    yield from _linear(f"{name}.norm.linear", hidden, 3 * hidden)
    for part in ("to_q", "to_k", "to_v"):
        yield from _linear(f"{name}.attn.{part}", hidden, hidden)
    for norm in ("norm_q", "norm_k"):
        yield f"{name}.attn.{norm}.weight", (head,)
    yield from _linear(f"{name}.proj_mlp", hidden, MLP_RATIO * hidden)
    yield from _linear(f"{name}.proj_out", (1 + MLP_RATIO) * hidden, hidden)


def t5_weights(config: Config) -> Weights:
    """T5EncoderModel's. The table of position biases is the first block's and serves all."""
    hidden, inner = int(config["d_model"]), int(config["num_heads"]) * int(config["d_kv"])
    gated = str(config.get("feed_forward_proj", "relu")).startswith("gated")
    yield "shared.weight", (int(config["vocab_size"]), hidden)
    for i in range(int(config["num_layers"])):
        name = f"encoder.block.{i}.layer"
        for part in ("q", "k", "v"):
            yield f"{name}.0.SelfAttention.{part}.weight", (inner, hidden)
        yield f"{name}.0.SelfAttention.o.weight", (hidden, inner)
        if i == 0:
            buckets = int(config.get("relative_attention_num_buckets", 32))
            yield f"{name}.0.SelfAttention.relative_attention_bias.weight", (buckets, int(config["num_heads"]))
        for part in ("wi_0", "wi_1") if gated else ("wi",):
            yield f"{name}.1.DenseReluDense.{part}.weight", (int(config["d_ff"]), hidden)
        yield f"{name}.1.DenseReluDense.wo.weight", (hidden, int(config["d_ff"]))
        for layer in (0, 1):
            yield f"{name}.{layer}.layer_norm.weight", (hidden,)
    yield "encoder.final_layer_norm.weight", (hidden,)


def clip_weights(config: Config) -> Weights:
    """CLIPTextModel's."""
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    yield "embeddings.token_embedding.weight", (int(config["vocab_size"]), hidden)
    yield "embeddings.position_embedding.weight", (int(config["max_position_embeddings"]), hidden)
    for i in range(int(config["num_hidden_layers"])):
        name = f"encoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{name}.self_attn.{part}", hidden, hidden)
        yield from _linear(f"{name}.mlp.fc1", hidden, inner)
        yield from _linear(f"{name}.mlp.fc2", inner, hidden)
        for norm in ("layer_norm1", "layer_norm2"):
            yield from _norm(f"{name}.{norm}", hidden)
    yield from _norm("final_layer_norm", hidden)


def vae_weights(config: Config) -> Weights:
    """AutoencoderKL's."""
    widths = tuple(int(width) for width in config["block_out_channels"])
    layers, latent = int(config["layers_per_block"]), int(config["latent_channels"])
    attention = bool(config.get("mid_block_add_attention", True))
    yield from _conv("encoder.conv_in", int(config.get("in_channels", 3)), widths[0])
    for level, width in enumerate(widths):
        name, before = f"encoder.down_blocks.{level}", widths[max(0, level - 1)]
        for i in range(layers):
            yield from _resnet(f"{name}.resnets.{i}", before if i == 0 else width, width)
        if level < len(widths) - 1:
            yield from _conv(f"{name}.downsamplers.0.conv", width, width)
    yield from _middle("encoder", widths[-1], attention=attention)
    yield from _conv("encoder.conv_out", widths[-1], 2 * latent)
    yield from _conv("decoder.conv_in", latent, widths[-1])
    yield from _middle("decoder", widths[-1], attention=attention, last_width=widths[0])
    for level, width in enumerate(reversed(widths)):
        name, before = f"decoder.up_blocks.{level}", widths[min(len(widths) - level, len(widths) - 1)]
        for i in range(layers + 1):
            yield from _resnet(f"{name}.resnets.{i}", before if i == 0 else width, width)
        if level < len(widths) - 1:
            yield from _conv(f"{name}.upsamplers.0.conv", width, width)
    yield from _conv("decoder.conv_out", widths[0], int(config.get("out_channels", 3)))
    if config.get("use_quant_conv", True):
        yield from _conv("quant_conv", 2 * latent, 2 * latent, kernel=1)
    if config.get("use_post_quant_conv", True):
        yield from _conv("post_quant_conv", latent, latent, kernel=1)


def _middle(name: str, width: int, *, attention: bool, last_width: int | None = None) -> Weights:
    for i in range(2):
        yield from _resnet(f"{name}.mid_block.resnets.{i}", width, width)
    if attention:
        yield from _norm(f"{name}.mid_block.attentions.0.group_norm", width)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            yield from _linear(f"{name}.mid_block.attentions.0.{part}", width, width)
    yield from _norm(f"{name}.conv_norm_out", last_width or width)


def _resnet(name: str, width_in: int, width_out: int) -> Weights:
    yield from _norm(f"{name}.norm1", width_in)
    yield from _conv(f"{name}.conv1", width_in, width_out)
    yield from _norm(f"{name}.norm2", width_out)
    yield from _conv(f"{name}.conv2", width_out, width_out)
    if width_in != width_out:
        yield from _conv(f"{name}.conv_shortcut", width_in, width_out, kernel=1)


def _linear(name: str, width_in: int, width_out: int) -> Weights:
    yield f"{name}.weight", (width_out, width_in)
    yield f"{name}.bias", (width_out,)


def _norm(name: str, width: int) -> Weights:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _conv(name: str, width_in: int, width_out: int, *, kernel: int = 3) -> Weights:
    yield f"{name}.weight", (width_out, width_in, kernel, kernel)
    yield f"{name}.bias", (width_out,)


_MAKERS: dict[str, Callable[[Config], Weights]] = {
    "text_encoder": clip_weights,
    "text_encoder_2": t5_weights,
    "transformer": transformer_weights,
    "vae": vae_weights,
}
