"""A drawing of a plan as text, for terminals: in block characters, or in ASCII where those cannot be shown. Pure."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from autoflux.planning.drawing import Drawing, DrawnBlock, DrawnPhase, Lane, Part
from autoflux.units import format_bytes, format_seconds

MOST_COLUMNS = 100

LABEL_COLUMNS = 9
"""Width of the names of rows."""


class Glyphs(NamedTuple):
    """What the drawing is made of."""

    parts: dict[Part, str]
    room: str
    busy: str
    """From idle to busy all the time."""
    edge: str


UNICODE = Glyphs(
    {Part.CONTEXT: "▚", Part.STAYS: "█", Part.STREAMED: "░", Part.VISITS: "▓", Part.ACTIVATIONS: "▒"},
    room="·",
    busy=" ▁▂▃▄▅▆▇█",
    edge="│",
)
ASCII = Glyphs(
    {Part.CONTEXT: "%", Part.STAYS: "#", Part.STREAMED: "~", Part.VISITS: "@", Part.ACTIVATIONS: "+"},
    room=".",
    busy=" .:-=oO8#",
    edge="|",
)


def to_text(drawing: Drawing, *, columns: int = MOST_COLUMNS, unicode: bool = True) -> str:
    """Lines of at most `columns` characters, 40 at least and 100 at most."""
    columns = max(40, min(columns, MOST_COLUMNS))
    glyphs = UNICODE if unicode else ASCII
    sections = [
        ["".join(character if character.isprintable() else "?" for character in drawing.title)],
        _blocks(drawing, glyphs, columns),
        _memory(drawing, glyphs, columns),
        _step(drawing, glyphs, columns),
        _legend(drawing, glyphs, columns),
    ]
    text = "\n\n".join("\n".join(_folded(section, columns)) for section in sections if section)
    return text if unicode else text.encode("ascii", "replace").decode()


def _folded(lines: Sequence[str], columns: int) -> Iterator[str]:
    for line in lines:
        yield from [line] if len(line) <= columns else textwrap.wrap(line, columns)


def _blocks(drawing: Drawing, glyphs: Glyphs, columns: int) -> list[str]:
    if not drawing.blocks:
        return []
    lines = [f"blocks: {drawing.blocks_caption}"]
    smallest = min(block.nbytes for block in drawing.blocks)
    for kind in dict.fromkeys(block.kind for block in drawing.blocks):
        own = [block for block in drawing.blocks if block.kind == kind]
        nbytes = sum(block.nbytes for block in own)
        # Small blocks get a cell each, others as many as they are larger.
        wanted = sum(max(1, round(block.nbytes / max(1, smallest))) for block in own)
        cells = min(wanted, columns - LABEL_COLUMNS - 14)
        lines.append(f"{kind:{LABEL_COLUMNS}}{_map(own, glyphs, cells)} {len(own)}, {format_bytes(nbytes)}")
    return lines


def _map(blocks: Sequence[DrawnBlock], glyphs: Glyphs, cells: int) -> str:
    widths = [(glyphs.parts[block.part], float(max(1, block.nbytes))) for block in blocks]
    return _bar(widths, sum(width for _, width in widths) / cells, cells)


def _memory(drawing: Drawing, glyphs: Glyphs, columns: int) -> list[str]:
    ceiling, peak = drawing.ceiling_bytes, max(phase.nbytes for phase in drawing.phases)
    shown = ceiling <= 3 * peak
    cells = columns - LABEL_COLUMNS - 12
    cell_bytes = (max(ceiling, peak) if shown else 1.5 * peak) / cells
    lines = [f"{drawing.memory}: {drawing.memory_caption}"]
    for phase in drawing.phases:
        bar = _phase_bar(phase, glyphs, cell_bytes, cells)
        lines.append(f"{phase.name:{LABEL_COLUMNS}}{bar}{glyphs.edge if shown else ' '} {format_bytes(phase.nbytes)}")
    edge = f"ceiling {format_bytes(ceiling)}" if shown else f"ceiling {format_bytes(ceiling)}, far off this scale >"
    lines.append(f"{'':{LABEL_COLUMNS}}{edge:>{cells + 1}}")
    return lines


def _phase_bar(phase: DrawnPhase, glyphs: Glyphs, cell_bytes: float, cells: int) -> str:
    widths = [(glyphs.parts[part], float(nbytes)) for part, nbytes in phase.parts.items()]
    used = min(cells, math.ceil(phase.nbytes / cell_bytes))
    return _bar(widths, cell_bytes, used).ljust(cells, glyphs.room)


def _bar(widths: Sequence[tuple[str, float]], per_cell: float, cells: int) -> str:
    """Each cell shows what lies at its middle."""
    edges = list(accumulate(width for _, width in widths))
    middles = ((cell + 0.5) * per_cell for cell in range(cells))
    last = len(edges) - 1
    return "".join(widths[next((i for i, edge in enumerate(edges) if edge > at), last)][0] for at in middles)


def _step(drawing: Drawing, glyphs: Glyphs, columns: int) -> list[str]:
    if not drawing.lanes:
        return []
    cells = columns - LABEL_COLUMNS - 2
    lines = [f"step: {drawing.step_caption}"]
    for lane in drawing.lanes:
        shares = _busy(lane, drawing.seconds_per_step, cells)
        bar = "".join(glyphs.busy[_level(share, len(glyphs.busy))] for share in shares)
        lines.append(f"{lane.name:{LABEL_COLUMNS}}{glyphs.edge}{bar}{glyphs.edge}")
    end = format_seconds(drawing.seconds_per_step)
    lines.append(f"{'':{LABEL_COLUMNS}}0{end:>{cells + 1}}")
    return lines


def _busy(lane: Lane, seconds: float, cells: int) -> list[float]:
    """The share of each cell's time in which the stream works."""
    edges = [seconds * cell / cells for cell in range(cells + 1)]
    work = [stretch for stretch in lane.stretches if stretch.block is not None]
    return [
        sum(max(0.0, min(end, s.end) - max(begin, s.begin)) for s in work) / (end - begin)
        for begin, end in pairwise(edges)
    ]


def _level(share: float, levels: int) -> int:
    """0 and the highest only for a cell that is idle, or busy, all of its time."""
    if share < 1e-6:
        return 0
    return min(levels - 2, 1 + int(share * (levels - 2))) if share < 1 - 1e-6 else levels - 1


def _legend(drawing: Drawing, glyphs: Glyphs, columns: int) -> list[str]:
    entries = [f"{glyphs.parts[part]} {drawing.label(part)}" for part in drawing.parts]
    entries.append(f"{glyphs.room} free")
    if drawing.lanes:
        entries.append("copy and compute: as high as busy" if drawing.lanes[1:] else "compute: as high as busy")
    lines = [""]
    for entry in entries:
        longer = f"{lines[-1]}   {entry}" if lines[-1] else entry
        if len(longer) <= columns:
            lines[-1] = longer
        else:
            lines.append(entry)
    return lines
