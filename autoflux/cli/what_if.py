"""`--on`, `--link`, `--disk`: planning for another machine, or for this one with other rates."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import click

from autoflux.api import WhatIf
from autoflux.cli.options import Rate
from autoflux.cli.saved import is_given
from autoflux.errors import UsageError
from autoflux.hardware.changes import Changes
from autoflux.planning.values import Wishes

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--on",
        metavar="NAME|FILE",
        help="Plan for another machine: a name from `autoflux machines`, or the output of `autoflux probe --json` "
        "there. Then --vram and --ram say what it has.",
    ),
    click.option(
        "--link", "link_gb_per_s", type=Rate(), help="Assume this rate from RAM to the card, such as 6.8GB/s."
    ),
    click.option("--disk", "disk_gb_per_s", type=Rate(), help="Assume this rate of the models' disk."),
)


def what_if_options(command: F) -> F:
    """Add the options that change the machine to plan for; they arrive as `what_if`. Stands below `wishes_options`."""

    @wraps(command)
    def with_what_if(
        *positional: Any,
        wishes: Wishes,
        on: str | None,
        link_gb_per_s: float | None,
        disk_gb_per_s: float | None,
        **arguments: Any,
    ) -> Any:
        if on == "":  # as of a variable of the shell that is not set
            raise UsageError("--on was given nothing", hint="`autoflux machines` lists the names that it takes")
        changes = Changes(link_gb_per_s=link_gb_per_s, disk_gb_per_s=disk_gb_per_s)
        if on is not None:
            changes, wishes = _of_the_machine(changes, wishes)
        return command(*positional, wishes=wishes, what_if=WhatIf(on, changes), **arguments)

    decorated: Any = with_what_if
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]


def _of_the_machine(changes: Changes, wishes: Wishes) -> tuple[Changes, Wishes]:
    """Memory as a property of the other machine; ceilings in the environment are for this one and do not count."""
    changes = changes.replace(
        vram_bytes=wishes.vram_bytes if is_given("vram_bytes") else None,
        ram_bytes=wishes.ram_bytes if is_given("ram_bytes") else None,
    )
    return changes, wishes.replace(vram_bytes=None, ram_bytes=None)
