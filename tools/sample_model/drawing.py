"""Scenes to pixels, many at once: signed distances to edges, so that every edge is smooth at any size."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tools.sample_model.palette import BACKGROUNDS, SHAPES
from tools.sample_model.scenes import Background, Scene, Thing

THING_FIELDS = 8
BACKGROUND_FIELDS = 11
ROW_FIELDS = 2 * THING_FIELDS + BACKGROUND_FIELDS


def row(scene: Scene) -> list[float]:
    """The scene as numbers, which is all that drawing needs."""
    numbers = [number for thing in scene.things for number in _thing_numbers(thing)]
    numbers += [0.0] * (2 * THING_FIELDS - len(numbers))
    return numbers + _background_numbers(scene.background)


def rows(scenes: Sequence[Scene]) -> Tensor:
    """One row a scene."""
    return torch.tensor([row(scene) for scene in scenes], dtype=torch.float32)


def _thing_numbers(thing: Thing) -> list[float]:
    rgb = [value / 255 for value in thing.rgb]
    return [float(SHAPES.index(thing.shape)), *rgb, thing.x, thing.y, thing.radius, thing.angle]


def _background_numbers(background: Background) -> list[float]:
    first, second = background.rgbs[0], background.rgbs[-1]
    colours = [value / 255 for value in (*first, *second)]
    kind = float(BACKGROUNDS.index(background.kind))
    return [kind, *colours, background.angle, background.period, *background.phase]


def draw(numbers: Tensor, height: int = 256, width: int = 256) -> Tensor:
    """Pictures (scenes, 3, height, width) with values in -1..1."""
    device = numbers.device
    y, x = torch.meshgrid(
        torch.arange(height, device=device, dtype=torch.float32) + 0.5,
        torch.arange(width, device=device, dtype=torch.float32) + 0.5,
        indexing="ij",
    )
    picture = _draw_background(numbers[:, 2 * THING_FIELDS :], x, y)
    for index in range(2):
        thing = numbers[:, index * THING_FIELDS : (index + 1) * THING_FIELDS]
        picture = _draw_thing(picture, thing, x, y)
    return picture * 2 - 1


def _field(numbers: Tensor, index: int) -> Tensor:
    return numbers[:, index, None, None]


def _cover(distance: Tensor) -> Tensor:
    """How much of a pixel lies inside, from the signed distance in pixels (negative inside)."""
    return (0.5 - distance).clamp(0, 1)


def _draw_thing(picture: Tensor, thing: Tensor, x: Tensor, y: Tensor) -> Tensor:
    height, width = x.shape
    radius = _field(thing, 6) * min(height, width)
    scale = radius.clamp(min=1e-3)
    u, v = (x - _field(thing, 4) * width) / scale, (y - _field(thing, 5) * height) / scale
    cos, sin = torch.cos(_field(thing, 7)), torch.sin(_field(thing, 7))
    distance = _distance(_field(thing, 0), cos * u + sin * v, cos * v - sin * u)
    cover = _cover(distance * scale) * (radius > 0)
    return torch.lerp(picture, thing[:, 1:4, None, None], cover[:, None])


def _distance(shape: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Signed distance to the edge of each row's shape, in radii."""
    distance = torch.full_like(u, 1e3)
    for index, name in enumerate(SHAPES):
        distance = torch.where(shape == index, _DISTANCES[name](u, v), distance)
    return distance


def _box(u: Tensor, v: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(u.abs() - half_width, v.abs() - half_height)


def _disc(u: Tensor, v: Tensor, radius: float) -> Tensor:
    return torch.sqrt(u * u + v * v + 1e-9) - radius


def _circle(u: Tensor, v: Tensor) -> Tensor:
    return _disc(u, v, 1.0)


def _square(u: Tensor, v: Tensor) -> Tensor:
    return _box(u, v, 0.86, 0.86)


def _triangle(u: Tensor, v: Tensor) -> Tensor:
    """Equilateral, point up."""
    down = v - 0.12
    slope = math.sqrt(3) / 2 * u.abs() - 0.5 * down
    return torch.maximum(slope, down) - 0.56


def _star(u: Tensor, v: Tensor) -> Tensor:
    """Five points, one of them up; folded into half of one point, whose edge is a straight line."""
    sector = 2 * math.pi / 5
    angle = torch.atan2(u, -v)
    folded = (angle - sector * torch.round(angle / sector)).abs()
    length = torch.sqrt(u * u + v * v + 1e-9)
    p, q = length * torch.cos(folded), length * torch.sin(folded)
    tip, inner = 1.1, 0.48
    px, qx = inner * math.cos(sector / 2), inner * math.sin(sector / 2)
    norm = math.hypot(tip - px, qx)
    return ((p - tip) * qx + q * (tip - px)) / norm


def _diamond(u: Tensor, v: Tensor) -> Tensor:
    """Taller than wide, so that no turned square is one."""
    half_width, half_height = 0.7, 1.08
    norm = math.hypot(half_width, half_height)
    return (u.abs() * half_height + v.abs() * half_width - half_width * half_height) / norm


def _hexagon(u: Tensor, v: Tensor) -> Tensor:
    """Flat top and bottom."""
    return torch.maximum(v.abs(), math.sqrt(3) / 2 * u.abs() + 0.5 * v.abs()) - 0.9


def _ring(u: Tensor, v: Tensor) -> Tensor:
    return _disc(u, v, 0.79).abs() - 0.21


def _cross(u: Tensor, v: Tensor) -> Tensor:
    return torch.minimum(_box(u, v, 0.96, 0.31), _box(u, v, 0.31, 0.96))


def _heart(u: Tensor, v: Tensor) -> Tensor:
    """A square on its corner and a disc on each upper side."""
    half = 0.6
    low = v - 0.12
    square = (u.abs() + low.abs() - half * math.sqrt(2)) / math.sqrt(2)
    offset = half / math.sqrt(2)
    discs = _disc(u.abs() - offset, low + offset, half)
    return torch.minimum(square, discs)


def _crescent(u: Tensor, v: Tensor) -> Tensor:
    """A disc less a disc: open to the right."""
    left = u - 0.18
    return torch.maximum(_disc(left, v, 1.0), -_disc(left - 0.5, v, 0.84))


_DISTANCES = {
    "circle": _circle, "square": _square, "triangle": _triangle, "star": _star, "diamond": _diamond,
    "hexagon": _hexagon, "ring": _ring, "cross": _cross, "heart": _heart, "crescent": _crescent,
}  # fmt: skip


def _draw_background(numbers: Tensor, x: Tensor, y: Tensor) -> Tensor:
    height, width = x.shape
    kind, angle = _field(numbers, 0), _field(numbers, 7)
    period, phase_x, phase_y = _field(numbers, 8) * min(height, width), _field(numbers, 9), _field(numbers, 10)
    across, along = torch.cos(angle), torch.sin(angle)
    second = torch.zeros_like(kind * x)
    second = torch.where(kind == 1, _blend(x / width, y / height, across, along), second)
    second = torch.where(kind == 2, _stripes((across * x + along * y) / period + phase_x, period), second)
    second = torch.where(kind == 3, _checks(x / period + phase_x, y / period + phase_y, period), second)
    second = torch.where(kind == 4, _dots(x / period + phase_x, y / period + phase_y, period), second)
    return torch.lerp(numbers[:, 1:4, None, None], numbers[:, 4:7, None, None], second[:, None])


def _blend(x: Tensor, y: Tensor, across: Tensor, along: Tensor) -> Tensor:
    """From 0 to 1 over the canvas in the given direction."""
    return (across * x + along * y) / (across + along).clamp(min=1e-3)


def _wave(turns: Tensor) -> Tensor:
    """Distance to the nearest edge of a square wave, in periods: negative in its first half."""
    return 0.25 - (turns - torch.floor(turns) - 0.5).abs()


def _stripes(turns: Tensor, period: Tensor) -> Tensor:
    return _cover(_wave(turns) * period)


def _checks(turns_x: Tensor, turns_y: Tensor, period: Tensor) -> Tensor:
    one, other = _cover(_wave(turns_x) * period), _cover(_wave(turns_y) * period)
    return one + other - 2 * one * other


def _dots(turns_x: Tensor, turns_y: Tensor, period: Tensor) -> Tensor:
    """Every second row is shifted by half a period."""
    line = torch.floor(turns_y)
    u = turns_x + 0.5 * (line - 2 * torch.floor(line / 2))
    du, dv = u - torch.floor(u) - 0.5, turns_y - line - 0.5
    return _cover(_disc(du, dv, 0.21) * period)
