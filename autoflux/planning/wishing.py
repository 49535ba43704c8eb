"""Wishes that programs make: unlike options of commands, nothing has looked at them. Pure."""

from __future__ import annotations

import msgspec

from autoflux.errors import ContradictoryWishes, UsageError
from autoflux.planning.values import Plan, Wishes


def checked(wishes: Wishes) -> Wishes:
    """The same, with words as the terms that they stand for.

    Raises:
        UsageError: one is of another type, or cannot be; the message names it.
    """
    try:
        return msgspec.convert(wishes.to_data(), Wishes)
    except (msgspec.ValidationError, TypeError) as error:
        raise UsageError(f"such a wish cannot be: {error}", hint="see the fields of autoflux.Wishes") from error


def check_alone(plan: Plan | None, wishes: Wishes | None) -> None:
    """Refuse wishes beside a plan, which they would change.

    Raises:
        ContradictoryWishes: there are both.
    """
    if plan is not None and wishes not in (None, Wishes()):
        raise ContradictoryWishes("a plan holds all choices, and wishes would change it", hint="give one of the two")
