"""Finding coloured shapes in a picture by image analysis, to judge what a model drew.

Shares nothing with the code that draws the training pictures: what is behind is learned from the picture's own border,
a colour is the nearest of twelve prototypes in CIE Lab, a shape is the silhouette that covers the found one best.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

Mask = NDArray[np.bool_]

PROTOTYPES = {
    "red": (217, 38, 41),
    "orange": (245, 133, 31),
    "yellow": (250, 213, 46),
    "green": (46, 160, 70),
    "cyan": (46, 200, 212),
    "blue": (38, 82, 212),
    "purple": (132, 54, 180),
    "pink": (246, 133, 186),
    "brown": (120, 72, 36),
    "white": (248, 248, 248),
    "black": (20, 20, 22),
    "gray": (136, 136, 139),
}

BORDER = 12
"""Pixels along the edge that are taken for background, at 256 pixels."""
STANDS_OUT = 21.0
"""CIE76 distance to every background colour from which a pixel belongs to a thing."""
SEEN_SHARE = 0.003
"""A colour that fewer of the border's pixels have is the blur between two others."""
FLAT = 14.0
"""Largest difference in Lab between neighbours away from an edge."""
SMALLEST_SHARE = 0.003
"""Share of the picture that a thing covers at least."""
SIDE, SPREAD = 96, 26.0
"""Silhouettes are compared on a square of this side, scaled so that the root of their area is this many pixels."""
CLEAR = 0.72
"""Overlap (intersection over union) from which a silhouette counts as one of the shapes."""


@dataclass(frozen=True)
class Found:
    """A thing in a picture; position and radius are parts of the picture's width."""

    colour: str
    shape: str
    overlap: float
    x: float
    y: float
    radius: float


def find(picture: NDArray[np.uint8]) -> list[Found]:
    """All things in an RGB picture (height, width, 3), left to right."""
    lab = _lab(picture)
    foreground = _foreground(lab)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(foreground.astype(np.uint8), connectivity=8)
    smallest = SMALLEST_SHARE * foreground.size
    masks = [labels == i for i in range(1, count) if stats[i, cv2.CC_STAT_AREA] >= smallest]
    return sorted((_describe(mask, lab) for mask in masks), key=lambda found: found.x)


def border_colours(picture: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The Lab colours of the background, one row each."""
    return _border_colours(_lab(picture))


def lab_of(rgb: tuple[float, float, float]) -> NDArray[np.float64]:
    """CIE Lab of one sRGB colour in 0..255."""
    return _lab(np.array([[rgb]], dtype=np.uint8))[0, 0]


def _lab(picture: NDArray[np.uint8]) -> NDArray[np.float64]:
    converted = cv2.cvtColor(np.ascontiguousarray(picture).astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    return converted.astype(np.float64)


def _border_colours(lab: NDArray[np.float64]) -> NDArray[np.float64]:
    width = max(2, round(BORDER * min(lab.shape[:2]) / 256))
    edge = np.ones(lab.shape[:2], dtype=bool)
    edge[width:-width, width:-width] = False
    # Where two background colours meet, the pixels between have neither; a thing may well have the colour between.
    lightness = lab.astype(np.float32)
    rise = cv2.dilate(lightness, np.ones((3, 3))) - cv2.erode(lightness, np.ones((3, 3)))
    even = edge & (np.linalg.norm(rise, axis=2) < FLAT)
    cells, counts = np.unique(np.round(lab[even if even.any() else edge] / 4), axis=0, return_counts=True)
    kept: NDArray[np.float64] = cells[counts >= SEEN_SHARE * edge.sum()] * 4
    return kept if len(kept) else cells[[counts.argmax()]] * 4


def _foreground(lab: NDArray[np.float64]) -> Mask:
    distance, _ = cKDTree(_border_colours(lab)).query(lab.reshape(-1, 3))
    mask = (distance.reshape(lab.shape[:2]) > STANDS_OUT).astype(np.uint8)
    opened = cv2.morphologyEx(mask, cv2.MORPH_OPEN, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3)))
    return opened.astype(bool)


def _describe(mask: Mask, lab: NDArray[np.float64]) -> Found:
    inner = cv2.erode(mask.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
    colour = np.median(lab[inner if inner.any() else mask], axis=0)
    names = list(PROTOTYPES)
    gaps = [np.linalg.norm(colour - lab_of(PROTOTYPES[name])) for name in names]
    overlaps = _overlaps(mask)
    shape = max(overlaps, key=lambda name: overlaps[name])
    rows, columns = np.nonzero(mask)
    width = mask.shape[1]
    return Found(
        colour=names[int(np.argmin(gaps))],
        shape=shape if overlaps[shape] >= CLEAR else "unclear",
        overlap=overlaps[shape],
        x=(columns.min() + columns.max()) / 2 / width,
        y=(rows.min() + rows.max()) / 2 / width,
        radius=math.sqrt(mask.sum() / _UNIT_AREA[shape]) / width,
    )


def _overlaps(mask: Mask) -> dict[str, float]:
    """For each shape the best overlap of its silhouettes, slightly turned, with the mask."""
    seen = _normalized(mask)
    return {shape: max(_overlap(seen, template) for template in _templates(shape)) for shape in _OUTLINES}


def _overlap(first: Mask, second: Mask) -> float:
    return float((first & second).sum() / (first | second).sum())


def _normalized(mask: Mask) -> Mask:
    """The silhouette with its centroid in the middle and a fixed area."""
    image = mask.astype(np.float32)
    moments = cv2.moments(image)
    scale = SPREAD / math.sqrt(moments["m00"])
    x, y = moments["m10"] / moments["m00"], moments["m01"] / moments["m00"]
    matrix = np.array([[scale, 0, SIDE / 2 - scale * x], [0, scale, SIDE / 2 - scale * y]])
    warped = cv2.warpAffine(image, matrix, (SIDE, SIDE), flags=cv2.INTER_LINEAR)
    return np.asarray(warped > 0.5)


def _polygon(points: list[tuple[float, float]]) -> Mask:
    canvas = np.zeros((400, 400), np.uint8)
    corners = np.round((np.array(points) * 150 + 200) * 16).astype(np.int32)
    cv2.fillPoly(canvas, [corners], 1, shift=4)
    return canvas.astype(bool)


def _regular(corners: int, start: float) -> list[tuple[float, float]]:
    angles = [start + 2 * math.pi * i / corners for i in range(corners)]
    return [(math.cos(a), math.sin(a)) for a in angles]


def _star() -> Mask:
    outer, inner = _regular(5, -math.pi / 2), _regular(5, -math.pi / 2 + math.pi / 5)
    return _polygon([p for o, (x, y) in zip(outer, inner, strict=True) for p in (o, (0.44 * x, 0.44 * y))])


def _disc(x: float = 0.0, y: float = 0.0, radius: float = 1.0) -> Mask:
    return _polygon([(x + radius * a, y + radius * b) for a, b in _regular(120, 0.0)])


def _cross() -> Mask:
    arm = 0.33
    return _polygon([(-arm, -1), (arm, -1), (arm, 1), (-arm, 1)]) | _polygon(
        [(-1, -arm), (1, -arm), (1, arm), (-1, arm)]
    )


def _heart() -> Mask:
    lobe = 0.5
    body = _polygon([(0, 1.0), (-0.87, 0.1), (-0.5, -0.25), (0, -0.3), (0.5, -0.25), (0.87, 0.1)])
    return body | _disc(-0.46, -0.22, lobe) | _disc(0.46, -0.22, lobe)


_OUTLINES = {
    "circle": _disc,
    "square": lambda: _polygon([(-1, -1), (1, -1), (1, 1), (-1, 1)]),
    "triangle": lambda: _polygon(_regular(3, -math.pi / 2)),
    "star": _star,
    "diamond": lambda: _polygon([(0, -1), (0.65, 0), (0, 1), (-0.65, 0)]),
    "hexagon": lambda: _polygon(_regular(6, 0.0)),
    "ring": lambda: _disc() & ~_disc(radius=0.58),
    "cross": _cross,
    "heart": _heart,
    "crescent": lambda: _disc() & ~_disc(x=0.5, radius=0.84),
}

_UNIT_AREA = {
    "circle": math.pi,
    "square": 2.96,
    "triangle": 1.66,
    "star": 1.57,
    "diamond": 1.52,
    "hexagon": 2.82,
    "ring": 2.12,
    "cross": 2.02,
    "heart": 2.6,
    "crescent": 1.46,
}
"""Area of each shape whose size people would call 1, in squares of that size."""

_TURNS = (-12.0, -8.0, -4.0, 0.0, 4.0, 8.0, 12.0)


@cache
def _templates(shape: str) -> tuple[Mask, ...]:
    upright = _OUTLINES[shape]().astype(np.float32)
    turned = [cv2.warpAffine(upright, cv2.getRotationMatrix2D((200, 200), turn, 1), (400, 400)) for turn in _TURNS]
    return tuple(_normalized(np.asarray(picture > 0.5)) for picture in turned)
