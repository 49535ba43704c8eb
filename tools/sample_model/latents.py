"""What a picture's latents are: fixed, not learned, so that a small transformer learns them easily.

A latent describes 8x8 pixels by the corner of their discrete cosine transform, as JPEG does: eight numbers for
brightness and four for each of the two colour differences. Neighbours resemble each other and a shape is seen at high
noise already, which codes that an autoencoder makes up for itself do not offer. The inverse transform alone gives back
a recognizable picture; the trained decoder only has to sharpen edges.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor, nn

CELL = 8
"""Side of the pixels that one latent describes."""

_BRIGHTNESS_AND_COLOUR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
"""ITU-R BT.601, as in JPEG: brightness, blue difference, red difference from red, green, blue."""

_COEFFICIENTS: tuple[tuple[int, int, int, float], ...] = (
    (0, 0, 0, 4.35), (1, 0, 0, 2.09), (2, 0, 0, 2.08),
    (0, 0, 1, 0.72), (0, 1, 0, 0.71), (0, 1, 1, 0.30),
    (0, 0, 2, 0.32), (0, 2, 0, 0.31), (0, 1, 2, 0.17), (0, 2, 1, 0.17),
    (1, 0, 1, 0.33), (1, 1, 0, 0.32), (1, 1, 1, 0.15),
    (2, 0, 1, 0.33), (2, 1, 0, 0.32), (2, 1, 1, 0.14),
)  # fmt: skip
"""For each channel: brightness or which colour difference, waves down and across, and the standard deviation over drawn
scenes with pixels in -1..1."""

CHANNELS = len(_COEFFICIENTS)


def latents_of(pictures: Tensor) -> Tensor:
    """Latents (batch, 16, h/8, w/8) of pictures (batch, 3, h, w) in -1..1.

    Each channel is divided by the root of its standard deviation: half way to equal weight, so that what is coarse
    still stands out of the noise first, and edges do so well before the last step.
    """
    return nn.functional.conv2d(pictures, _kernel(pictures.device).to(pictures.dtype), stride=CELL)


@cache
def _kernel(device: torch.device) -> Tensor:
    """(16, 3, 8, 8). On each device only once: a copy to it could not be recorded in a CUDA graph."""
    waves = _cosines()
    rows = [
        torch.tensor(_BRIGHTNESS_AND_COLOUR[part])[:, None, None] * (waves[down][:, None] * waves[across]) / spread**0.5
        for part, down, across, spread in _COEFFICIENTS
    ]
    return torch.stack(rows).to(device)


def _cosines() -> Tensor:
    """The orthonormal DCT-II of eight values, one wave a row."""
    wave, place = torch.arange(CELL)[:, None], torch.arange(CELL)[None]
    rows = torch.cos(math.pi * (place + 0.5) * wave / CELL) * math.sqrt(2 / CELL)
    rows[0] /= math.sqrt(2)
    return rows
