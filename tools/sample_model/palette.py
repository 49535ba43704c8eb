"""The words of the sample model's small world, and the colour each colour word is drawn in."""

from functools import cache

import numpy as np
from numpy.typing import NDArray

Rgb = tuple[float, float, float]

SHAPES = ("circle", "square", "triangle", "star", "diamond", "hexagon", "ring", "cross", "heart", "crescent")
SIZES = ("small", "medium", "large")
PLACES = ("centre", "left", "right", "top", "bottom", "top left", "top right", "bottom left", "bottom right")
BACKGROUNDS = ("plain", "gradient", "stripes", "checkerboard", "dots")

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (218, 38, 40),
    "orange": (246, 134, 30),
    "yellow": (250, 212, 44),
    "green": (44, 160, 70),
    "cyan": (44, 200, 214),
    "blue": (38, 82, 214),
    "purple": (132, 52, 180),
    "pink": (246, 132, 186),
    "brown": (120, 72, 36),
    "white": (249, 249, 249),
    "black": (20, 20, 23),
    "gray": (136, 136, 140),
}

TINTS: dict[str, tuple[int, int, int]] = {
    "light blue": (176, 206, 250),
    "light green": (186, 232, 190),
    "light yellow": (254, 244, 186),
    "light purple": (218, 196, 244),
    "light pink": (253, 216, 230),
    "light gray": (212, 212, 216),
    "dark blue": (18, 34, 96),
    "dark green": (14, 74, 40),
    "dark red": (110, 16, 26),
    "dark purple": (62, 22, 92),
    "dark gray": (66, 66, 70),
}

BACKGROUND_COLOURS: dict[str, tuple[int, int, int]] = {**COLOURS, **TINTS}

CLEAR_DIFFERENCE = 42.0
"""Smallest CIE76 distance between a thing and anything behind it: below it even people hesitate."""

_D65 = np.array([0.95047, 1.0, 1.08883])
_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
)


def lab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """CIE L*a*b* (D65) of sRGB values in 0..255; the last axis holds the channels."""
    value = rgb / 255.0
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    ratio = linear @ _TO_XYZ.T / _D65
    root = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.stack(
        [116 * root[..., 1] - 16, 500 * (root[..., 0] - root[..., 1]), 200 * (root[..., 1] - root[..., 2])], axis=-1
    )


@cache
def difference(first: str, second: str) -> float:
    """CIE76 distance between two named colours."""
    pair = lab(np.array([BACKGROUND_COLOURS[first], BACKGROUND_COLOURS[second]], dtype=np.float64))
    return float(np.linalg.norm(pair[0] - pair[1]))


@cache
def stands_out(colour: str, behind: tuple[str, ...], *, blended: bool) -> bool:
    """Whether a thing of this colour is clear on these background colours (and on what lies between, if blended)."""
    ends = np.array([BACKGROUND_COLOURS[name] for name in behind], dtype=np.float64)
    weights = np.linspace(0, 1, 9)[:, None]
    seen = ends[0] * (1 - weights) + ends[-1] * weights if blended else ends
    gaps = np.linalg.norm(lab(seen) - lab(np.array(COLOURS[colour], dtype=np.float64)), axis=-1)
    return bool(gaps.min() >= CLEAR_DIFFERENCE)
