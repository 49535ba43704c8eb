"""What must hold of what was measured."""

from __future__ import annotations

import msgspec


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """A measured value, and whether it keeps to its bound."""

    name: str
    value: float
    bound: float
    holds: bool


def told(check: Check) -> str:
    """One line."""
    return f"{'holds' if check.holds else 'FAILS'}  {check.name}: {check.value:.6g} (bound {check.bound:.6g})"
