"""A drawing of a plan as SVG, for documents and pages: light and dark, safe for the colour-blind. Pure."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby, pairwise
from xml.etree import ElementTree as ET

from autoflux.planning.drawing import Drawing, DrawnBlock, DrawnPhase, Lane, Part, Stretch
from autoflux.units import format_bytes, format_seconds

WIDTH = 960
"""Of the view box; the picture scales to the room it gets."""

LEFT, RIGHT = 104, 936
"""Where bars begin and end."""

MEMORY_RIGHT = 836
"""Where bars of memory end, as their totals stand to the right."""

CHARACTER = 6.4
"""Width to reckon with for a character of 12 pixels' height, on the large side."""

COLOURS = {
    "context": ("#8d949e", "#8d949e"),
    "stays": ("#0072b2", "#56b4e9"),
    "streamed": ("#c97b00", "#e69f00"),
    "visits": ("#c4639c", "#cc79a7"),
    "activations": ("#009e73", "#1fb489"),
    "room": ("#e4e8ed", "#262d36"),
    "paper": ("#ffffff", "#11161c"),
    "ink": ("#1a2027", "#e8edf2"),
    "faint": ("#4d5763", "#a9b4c0"),
    "hatch": ("#6b7682", "#8a96a3"),
    "on": ("#0b0f14", "#0b0f14"),
    "on-stays": ("#ffffff", "#0b0f14"),
}
"""Fills in light and in dark, and `on` for words on fills: the hues of Okabe and Ito's palette, darkened until they
stand out from white paper."""

_NOT_IN_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_svg(drawing: Drawing) -> str:
    """The whole picture as an SVG document, which needs no other file."""
    root = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "class": "autoflux-plan", "role": "img"})
    root.set("aria-labelledby", "autoflux-plan-title autoflux-plan-desc")
    ET.SubElement(root, "title", {"id": "autoflux-plan-title"}).text = _clean(drawing.title)
    ET.SubElement(root, "desc", {"id": "autoflux-plan-desc"}).text = _clean(_description(drawing))
    ET.SubElement(root, "style").text = _style()
    _hatch(ET.SubElement(root, "defs"))
    paper = _rect(root, (0, 0, WIDTH, 0), "paper")
    paper.set("rx", "10")
    height = _content(root, drawing)
    paper.set("height", _number(height))
    root.set("viewBox", f"0 0 {WIDTH} {_number(height)}")
    return ET.tostring(root, encoding="unicode") + "\n"


def _content(root: ET.Element, drawing: Drawing) -> float:
    _text(root, (24, 36), textwrap.shorten(drawing.title, 90, placeholder=" …"), "title ink")
    top = _legend(root, drawing, 60)
    if drawing.blocks:
        top = _section(root, "The transformer's blocks, as wide as their weights", drawing.blocks_caption, top)
        top = _block_map(root, drawing, top)
    top = _section(root, f"{_capital(drawing.memory)}, phase by phase", drawing.memory_caption, top)
    top = _memory(root, drawing, top)
    if drawing.lanes:
        top = _section(root, "One step, block by block", drawing.step_caption, top)
        top = _step(root, drawing, top)
    return top + 8


def _description(drawing: Drawing) -> str:
    phases = "; ".join(f"{phase.name} {format_bytes(phase.nbytes)}" for phase in drawing.phases)
    return (
        f"Blocks: {drawing.blocks_caption}. {_capital(drawing.memory)}: {phases}; {drawing.memory_caption}. "
        f"A step: {drawing.step_caption}."
    )


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _style() -> str:
    light, dark = (
        "".join(f".autoflux-plan .{name}{{fill:{pair[theme]}}}" for name, pair in COLOURS.items()) for theme in (0, 1)
    )
    edges = [
        f".autoflux-plan .line{{stroke:{ink};stroke-width:1;fill:none}}.autoflux-plan .stroke{{stroke:{hatch}}}"
        for ink, hatch in zip(COLOURS["ink"], COLOURS["hatch"], strict=True)
    ]
    return (
        ".autoflux-plan text{font:12px system-ui,'DejaVu Sans',sans-serif}"
        ".autoflux-plan .title{font-size:17px;font-weight:600}.autoflux-plan .heading{font-size:13px;font-weight:600}"
        ".autoflux-plan .small{font-size:10px}.autoflux-plan .tiny{font-size:9px}"
        ".autoflux-plan .stroke{stroke-width:1.2}"
        ".autoflux-plan .waits{fill:url(#autoflux-plan-waits)}.autoflux-plan .dashed{stroke-dasharray:5 3}"
        f"{light}{edges[0]}@media (prefers-color-scheme:dark){{{dark}{edges[1]}}}"
    )


def _hatch(defs: ET.Element) -> None:
    pattern = ET.SubElement(defs, "pattern", {"id": "autoflux-plan-waits", "width": "5", "height": "5"})
    pattern.set("patternUnits", "userSpaceOnUse")
    pattern.set("patternTransform", "rotate(45)")
    _rect(pattern, (0, 0, 5, 5), "room")
    ET.SubElement(pattern, "line", {"x1": "0", "y1": "0", "x2": "0", "y2": "5", "class": "stroke"})


def _legend(root: ET.Element, drawing: Drawing, top: float) -> float:
    entries = [(part.value, drawing.label(part)) for part in drawing.parts]
    if any(lane.waiting_seconds for lane in drawing.lanes):
        entries.append(("waits", "waiting"))
    x = 24.0
    for fill, label in entries:
        width = 18 + len(label) * CHARACTER + 16
        if x + width > RIGHT:
            x, top = 24.0, top + 20
        _rect(root, (x, top - 10, 12, 12), fill)
        _text(root, (x + 18, top), label, "ink")
        x += width
    return top + 34


def _section(root: ET.Element, heading: str, caption: str, top: float) -> float:
    _text(root, (24, top), heading, "heading ink")
    for line in textwrap.wrap(caption, int((RIGHT - 24) / CHARACTER)):
        top += 18
        _text(root, (24, top), line, "faint")
    return top + 14


def _block_map(root: ET.Element, drawing: Drawing, top: float) -> float:
    scale = (RIGHT - LEFT) / sum(block.nbytes for block in drawing.blocks)
    edges = [LEFT + scale * nbytes for nbytes in accumulate((b.nbytes for b in drawing.blocks), initial=0)]
    spans = list(pairwise(edges))
    for block, (begin, end) in zip(drawing.blocks, spans, strict=True):
        tip = f"{block.name}: {format_bytes(block.nbytes)}, {drawing.label(block.part)}"
        _rect(root, (begin, top + 16, max(0.4, end - begin - 1), 32), block.part.value, tip)
    _text(root, (24, top + 37), "blocks", "ink")
    _list_names(root, drawing.blocks, spans, top + 10)
    _block_numbers(root, drawing.blocks, spans, top + 61)
    return top + 92


def _list_names(root: ET.Element, blocks: Sequence[DrawnBlock], spans: Sequence[tuple[float, float]], y: float) -> None:
    for kind, members in groupby(range(len(blocks)), key=lambda i: blocks[i].kind):
        own = list(members)
        nbytes = format_bytes(sum(blocks[i].nbytes for i in own))
        begin, room = spans[own[0]][0], spans[own[-1]][1] - spans[own[0]][0]
        for words in (f"{len(own)} {kind}, {nbytes}", kind):
            if len(words) * CHARACTER < room:
                _text(root, (begin, y), words, "faint")
                break


def _block_numbers(
    root: ET.Element, blocks: Sequence[DrawnBlock], spans: Sequence[tuple[float, float]], y: float
) -> None:
    free_from = 0.0
    for block, (begin, end) in zip(blocks, spans, strict=True):
        middle = (begin + end) / 2
        if block.number == 0:
            every = next((n for n in (1, 2, 5, 10, 20, 50, 100) if n * (end - begin) >= 26), 200)
        if block.number % every == 0 and middle - 10 >= free_from:
            _text(root, (middle, y), str(block.number), "small faint", "middle")
            free_from = middle + 10


def _memory(root: ET.Element, drawing: Drawing, top: float) -> float:
    peak = max(phase.nbytes for phase in drawing.phases)
    shown = drawing.ceiling_bytes <= 3 * peak
    scale = (MEMORY_RIGHT - LEFT) / (max(drawing.ceiling_bytes, peak) if shown else 1.5 * peak)
    bottom = top + 34 * len(drawing.phases) + 16
    for row, phase in enumerate(drawing.phases):
        _phase(root, drawing, phase, scale, top + 16 + 34 * row)
    ceiling = f"ceiling {format_bytes(drawing.ceiling_bytes)}"
    if shown:
        x = LEFT + scale * drawing.ceiling_bytes
        _line(root, (x, top + 10, x, bottom - 4), "line dashed")
        _text(root, (x, top + 6), ceiling, "ink", "middle")
    else:
        _text(root, (MEMORY_RIGHT, top + 6), f"{ceiling}, far off this scale →", "ink", "end")
    return bottom + 24


def _phase(root: ET.Element, drawing: Drawing, phase: DrawnPhase, scale: float, y: float) -> None:
    _text(root, (24, y + 17), phase.name, "ink")
    _rect(root, (LEFT, y, MEMORY_RIGHT - LEFT, 26), "room")
    x = float(LEFT)
    for part, nbytes in phase.parts.items():
        width, words = scale * nbytes, format_bytes(nbytes)
        _rect(root, (x, y, width, 26), part.value, f"{phase.name}: {drawing.label(part)}, {words}")
        if len(words) * CHARACTER + 8 < width:
            _text(root, (x + width / 2, y + 17), words, _on(part), "middle")
        x += width
    _text(root, (RIGHT, y + 17), format_bytes(phase.nbytes), "ink", "end")


def _on(part: Part) -> str:
    return "on-stays" if part == Part.STAYS else "on"


def _step(root: ET.Element, drawing: Drawing, top: float) -> float:
    scale = (RIGHT - LEFT) / drawing.seconds_per_step
    for row, lane in enumerate(drawing.lanes):
        y = top + 34 * row
        _text(root, (24, y + 17), lane.name, "ink")
        for stretch in lane.stretches:
            _stretch(root, drawing, lane, stretch, (LEFT + scale * stretch.begin, y, scale * stretch.seconds))
    bottom = top + 34 * len(drawing.lanes)
    for seconds, words in _ticks(drawing.seconds_per_step):
        x = LEFT + scale * seconds
        _line(root, (x, bottom - 4, x, bottom + 2), "line")
        _text(root, (x, bottom + 14), words, "small faint", "middle")
    return bottom + 30


def _stretch(
    root: ET.Element, drawing: Drawing, lane: Lane, stretch: Stretch, place: tuple[float, float, float]
) -> None:
    x, y, width = place
    took = format_seconds(stretch.seconds)
    if stretch.block is None:
        _rect(root, (x, y, width, 26), "waits", f"{lane.name} waits {took}")
        return
    block = drawing.blocks[stretch.block]
    _rect(root, (x, y, max(0.4, width - 0.8), 26), block.part.value, f"{lane.name} {block.name}: {took}")
    if width >= 14:
        _text(root, (x + width / 2, y + 17), str(block.number), f"tiny {_on(block.part)}", "middle")


def _ticks(seconds: float) -> Iterator[tuple[float, str]]:
    """Round times from 0 to `seconds`, seven or so."""
    unit, factor = ("ms", 1e3) if seconds < 1 else ("s", 1.0)
    rough = seconds * factor / 7
    magnitude = 10.0 ** math.floor(math.log10(rough))
    tick = next(magnitude * times for times in (1, 2, 5, 10) if magnitude * times >= rough)
    for number in range(int(seconds * factor / tick) + 1):
        yield number * tick / factor, f"{number * tick:g} {unit}"


def _rect(parent: ET.Element, box: tuple[float, float, float, float], fill: str, tip: str = "") -> ET.Element:
    sides = dict(zip(("x", "y", "width", "height"), map(_number, box), strict=True))
    element = ET.SubElement(parent, "rect", {**sides, "class": fill})
    if tip:
        ET.SubElement(element, "title").text = tip
    return element


def _line(parent: ET.Element, ends: tuple[float, float, float, float], look: str) -> None:
    places = dict(zip(("x1", "y1", "x2", "y2"), map(_number, ends), strict=True))
    ET.SubElement(parent, "line", {**places, "class": look})


def _text(parent: ET.Element, at: tuple[float, float], words: str, look: str, anchor: str = "start") -> None:
    place = {"x": _number(at[0]), "y": _number(at[1]), "class": look, "text-anchor": anchor}
    ET.SubElement(parent, "text", place).text = _clean(words)


def _clean(words: str) -> str:
    """Without what XML cannot hold: a folder of models may be called anything."""
    return _NOT_IN_XML.sub("\N{REPLACEMENT CHARACTER}", words)


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
