"""What a person might type to get a scene: many templates, synonyms, and details left out."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from tools.sample_model.scenes import Background, Scene, Thing, are_as_usual

SHAPE_WORDS = {
    "circle": ("circle", "circle", "circle", "disc", "round disc"),
    "square": ("square", "square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star", "star", "five-pointed star"),
    "diamond": ("diamond", "diamond", "rhombus"),
    "hexagon": ("hexagon",),
    "ring": ("ring", "ring", "donut"),
    "cross": ("cross", "cross", "plus sign"),
    "heart": ("heart", "heart", "heart shape"),
    "crescent": ("crescent", "crescent", "crescent moon"),
}
COLOUR_WORDS = {"gray": ("gray", "grey"), "purple": ("purple", "purple", "violet"), "cyan": ("cyan", "turquoise")}
SIZE_WORDS = {
    "small": ("small", "small", "little", "tiny"),
    "medium": ("medium", "medium-sized"),
    "large": ("large", "large", "big", "huge"),
}
_CENTRE = ("in the centre", "in the center", "in the middle")
_SIDES = {"top": ("top", "upper"), "bottom": ("bottom", "lower")}

SAYS_SIZE, SAYS_MEDIUM, SAYS_PLACE, SAYS_BACKGROUND = 0.8, 0.25, 0.65, 0.88
"""How often a caption mentions each."""

LEAVES_USUAL_PLACES_OUT = 0.5


class Content(NamedTuple):
    """Words for the things of a scene, the things in the order named, and whether the words say where they are."""

    words: str
    things: tuple[Thing, ...]
    says_place: bool


def caption(scene: Scene, rng: random.Random) -> str:
    """One caption; what it does not mention may be anything."""
    return _finished(_content(scene, rng), scene, rng)


def training_caption(scene: Scene, rng: random.Random) -> str:
    """One caption that leaves places out only where things are where one expects them.

    A model that learns that a caption without places may mean any of them draws a mixture of them: a thing twice, or
    half of it.
    """
    if rng.random() < LEAVES_USUAL_PLACES_OUT and are_as_usual(scene.things):
        return _finished(_some_content(scene, rng, lambda c: not c.says_place and are_as_usual(c.things)), scene, rng)
    return _finished(_some_content(scene, rng, lambda c: c.says_place), scene, rng)


def _some_content(scene: Scene, rng: random.Random, fits: Callable[[Content], bool]) -> Content:
    return next(content for content in iter(lambda: _content(scene, rng), None) if fits(content))


def _content(scene: Scene, rng: random.Random) -> Content:
    return _one(scene.things[0], rng) if len(scene.things) == 1 else _two(scene.things[0], scene.things[1], rng)


def _finished(content: Content, scene: Scene, rng: random.Random) -> str:
    words = content.words
    if rng.random() < SAYS_BACKGROUND:
        words = _with_background(words, scene.background, rng)
    return _styled(words, rng)


def name(thing: Thing, rng: random.Random) -> str:
    """The thing with its article: `a small red circle`."""
    says_size = rng.random() < (SAYS_MEDIUM if thing.size == "medium" else SAYS_SIZE)
    words = [rng.choice(SIZE_WORDS[thing.size])] if says_size else []
    words += [_colour(thing.colour, rng), rng.choice(SHAPE_WORDS[thing.shape])]
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words] if rng.random() < 0.9 else words)


def place(where: str, rng: random.Random) -> str:
    """The place in words: `in the top left corner`."""
    if where == "centre":
        return rng.choice(_CENTRE)
    words = where.split()
    vertical = rng.choice(_SIDES[words[0]]) if words[0] in _SIDES else ""
    if len(words) == 2:
        return f"in the {vertical} {words[1]}" + rng.choice((" corner", " corner", ""))
    if vertical:
        return rng.choice((f"at the {where}", f"near the {where}", f"in the {vertical} part"))
    return rng.choice((f"on the {where}", f"at the {where}", f"on the {where} side"))


def _one(thing: Thing, rng: random.Random) -> Content:
    if rng.random() >= SAYS_PLACE:
        return Content(name(thing, rng), (thing,), says_place=False)
    where = place(thing.place, rng)
    words = f"{name(thing, rng)} {where}" if rng.random() < 0.8 else f"{where} {name(thing, rng)}"
    return Content(words, (thing,), says_place=True)


def _two(first: Thing, second: Thing, rng: random.Random) -> Content:
    if rng.random() < 0.5:
        first, second = second, first
    draw = rng.random()
    relation = _relation(first, second, rng)
    if draw < 0.45 and relation:
        words = f"{name(first, rng)} {relation} {name(second, rng)}"
    elif draw < 0.8:
        joined = rng.choice((" and ", " and ", ", "))
        words = f"{name(first, rng)} {place(first.place, rng)}{joined}{name(second, rng)} {place(second.place, rng)}"
    else:
        words = f"{name(first, rng)} and {name(second, rng)}"
    return Content(words, (first, second), says_place=draw < 0.8)


def _relation(first: Thing, second: Thing, rng: random.Random) -> str:
    dx, dy = second.x - first.x, second.y - first.y
    if abs(dx) > 1.5 * abs(dy):
        side = "left" if dx > 0 else "right"
        return rng.choice((f"to the {side} of", f"{side} of", f"on the {side} of"))
    if abs(dy) > 1.5 * abs(dx):
        return rng.choice(("above", "over", "on top of")) if dy > 0 else rng.choice(("below", "under", "beneath"))
    return ""


def _with_background(content: str, background: Background, rng: random.Random) -> str:
    behind = _behind(background, rng)
    draw = rng.random()
    if draw < 0.75:
        return f"{content} on {behind}"
    if draw < 0.87:
        return f"{content}, {behind.removeprefix('a ').removeprefix('an ')}"
    return f"on {behind}, {content}"


def _behind(background: Background, rng: random.Random) -> str:
    colours = [_colour(colour, rng) for colour in background.colours]
    if background.kind == "plain":
        return _article(
            rng.choice((f"{colours[0]} background", f"{colours[0]} background", f"plain {colours[0]} background"))
        )
    first, second = colours if rng.random() < 0.6 or background.kind in ("gradient", "dots") else colours[::-1]
    phrases = {
        "gradient": (
            f"gradient from {first} to {second}",
            f"{first} to {second} gradient",
            f"{first} and {second} gradient",
        ),
        "stripes": (f"{first} and {second} striped background", f"background of {first} and {second} stripes"),
        "checkerboard": (f"{first} and {second} checkerboard", f"{first} and {second} checkered background"),
        "dots": (f"{first} background with {second} dots", f"{first} background with {second} polka dots"),
    }
    return _article(rng.choice(phrases[background.kind]))


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _colour(colour: str, rng: random.Random) -> str:
    *tint, base = colour.split()
    return " ".join([*tint, rng.choice(COLOUR_WORDS.get(base, (base,)))])


def _styled(content: str, rng: random.Random) -> str:
    opening = rng.choice(("a picture of ", "an image of ", "draw ", "a drawing of ")) if rng.random() < 0.15 else ""
    text = opening + content
    draw = rng.random()
    if draw < 0.25:
        text = text[0].upper() + text[1:]
    elif draw < 0.28:
        text = text.upper()
    return text + "." if rng.random() < 0.2 else text
