"""What a probe of another machine found, read from the file that it was saved in."""

from __future__ import annotations

from collections.abc import Iterator

from autoflux.errors import DamagedFile
from autoflux.hardware.values import SCHEMA, Hardware


def read_hardware(text: str | bytes, origin: str) -> Hardware:
    """The machine in what `autoflux probe --json` printed.

    Raises:
        DamagedFile: not a probe's output, of another version, or with a figure that cannot be; `origin` is named.
    """
    hardware = Hardware.from_saved(text, schema=SCHEMA, origin=origin, made_by="autoflux probe --json")
    if faults := list(_impossible(hardware.to_data(), "")):
        raise DamagedFile(
            f"{origin} cannot be right: {faults[0]}", hint="run `autoflux probe --refresh --json` there again"
        )
    return hardware


def _impossible(data: object, path: str) -> Iterator[str]:
    """Each rate that is not above zero and each size below it, by the keys that lead there."""
    if isinstance(data, (list, tuple)):
        for index, item in enumerate(data):
            yield from _impossible(item, f"{path}[{index}]")
    if not isinstance(data, dict):
        return
    value = data.get("value")
    if isinstance(value, (int, float)) and "source" in data and (value < 0 or (value == 0 and "bytes" not in path)):
        yield f"{path.removeprefix('.')} is {value:g}"
    for key, item in data.items():
        yield from _impossible(item, f"{path}.{key}")
