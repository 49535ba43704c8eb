"""The hooks of autoflux. Each is called once with a `register` function; a plugin calls it for each thing it offers.

Built-in plugins (`autoflux.plugins`) use the same hooks. Others are found by the entry point group `autoflux`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import click

    from autoflux.models.values import ModelEntry
    from autoflux.planning.values import HostProfile, Profile
    from autoflux.runtime.pipeline import Backend
    from autoflux.serving.frontend import Frontend

PROJECT = "autoflux"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def register_backends(register: Callable[[Backend], None]) -> None:
    """Offer a library that builds pipelines."""


@hookspec
def register_frontends(register: Callable[[Frontend], None]) -> None:
    """Offer a way to use the service: a web page, an API."""


@hookspec
def register_models(register: Callable[[ModelEntry], None]) -> None:
    """Offer a model by name."""


@hookspec
def register_profiles(register: Callable[[Profile | HostProfile], None]) -> None:
    """Offer preferences and priors for a class of hardware, or what differs on a class of hosts."""


@hookspec
def register_commands(register: Callable[[click.Command], None]) -> None:
    """Offer a command of the `autoflux` program."""
