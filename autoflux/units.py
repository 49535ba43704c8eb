"""Sizes as people write and read them. Inside autoflux a size is an `int` of bytes, a time a `float` of seconds."""

from __future__ import annotations

import re

from autoflux.errors import UsageError

KB, MB, GB, TB, PB = 10**3, 10**6, 10**9, 10**12, 10**15
KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40

_FACTORS = {"": 1, "b": 1, "kb": KB, "mb": MB, "gb": GB, "tb": TB, "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)\s*", re.IGNORECASE | re.ASCII)


def parse_bytes(text: str) -> int:
    """`"8GB"` → 8,000,000,000; `"8GiB"` → 8,589,934,592; a bare number is bytes.

    Raises:
        UsageError: not a size, or not above zero.
    """
    match = _SIZE.fullmatch(text)
    unit = match[2].lower() if match else "?"
    factor = _FACTORS.get(unit) or _FACTORS.get(unit + "b")
    if not match or factor is None:
        raise UsageError(f"{text!r} is not a size", hint="write a number with a unit, such as 8GB or 7.5GiB")
    size = int(float(match[1]) * factor)
    if size <= 0:
        raise UsageError(f"a size must be above zero, got {text!r}")
    return size


def parse_rate(text: str) -> float:
    """`"6.8GB/s"` → 6.8, in units of 10^9 bytes a second; the unit is needed.

    Raises:
        UsageError: not a rate, or not above zero.
    """
    amount, slash, second = text.strip().rpartition("/")
    if not slash or second.strip().lower() != "s" or not re.search("[a-z]", amount, re.IGNORECASE):
        raise _no_rate(text)
    try:
        return parse_bytes(amount) / GB
    except UsageError as error:
        raise (_no_rate(text) if error.hint else UsageError(f"a rate must be above zero, got {text!r}")) from error


def _no_rate(text: str) -> UsageError:
    return UsageError(f"{text!r} is not a rate", hint="write a number with a unit, such as 6.8GB/s or 500MB/s")


def format_bytes(count: float) -> str:
    """Three significant figures in decimal units: `25,700,000,000` → `"25.7 GB"`."""
    for unit, factor in (("TB", TB), ("GB", GB), ("MB", MB), ("kB", KB)):
        if abs(count) >= factor * 0.9995:
            return f"{_three_figures(count / factor)} {unit}"
    return f"{count:.0f} B"


def format_seconds(seconds: float) -> str:
    """`0.118` → `"118 ms"`, `74.2` → `"1 min 14 s"`."""
    if seconds < 0.9995:
        return f"{_three_figures(seconds * 1000)} ms"
    if seconds < 59.95:
        return f"{_three_figures(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def _three_figures(number: float) -> str:
    if abs(number) >= 99.95:
        return f"{number:.0f}"
    return f"{number:.1f}" if abs(number) >= 9.995 else f"{number:.2f}"
