"""Finding plugins and collecting what they offer. Nothing happens at import: `load_plugins` makes a value."""

from __future__ import annotations

import importlib
import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import pluggy

from autoflux import hookspecs
from autoflux.errors import PluginConflict, UnknownName

if TYPE_CHECKING:
    import click

    from autoflux.models.values import ModelEntry
    from autoflux.planning.values import HostProfile, Profile
    from autoflux.runtime.pipeline import Backend
    from autoflux.serving.frontend import Frontend

BUILT_IN = (
    "diffusers_backend",
    "diffsynth_backend",
    "gradio_frontend",
    "api_frontend",
    "sample_model",
    "shipped_profiles",
    "doctor_command",
)
"""Modules of `autoflux.plugins`, in the order they are registered."""


T = TypeVar("T")


class Registry(Generic[T]):
    """Things of one kind by name, each with the plugin that offered it. Everything offered has a `name`."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._offers: dict[str, tuple[T, str]] = {}

    def add(self, owner: str, offer: T) -> None:
        """Raises PluginConflict, naming both plugins, when the name is taken."""
        name = str(getattr(offer, "name", None) or type(offer).__name__)
        if name in self._offers:
            raise PluginConflict(
                f"two plugins offer a {self.kind} named {name!r}: {self._offers[name][1]!r} and {owner!r}",
                hint="uninstall one of them",
            )
        self._offers[name] = (offer, owner)

    def get(self, name: str) -> T:
        """Raises UnknownName, with the closest name, when there is none."""
        if name not in self._offers:
            raise UnknownName(self.kind, name, self._offers, hint="`autoflux plugins` lists what is installed")
        return self._offers[name][0]

    def owner(self, name: str) -> str:
        return self._offers[name][1]

    def __iter__(self) -> Iterator[T]:
        return (offer for offer, _ in self._offers.values())

    def names(self) -> list[str]:
        return list(self._offers)


@dataclass(frozen=True)
class PluginProblem:
    """A plugin that could not be loaded, or a hook of it that failed."""

    plugin: str
    message: str
    details: str


@dataclass(frozen=True)
class Plugins:
    """What all plugins offer together."""

    backends: Registry[Backend] = field(default_factory=lambda: Registry("backend"))
    frontends: Registry[Frontend] = field(default_factory=lambda: Registry("frontend"))
    models: Registry[ModelEntry] = field(default_factory=lambda: Registry("model"))
    profiles: Registry[Profile | HostProfile] = field(default_factory=lambda: Registry("profile"))
    commands: Registry[click.Command] = field(default_factory=lambda: Registry("command"))
    sources: dict[str, str] = field(default_factory=dict)
    """Plugin name → where it comes from: `built in` or distribution and version."""
    problems: list[PluginProblem] = field(default_factory=list)


def load_plugins(*extra: object, entry_points: bool = True) -> Plugins:
    """Register the built-ins, `extra` objects, the modules named in AUTOFLUX_PLUGINS, then installed ones; call hooks.

    A plugin that fails to import or to register is left out and reported in `problems`.

    Raises:
        PluginConflict: two plugins offer the same name.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    plugins = Plugins()
    for name in BUILT_IN:
        _register(manager, plugins, name, "built in", partial(importlib.import_module, f"autoflux.plugins.{name}"))
    for plugin in extra:
        _register(manager, plugins, manager.get_canonical_name(plugin), "given", partial(_itself, plugin))
    for module in filter(None, os.environ.get("AUTOFLUX_PLUGINS", "").split(",")):
        _register(manager, plugins, module, "AUTOFLUX_PLUGINS", partial(importlib.import_module, module))
    for entry in metadata.entry_points(group=hookspecs.PROJECT) if entry_points else ():
        source = f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
        _register(manager, plugins, entry.name, source, entry.load)
    _collect(manager, plugins)
    return plugins


def _register(
    manager: pluggy.PluginManager, plugins: Plugins, name: str, source: str, load: Callable[[], object]
) -> None:
    if name in plugins.sources:
        raise PluginConflict(
            f"two plugins are named {name!r}: from {plugins.sources[name]!r} and {source!r}",
            hint="uninstall one of them",
        )
    try:
        manager.register(load(), name)
        manager.check_pending()
    except Exception as error:  # noqa: BLE001 — whatever a third party's module does at import
        plugins.problems.append(_problem(name, error))
        manager.set_blocked(name)
        return
    plugins.sources[name] = source


def _itself(plugin: object) -> object:
    return plugin


def _collect(manager: pluggy.PluginManager, plugins: Plugins) -> None:
    registries: dict[str, Registry[Any]] = {
        "register_backends": plugins.backends,
        "register_frontends": plugins.frontends,
        "register_models": plugins.models,
        "register_profiles": plugins.profiles,
        "register_commands": plugins.commands,
    }
    for hook, registry in registries.items():
        for implementation in getattr(manager.hook, hook).get_hookimpls():
            owner = implementation.plugin_name
            try:
                implementation.function(partial(registry.add, owner))
            except PluginConflict:
                raise
            except Exception as error:  # noqa: BLE001 — whatever a third party's hook does
                plugins.problems.append(_problem(owner, error))


def _problem(name: str, error: Exception) -> PluginProblem:
    return PluginProblem(name, f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)))
