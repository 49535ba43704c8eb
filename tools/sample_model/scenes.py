"""What a picture shows: one or two things on a background, drawn at random from a seed.

>>> scene = random_scene(random.Random(7))
>>> len(scene.things) in (1, 2)
True
"""

import hashlib
import math
import random
from dataclasses import dataclass, replace

from tools.sample_model.palette import (
    BACKGROUND_COLOURS,
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    Rgb,
    difference,
    stands_out,
)

MARGIN = 0.06
"""Nothing comes closer to the edge than this part of the canvas."""
GAP = 0.05
"""Two things are at least this part of the canvas apart."""
HELD_OUT_TENTHS = 1
"""Of ten combinations, how many no training picture shows."""

USUAL_PLACES = {1: ("centre",), 2: ("left", "right")}
"""Where one expects so many things when nothing is said: in the order named."""
USUALLY_PLACED = 0.5
"""Training scenes whose things are put there."""

RADII = {"small": (0.09, 0.115), "medium": (0.15, 0.185), "large": (0.235, 0.265)}
_NEUTRALS = ("white", "light gray", "black", "dark gray", "light blue", "light yellow")
_OPPOSITE = {
    "left": "right", "right": "left", "top": "bottom", "bottom": "top",
    "top left": "bottom right", "bottom right": "top left", "top right": "bottom left", "bottom left": "top right",
}  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """One shape; `x`, `y` and `radius` are parts of the canvas, `angle` is in radians."""

    shape: str
    colour: str
    size: str
    place: str
    x: float
    y: float
    radius: float
    angle: float
    rgb: Rgb


@dataclass(frozen=True)
class Background:
    """What is behind: one colour, or two in a pattern; `period` and `phase` are parts of the canvas."""

    kind: str
    colours: tuple[str, ...]
    rgbs: tuple[Rgb, ...]
    angle: float
    period: float
    phase: tuple[float, float]


@dataclass(frozen=True)
class Scene:
    """One picture's content."""

    things: tuple[Thing, ...]
    background: Background

    @property
    def combination(self) -> str:
        """What the held-out split goes by: a thing with its background's colours, or the pair of things."""
        names = sorted(f"{thing.colour} {thing.shape}" for thing in self.things)
        if len(names) == 1:
            names.append("on " + " and ".join(sorted(self.background.colours)))
        return "; ".join(names)


def held_out(scene: Scene) -> bool:
    """Whether training never sees this scene's combination. The one place where the split is made."""
    digest = hashlib.blake2b(scene.combination.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 10 < HELD_OUT_TENTHS


def training_scene(rng: random.Random) -> Scene:
    """A random scene of a combination that training may see, often with its things where one expects them."""
    scene = next(scene for scene in iter(lambda: random_scene(rng), None) if not held_out(scene))
    return _as_usual(rng, scene) if rng.random() < USUALLY_PLACED else scene


def are_as_usual(things: tuple[Thing, ...]) -> bool:
    """Whether things, in the order named, are where one expects them when nothing is said."""
    return tuple(thing.place for thing in things) == USUAL_PLACES[len(things)]


def _as_usual(rng: random.Random, scene: Scene) -> Scene:
    """The scene with its things where one expects them, or as it is if they do not fit there."""
    places = USUAL_PLACES[len(scene.things)]
    things = tuple(_put(rng, replace(t, place=place)) for t, place in zip(scene.things, places, strict=True))
    return replace(scene, things=things) if len(things) == 1 or _apart(*things) else scene


def held_out_scene(rng: random.Random) -> Scene:
    """A random scene of a combination that training never sees."""
    return next(scene for scene in iter(lambda: random_scene(rng), None) if held_out(scene))


def random_scene(rng: random.Random) -> Scene:
    """One or two things that do not touch, on a background from which they stand out."""
    background = _background(rng)
    colours = [name for name in COLOURS if stands_out(name, background.colours, blended=background.kind == "gradient")]
    if not colours:
        return random_scene(rng)
    things = (_thing(rng, colours),) if rng.random() < 0.4 else _pair(rng, colours)
    return Scene(things, background)


def _jitter(rng: random.Random, colour: str) -> Rgb:
    """The colour, a little off: brightness and each channel."""
    shade = rng.gauss(0, 4)
    red, green, blue = (min(255.0, max(0.0, value + shade + rng.gauss(0, 3))) for value in BACKGROUND_COLOURS[colour])
    return red, green, blue


def _background(rng: random.Random) -> Background:
    kind = "plain" if rng.random() < 0.4 else rng.choice(BACKGROUNDS[1:])
    first = rng.choice(tuple(BACKGROUND_COLOURS))
    colours = (first,) if kind == "plain" else (first, _partner(rng, first))
    return Background(
        kind,
        colours,
        tuple(_jitter(rng, name) for name in colours),
        angle=_angle(rng, kind),
        period={"stripes": rng.uniform(0.11, 0.22), "checkerboard": rng.uniform(0.2, 0.34)}.get(
            kind, rng.uniform(0.1, 0.14)
        ),
        phase=(rng.random(), rng.random()),
    )


def _partner(rng: random.Random, first: str) -> str:
    """A second background colour, different enough to see the pattern."""
    names = _NEUTRALS if rng.random() < 0.5 else tuple(BACKGROUND_COLOURS)
    return rng.choice([name for name in names if difference(first, name) >= 22.0])


def _angle(rng: random.Random, kind: str) -> float:
    """Direction across the pattern: gradients go down, right or diagonally; stripes lie in four directions."""
    if kind in ("checkerboard", "dots"):
        return 0.0
    return rng.choice((0.0, 0.25, 0.5, 0.75 if kind == "stripes" else 0.5)) * math.pi


def _thing(rng: random.Random, colours: list[str], place: str | None = None, size: str | None = None) -> Thing:
    size = size or rng.choice(SIZES)
    colour = rng.choice(colours)
    thing = Thing(
        rng.choice(SHAPES),
        colour,
        size,
        place or rng.choice(PLACES),
        x=0.5,
        y=0.5,
        radius=rng.uniform(*RADII[size]),
        angle=max(-0.14, min(0.14, rng.gauss(0, 0.06))),
        rgb=_jitter(rng, colour),
    )
    return _put(rng, thing)


def _put(rng: random.Random, thing: Thing) -> Thing:
    """The thing, moved to its place, whole on the canvas."""
    room = thing.radius + MARGIN
    x = 0.25 if "left" in thing.place else 0.75 if "right" in thing.place else 0.5
    y = 0.25 if "top" in thing.place else 0.75 if "bottom" in thing.place else 0.5
    return replace(
        thing,
        x=min(1 - room, max(room, x + rng.gauss(0, 0.025))),
        y=min(1 - room, max(room, y + rng.gauss(0, 0.025))),
    )


def _pair(rng: random.Random, colours: list[str]) -> tuple[Thing, Thing]:
    """Two different things at two places, apart."""
    while True:
        places = _places(rng)
        first, second = (_thing(rng, colours, place, rng.choice(SIZES)) for place in places)
        if _apart(first, second) and (first.shape, first.colour) != (second.shape, second.colour):
            return first, second


def _apart(first: Thing, second: Thing) -> bool:
    return math.hypot(first.x - second.x, first.y - second.y) >= 1.08 * (first.radius + second.radius) + GAP


def _places(rng: random.Random) -> tuple[str, str]:
    """Two places, mostly opposite each other."""
    draw = rng.random()
    if draw < 0.35:
        first = rng.choice(("left", "right"))
    elif draw < 0.7:
        first = rng.choice(("top", "bottom"))
    elif draw < 0.85:
        first = rng.choice(("top left", "top right", "bottom left", "bottom right"))
    else:
        one, other = rng.sample(PLACES, 2)
        return one, other
    return first, _OPPOSITE[first]
