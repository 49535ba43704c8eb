"""Sizes as people write and read them. Inside autoflux a size is an `int` of bytes, a time a `float` of seconds."""

from __future__ import annotations

import math
import re
from decimal import Decimal

from autoflux.errors import UsageError

KB, MB, GB, TB, PB = 10**3, 10**6, 10**9, 10**12, 10**15
KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40

_FACTORS = {"": 1, "b": 1, "kb": KB, "mb": MB, "gb": GB, "tb": TB, "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([kmgt]?i?b?)\s*", re.IGNORECASE | re.ASCII)
_BITS = re.compile(r"\s*([\d.]+)\s*((?:[kmgt]i?)?)b\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """`"8GB"` → 8,000,000,000; `"8GiB"` → 8,589,934,592; a bare number is bytes. Case does not matter.

    Raises:
        UsageError: not a size, or not above zero.
    """
    match = _SIZE.fullmatch(text)
    unit = match[2].lower() if match else "?"
    factor = _FACTORS.get(unit) or _FACTORS.get(unit + "b")
    if not match or factor is None:
        raise UsageError(f"{text!r} is not a size", hint="write a number with a unit, such as 8GB or 7.5GiB")
    size = round(float(match[1]) * factor)
    if size <= 0:
        raise UsageError(f"a size must be above zero, got {text!r}")
    return size


def parse_rate(text: str) -> float:
    """`"6.8GB/s"` → 6.8, in units of 10^9 bytes a second; the unit is needed, and bytes are a capital B.

    Raises:
        UsageError: not a rate, below 1 MB/s, or perhaps one in bits, in which links are sold.
    """
    amount, slash, second = text.strip().rpartition("/")
    if not slash or second.strip().lower() != "s" or not re.search("[a-z]", amount, re.IGNORECASE):
        raise _no_rate(text)
    try:
        rate = parse_bytes(amount)
    except UsageError as error:
        raise (_no_rate(text) if error.hint else UsageError(f"a rate must be above zero, got {text!r}")) from error
    if amount.endswith("b") and (bits := _BITS.fullmatch(amount)):
        prefix, eighth = bits[2].capitalize(), format_number(float(bits[1]) / 8)
        raise UsageError(
            f"the rate {text!r} may be in bits or in bytes",
            hint=f"write {eighth}{prefix}B/s if it is in bits, {bits[1]}{prefix}B/s if in bytes",
        )
    if rate < MB:
        raise UsageError(
            f"the rate {text!r} is below 1 MB/s, and no machine is so slow", hint="write it such as 6.8GB/s"
        )
    return rate / GB


def _no_rate(text: str) -> UsageError:
    return UsageError(f"{text!r} is not a rate", hint="write a number with a unit, such as 6.8GB/s or 500MB/s")


def counted(count: int, noun: str) -> str:
    """`1, "file"` → `"1 file"`; `2, "file"` → `"2 files"`, for nouns that only take an s."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def format_bytes(count: float, *, more: int = 0) -> str:
    """Three significant figures, or so many `more`, in decimal units: `25,700,000,000` → `"25.7 GB"`."""
    for unit, factor in (("TB", TB), ("GB", GB), ("MB", MB), ("kB", KB)):
        if abs(count) >= factor * 0.9995:
            return f"{_three_figures(count / factor, more)} {unit}"
    return f"{count:.0f} B"


def told_apart(need_bytes: int, have_bytes: int) -> tuple[str, str]:
    """Both in words, with as many figures as it takes to see that they differ."""
    texts, more = (format_bytes(need_bytes), format_bytes(have_bytes)), 0
    while texts[0] == texts[1] and need_bytes != have_bytes:
        more += 1
        texts = format_bytes(need_bytes, more=more), format_bytes(have_bytes, more=more)
    return texts


def rounded_up(count: float) -> int:
    """To three significant figures: `6,865,000,001` → `6,870,000,000`."""
    scale: int = 10 ** max(0, len(str(math.ceil(count))) - 3)
    return math.ceil(count / scale) * scale


def size_option(count: float) -> str:
    """The least size in three significant figures that is not smaller, as options take it: `"6.87GB"`."""
    return format_bytes(rounded_up(count)).replace(" ", "")


def format_seconds(seconds: float) -> str:
    """`0.118` → `"118 ms"`, `74.2` → `"1 min 14 s"`, `18,840` → `"5 h 14 min"`."""
    if seconds < 0.9995:
        return f"{_three_figures(seconds * 1000)} ms"
    if seconds < 59.95:
        return f"{_three_figures(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min"


def format_number(number: float) -> str:
    """Three significant figures, and all that stand before the point: `0.0313`, `1.5`, `1460`, `0.00001`."""
    return f"{number:.0f}" if abs(number) >= 99.95 else f"{Decimal(f'{number:.3g}'):f}"


def _three_figures(number: float, more: int = 0) -> str:
    if abs(number) >= 99.95:
        return f"{number:.{more}f}"
    return f"{number:.{1 + more}f}" if abs(number) >= 9.995 else f"{number:.{2 + more}f}"
