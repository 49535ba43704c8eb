"""What the figures of profiles can be, said once: for profiles in files, and for the priors of saved plans. Pure.

Each kind is so wide that no real machine is outside, and so narrow that nothing made of such figures overflows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Annotated, NamedTuple

import msgspec

from autoflux.units import TB, format_bytes, format_number

MOST_TOLD = 10**18
"""Whole numbers above it are told by their power of ten: a file may have one of a thousand digits."""


class Range(NamedTuple):
    """What a figure can be, both ends included."""

    least: float
    most: float

    def words(self, name: str) -> str:
        """For people."""
        least = format_number(self.least)
        return f"{least} to {format_bytes(self.most) if name.endswith('_bytes') else format_number(self.most)}"


def _within(least: float, most: float) -> msgspec.Meta:
    """Not as bounds of msgspec's own, which would refuse a figure without saying what it was."""
    return msgspec.Meta(extra={"range": Range(least, most)})


Rate = Annotated[float, _within(1e-4, 1e6)]
"""In 10^9 or 10^12 a second."""
Share = Annotated[float, _within(1e-3, 1)]
Seconds = Annotated[float, _within(0, 86_400)]
"""A day at most."""
Bytes = Annotated[int, _within(0, 100 * TB)]
Rows = Annotated[int, _within(1, 2**16)]
Activations = Annotated[float, _within(1e-2, 1e5)]
"""Peaks, in the units that the fields say."""
Multiple = Annotated[float, _within(1e-2, 100)]


def outside(kind: type[msgspec.Struct], figures: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Each figure that its field in `kind` does not allow, and what is wrong with it, in words.

    What is no number or of no field is left to whoever looks at types and keys.
    """
    for field in msgspec.structs.fields(kind):
        value, allowed = figures.get(field.name), field.type.__metadata__[0].extra["range"]
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not allowed.least <= value <= allowed.most:
            yield field.name, f"is {in_words(field.name, value)}; allowed: {allowed.words(field.name)}"


def in_words(name: str, value: float) -> str:
    """A figure as a file has it, short also where it is far too large; sizes as people write them."""
    if isinstance(value, int) and abs(value) > MOST_TOLD:
        return f"{Decimal(value):.2e}"
    return format_bytes(value) if isinstance(value, int) and name.endswith("_bytes") else str(value)
