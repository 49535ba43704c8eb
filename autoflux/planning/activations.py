"""How much memory drawing takes beside weights: what is computed, and what is kept meanwhile. Pure arithmetic."""

from __future__ import annotations

from autoflux.models.flops import image_tokens
from autoflux.models.values import Model, Precision
from autoflux.planning.streaming import hoists
from autoflux.planning.terms import TRANSFORMER, Placement
from autoflux.planning.values import Arrangement, PhaseBytes, Picture, Priors

ENCODE_ACTIVATIONS = 12.0
"""Peak bytes of a T5 encode in units of tokens x hidden size x item bytes: the gated feed-forward holds two vectors of
2.5 times the hidden size, and its product, beside q, k, v and the residual."""

ENCODE_SCORES = 5
"""Attention scores that T5 holds at once in the format it computes in, beside those that softmax makes in float32: the
positions' share, the products, their sum, and what softmax is given back as. One H200: 280 MB in an encode of 512
tokens (benchmarks/planning.py)."""

ENCODE_HEAD = 64
"""Numbers in a head of T5."""

GRAPHS_BYTES = 50_000_000
"""What CUDA graphs of all blocks take beside the memory in which blocks compute: a part of the driver's, and what torch
keeps for cuBLAS, on one H200. Of the driver's it is 10 MB (benchmarks/eager_steps.py)."""

GRAPHS_SHARE = 0.93
"""Of what a step's activations are planned to take, what CUDA graphs keep of it: their memory is a pool of its own, of
which less lies in pieces. One H200, four pictures of 512x512 (benchmarks/planning.py)."""

HOISTED_STEPS = 32
"""Steps whose modulation is computed at once; FLUX.1-dev's takes 2.1 MB a step and picture."""

WIDEST_PRODUCT = 7
"""Width of the widest tensor of a step in units of the hidden size: DiffSynth's single blocks compute queries, keys,
values and what is four times as wide as the hidden size in one product. diffusers' widest is 5."""

WIDE_BYTES = 4
"""Of a number where 8 bits are multiplied: products of int8 are sums of four bytes, and what is made narrow without a
kernel of our own is float32 before."""

TILE_PIXELS = 512
"""Side of the parts in which a picture is decoded when it is tiled."""


def working_bytes(model: Model, arrangement: Arrangement, priors: Priors, picture: Picture) -> PhaseBytes:
    """Most bytes by phase beside the weights and the context."""
    return activations(model, arrangement, priors, picture) + kept(model, arrangement, priors, picture)


def activations(model: Model, arrangement: Arrangement, priors: Priors, picture: Picture) -> PhaseBytes:
    """Peak bytes of what is computed by phase, on the device."""
    encodes = arrangement.component("text_encoder_2").placement != Placement.HOST
    return PhaseBytes(
        encode=encode_activations(model, arrangement, picture) if encodes else 0,
        denoise=_denoise_activations(model, arrangement, priors, picture),
        decode=_decode_activations(model, arrangement, priors, picture),
    )


def kept(model: Model, arrangement: Arrangement, priors: Priors, picture: Picture) -> PhaseBytes:
    """Bytes by phase that are there whatever is computed: the allocator's, CUDA graphs', and hoisted modulation.

    Pictures of a batch are encoded before the first of their steps and decoded after the last.
    """
    graphs = _kept_by_graphs(model, arrangement, priors, picture)
    rows = hoisted_bytes(model, arrangement, picture)
    always = priors.allocator_bytes
    return graphs + PhaseBytes(encode=always, denoise=always + rows, decode=always)


def _kept_by_graphs(model: Model, arrangement: Arrangement, priors: Priors, picture: Picture) -> PhaseBytes:
    """What CUDA graphs keep by phase: the memory that blocks compute in, until what stays is parked, and their own."""
    if not arrangement.graphs:
        return PhaseBytes(encode=0, denoise=0, decode=0)
    computing = int(GRAPHS_SHARE * _denoise_activations(model, arrangement, priors, picture))
    between = GRAPHS_BYTES + (0 if arrangement.park_for_decode else computing)
    return PhaseBytes(encode=between, denoise=GRAPHS_BYTES, decode=between)


def largest_tensor_bytes(model: Model, arrangement: Arrangement, picture: Picture) -> int:
    """Of a step; none is larger."""
    item = WIDE_BYTES if arrangement.component(TRANSFORMER).native else _item_bytes(arrangement, TRANSFORMER)
    return WIDEST_PRODUCT * _denoise_numbers(model, picture) * item


def encode_activations(model: Model, arrangement: Arrangement, picture: Picture) -> int:
    """Peak bytes of encoding one prompt, where T5 is."""
    tokens, hidden = picture.text_tokens, model.architecture.text_hidden_size
    item = _item_bytes(arrangement, "text_encoder_2")
    scores = -(-hidden // ENCODE_HEAD) * tokens**2 * (ENCODE_SCORES * item + 4)
    return int(ENCODE_ACTIVATIONS * tokens * hidden * item) + scores


def hoisted_bytes(model: Model, arrangement: Arrangement, picture: Picture) -> int:
    """What each matrix of the modulation gives, of each picture for as many steps as are computed at once."""
    if not hoists(arrangement):
        return 0
    blocks = model.component(TRANSFORMER).blocks
    width = sum(block.parameters.modulation for block in blocks) // model.architecture.hidden_size
    return picture.batch * min(picture.steps, HOISTED_STEPS) * width * _item_bytes(arrangement, TRANSFORMER)


def _denoise_activations(model: Model, arrangement: Arrangement, priors: Priors, picture: Picture) -> int:
    """Peak bytes of one denoise step beside the weights."""
    share = priors.compiled_activations if arrangement.compiled else 1.0
    unit = _denoise_numbers(model, picture) * _item_bytes(arrangement, TRANSFORMER)
    return int(priors.denoise_activations * share * unit)


def _denoise_numbers(model: Model, picture: Picture) -> int:
    """In the tokens of all pictures of a batch, each of the hidden size."""
    tokens = picture.text_tokens + image_tokens(model.architecture, picture.width, picture.height)
    return tokens * model.architecture.hidden_size * picture.batch


def _decode_activations(model: Model, arrangement: Arrangement, priors: Priors, picture: Picture) -> int:
    # Pictures of a batch are decoded one at a time. The widest tensors at full resolution have the channels of the
    # level below, before the first residual block of the last level narrows them.
    channels = model.architecture.vae_channels
    side = TILE_PIXELS if arrangement.tile_decode else max(picture.width, picture.height)
    pixels = min(picture.width, side) * min(picture.height, side)
    item = _item_bytes(arrangement, "vae")
    unit = pixels * channels[min(1, len(channels) - 1)] * item
    wide = priors.float32_decode if item == Precision.FLOAT32.item_bytes else 1.0
    return int(priors.decode_activations * wide * unit)


def _item_bytes(arrangement: Arrangement, name: str) -> int:
    return arrangement.component(name).arithmetic.item_bytes
