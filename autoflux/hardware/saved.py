"""What a probe of another machine found, read from the file that it was saved in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain

from autoflux.errors import DamagedFile
from autoflux.hardware.values import CAPABILITY, SCHEMA, Hardware
from autoflux.units import PB, format_bytes

LEAST, MOST = 1e-9, 1e9
"""Of rates in 10^9 or 10^12 a second, and of seconds."""

MOST_BYTES = 1000 * PB
"""Of memory or a disk."""


def read_hardware(text: str | bytes, origin: str) -> Hardware:
    """The machine in what `autoflux probe --json` printed.

    Raises:
        DamagedFile: not a probe's output, of another version, or with a figure that cannot be; `origin` is named.
    """
    hardware = Hardware.from_saved(text, schema=SCHEMA, origin=origin, made_by="autoflux probe --json")
    if fault := impossible(hardware):
        raise DamagedFile(
            f"{origin} cannot be right: {fault}", hint="run `autoflux probe --refresh --json` there again"
        )
    return hardware


def impossible(hardware: Hardware) -> str:
    """The first figure that no machine has, in words; empty if there is none."""
    return next(chain(_odd_figures(hardware.to_data(), ""), _odd_sizes(hardware), _odd_capabilities(hardware)), "")


def _odd_figures(data: object, path: str) -> Iterator[str]:
    """Each rate, time or size that is beyond what can be, by the keys that lead there."""
    if isinstance(data, (list, tuple)):
        for index, item in enumerate(data):
            yield from _odd_figures(item, f"{path}[{index}]")
    if not isinstance(data, dict):
        return
    value = data.get("value")
    if isinstance(value, (int, float)) and "source" in data:
        least, most = (0, MOST_BYTES) if "bytes" in path else (LEAST, MOST)
        if not least <= value <= most:
            yield f"{path.removeprefix('.')} is {value:g}"
    for key, item in data.items():
        yield from _odd_figures(item, f"{path}.{key}")


def _odd_sizes(hardware: Hardware) -> Iterator[str]:
    """What is more than that which it is a part of, and no processor at all."""
    host = hardware.host
    if host.cores < 1:
        yield f"host.cores is {host.cores}"
    parts = [("host.available_bytes", host.available_bytes, host.total_bytes)]
    for index, card in enumerate(hardware.accelerators):
        parts.append((f"accelerators[{index}].free_bytes", card.free_bytes, card.total_bytes))
        parts.append((f"accelerators[{index}].usable_bytes", card.usable_bytes, card.total_bytes))
    for name, part, whole in parts:
        if 0 < whole.value < part.value:  # 0 where no driver tells
            yield f"{name} is {format_bytes(part.value)} of {format_bytes(whole.value)}"


def _odd_capabilities(hardware: Hardware) -> Iterator[str]:
    """Compute capabilities that cannot be compared with those of profiles."""
    for index, card in enumerate(hardware.accelerators):
        if card.capability is not None and not re.fullmatch(CAPABILITY, card.capability):
            yield f"accelerators[{index}].capability is {card.capability!r}; allowed: two numbers such as '8.9'"
