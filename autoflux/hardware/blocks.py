"""Blocks of FLUX.1's shape with random weights, and how long they compute for. Imports torch: for the child only.

The same products, norms, rotary positions, attention and activations in the same order as in diffusers'
`FluxTransformerBlock` and `FluxSingleTransformerBlock`, so that a block takes as long as there. Their modulation layers
are left out, because the engine computes those before the loop; what they put out is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoflux.hardware.device import Device, Findings, measured
from autoflux.hardware.products import FLUX_HIDDEN, HEAD_SIZE
from autoflux.hardware.rotation import rotate, rotates
from autoflux.hardware.timing import Call, climb, launch_seconds
from autoflux.hardware.values import (
    FLUX_IMAGE_TOKENS,
    FLUX_TEXT_TOKENS,
    BlockKind,
    BlockTiming,
    block_operations,
)

EPSILON = 1e-6

LARGEST_BLOCK_SECONDS = 0.5
"""At full size a block is 1.3 * 10^12 operations, and worth some waiting for: all else follows from it."""

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines (tokens, 128) in float32, each angle twice."""


@dataclass(frozen=True)
class Tokens:
    """How much a block is given, and how wide it is."""

    image: int
    text: int
    hidden_size: int = FLUX_HIDDEN

    @property
    def operations(self) -> float:
        return block_operations(self.hidden_size, self.image + self.text)


FEW = Tokens(image=16, text=16)
"""So few that the device has done what it was told before the host has told it the next."""

TOKENS = tuple(Tokens(FLUX_IMAGE_TOKENS // n, FLUX_TEXT_TOKENS // n) for n in (16, 4, 1))


class Heads(nn.Module):
    """(1, tokens, h) to queries, keys and values, each (1, tokens, heads, 128), the first two normed."""

    def __init__(self, hidden_size: int, **options: Any) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(hidden_size, hidden_size, **options) for _ in range(3))
        self.query_norm, self.key_norm = (nn.RMSNorm(HEAD_SIZE, eps=EPSILON, **options) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (layer(x).unflatten(-1, (-1, HEAD_SIZE)) for layer in (self.query, self.key, self.value))
        return self.query_norm(query), self.key_norm(key), value


class Stream(nn.Module):
    """One of a double block's two sides: image or text."""

    def __init__(self, hidden_size: int, **options: Any) -> None:
        super().__init__()
        self.heads = Heads(hidden_size, **options)
        self.out = nn.Linear(hidden_size, hidden_size, **options)
        self.widen = nn.Linear(hidden_size, 4 * hidden_size, **options)
        self.narrow = nn.Linear(4 * hidden_size, hidden_size, **options)

    def finish(self, x: Tensor, attended: Tensor, modulation: Sequence[Tensor]) -> Tensor:
        """What comes after attention. `modulation` is shift, scale, gate of attention, then of the feed-forward."""
        _, _, gate, shift, scale, last_gate = modulation
        x = x + gate * self.out(attended.contiguous())
        widened = functional.gelu(self.widen(_modulated(x, shift, scale)), approximate="tanh")
        finished: Tensor = x + last_gate * self.narrow(widened)
        return finished


class DoubleBlock(nn.Module):
    """Image and text with weights of their own, together only in attention."""

    def __init__(self, hidden_size: int, **options: Any) -> None:
        super().__init__()
        self.image = Stream(hidden_size, **options)
        self.text = Stream(hidden_size, **options)

    def forward(
        self, image: Tensor, text: Tensor, modulations: Sequence[Sequence[Tensor]], rotation: Rotation
    ) -> tuple[Tensor, Tensor]:
        """(1, tokens, h) each; `modulations` are the image's six (1, 1, h) and the text's."""
        of_image, of_text = modulations
        ours = self.image.heads(_modulated(image, *of_image[:2]))
        theirs = self.text.heads(_modulated(text, *of_text[:2]))
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(theirs, ours, strict=True))
        attended = _attend(query, key, value, rotation)
        text_out, image_out = torch.split(attended, [text.shape[1], image.shape[1]], dim=1)
        return self.image.finish(image, image_out, of_image), self.text.finish(text, text_out, of_text)


class SingleBlock(nn.Module):
    """Image and text as one, attention beside the feed-forward."""

    def __init__(self, hidden_size: int, **options: Any) -> None:
        super().__init__()
        self.heads = Heads(hidden_size, **options)
        self.widen = nn.Linear(hidden_size, 4 * hidden_size, **options)
        self.out = nn.Linear(5 * hidden_size, hidden_size, **options)

    def forward(
        self, image: Tensor, text: Tensor, modulations: Sequence[Sequence[Tensor]], rotation: Rotation
    ) -> tuple[Tensor, Tensor]:
        """(1, tokens, h) each; of the first of `modulations` shift, scale and gate (1, 1, h) are used."""
        shift, scale, gate, *_ = modulations[0]
        x = torch.cat([text, image], dim=1)
        normed = _modulated(x, shift, scale)
        widened = functional.gelu(self.widen(normed), approximate="tanh")
        query, key, value = self.heads(normed)
        attended = _attend(query, key, value, rotation)
        x = x + gate * self.out(torch.cat([attended, widened], dim=2))
        return x[:, text.shape[1] :], x[:, : text.shape[1]]


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=EPSILON) * (1 + scale) + shift


def _attend(query: Tensor, key: Tensor, value: Tensor, rotation: Rotation) -> Tensor:
    """(1, tokens, heads, 128) each to (1, tokens, h)."""
    query, key, value = (x.transpose(1, 2) for x in (_rotated(query, rotation), _rotated(key, rotation), value))
    return functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def _rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """Each pair of numbers turned by its angle, in float32."""
    if rotates(x):
        return rotate(x, *(angle[:, ::2] for angle in rotation))
    cosine, sine = (angle[None, :, None] for angle in rotation)
    even, odd = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (x.float() * cosine + turned.float() * sine).to(x.dtype)


BLOCKS: dict[BlockKind, Callable[..., nn.Module]] = {"double": DoubleBlock, "single": SingleBlock}


def timings(
    device: Device, precision: str, sizes: Sequence[Tokens], findings: Findings
) -> dict[BlockKind, BlockTiming]:
    """Sustained seconds of each kind of block at the largest of `sizes` that is quick enough."""
    return dict(_timings(device, precision, sizes, findings))


def _timings(
    device: Device, precision: str, sizes: Sequence[Tokens], findings: Findings
) -> Iterator[tuple[BlockKind, BlockTiming]]:
    for kind in BLOCKS:
        found = findings.attempt(f"a {kind} block", partial(_timing, device, precision, kind, sizes))
        if found:
            yield kind, found


def _timing(device: Device, precision: str, kind: BlockKind, sizes: Sequence[Tokens]) -> BlockTiming:
    options = {"device": device.name, "dtype": getattr(torch, precision)}
    with torch.inference_mode():
        block = BLOCKS[kind](sizes[0].hidden_size, **options)
        tokens, seconds = climb(
            sizes, partial(_call, block, options), device.synchronize, largest_seconds=LARGEST_BLOCK_SECONDS
        )
        few = replace(FEW, hidden_size=tokens.hidden_size)
        launching = launch_seconds(_call(block, options, few), device.synchronize)
    return BlockTiming(
        seconds=measured(seconds, f"{tokens.image} + {tokens.text} tokens, {precision}"),
        launch_seconds=measured(launching, "of the host"),
        precision=precision,
        hidden_size=tokens.hidden_size,
        image_tokens=tokens.image,
        text_tokens=tokens.text,
    )


def _call(block: nn.Module, options: dict[str, Any], tokens: Tokens) -> Call:
    image, text = (torch.randn(1, count, tokens.hidden_size, **options) for count in (tokens.image, tokens.text))
    modulations = [[torch.randn(1, 1, tokens.hidden_size, **options) for _ in range(6)] for _ in range(2)]
    angles = torch.rand(tokens.image + tokens.text, HEAD_SIZE, device=options["device"])
    return partial(block, image, text, modulations, (angles.cos(), angles.sin()))
