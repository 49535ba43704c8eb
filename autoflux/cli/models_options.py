"""How the commands of `autoflux models` are told which model is meant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from autoflux.cli.output import stderr
from autoflux.errors import ContradictoryWishes, ModelNotFound, UnknownName, UsageError
from autoflux.models.hubs.cached import CachedModel, look_at
from autoflux.models.hubs.names import default_source, known_names, parse_reference
from autoflux.models.hubs.stores import Store
from autoflux.models.hubs.values import Reference, Source

F = TypeVar("F", bound=Callable[..., Any])


def source_option(command: F) -> F:
    """Add `--source`, passed as `source`: a `Source` or None."""
    return click.option(
        "--source",
        type=click.Choice([source.value for source in Source], case_sensitive=False),
        callback=lambda _ctx, _param, value: Source(value) if value else None,
        help="The hub. If not given: that of the address, else AUTOFLUX_SOURCE, else huggingface.",
    )(command)


def refer(name: str, source: Source | None) -> Reference:
    """The model that a name means.

    Raises:
        UnknownName: it is neither in the catalogue nor an id.
        UsageError: it contradicts `--source`, or a plugin brings the model.
    """
    reference = parse_reference(name, source, usual=default_source())
    if reference is None:
        if name in click.get_current_context().obj.models.names():
            raise UsageError(
                f"{name!r} comes with a plugin, not from a hub", hint=f"it is always there: --model {name}"
            )
        raise UnknownName("model of a hub", name, known_names(), hint="an id is written OWNER/NAME, as on its page")
    return reference


def the_one(name: str, source: Source | None, stores: dict[Source, Store]) -> CachedModel:
    """The model of that name that is on this machine.

    Raises:
        ModelNotFound: there is none.
        ContradictoryWishes: both caches have it, and the source was not said.
    """
    reference = refer(name, source)
    looked = (look_at(hub_id, stores[hub_id.source], reference.revision) for hub_id in reference.ids)
    found = [model for model in looked if model]
    if not found:
        raise ModelNotFound(
            f"{reference.name!r} is not on this machine", hint="`autoflux models list` shows what is there"
        )
    if len(found) > 1:
        raise ContradictoryWishes(
            f"{reference.name!r} is in the caches of both hubs",
            hint=f"say which: --source {found[0].source} or --source {found[1].source}",
        )
    return found[0]


def byte_progress() -> Progress:
    """Bars of bytes on stderr, gone when they are done; nothing where stderr is no terminal."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)
