"""`--plan FILE`, for the commands that can follow a plan made before."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from autoflux.api import saved_plan
from autoflux.cli.wishes import NAMES as WISHES
from autoflux.errors import ContradictoryWishes
from autoflux.planning.values import Plan
from autoflux.plugin_manager import Plugins

F = TypeVar("F", bound=Callable[..., Any])

MEMORY = ("vram_bytes", "ram_bytes")
"""Wishes that with `--on` are no wishes, but say what the other machine has."""


def saved_plan_option(*excluded: str) -> Callable[[F], F]:
    """Add `--plan FILE`; the plan arrives as `saved`, and its model as `model` if none was given.

    Stands above `model_option` and `wishes_options`. `excluded` are further parameters that a plan leaves no room for.
    """

    def add(command: F) -> F:
        @wraps(command)
        def with_saved(*, plan_file: str | None, **arguments: Any) -> Any:
            saved = None
            if plan_file is not None:
                _check_alone((*_wishes(), *excluded))
                saved = saved_plan(plan_file)
                arguments = _without_wishes(arguments, saved, click.get_current_context().obj)
            return command(saved=saved, **arguments)

        option = click.option(
            "--plan", "plan_file", metavar="FILE", help="Follow a plan made before (`autoflux plan --save FILE`)."
        )
        return option(with_saved)  # type: ignore[return-value]

    return add


def is_given(name: str) -> bool:
    """Whether a parameter of the running command was typed, not taken from the environment or a default."""
    return click.get_current_context().get_parameter_source(name) == ParameterSource.COMMANDLINE


def _wishes() -> tuple[str, ...]:
    """Parameters that are wishes in the running command."""
    other = "on" in click.get_current_context().params and is_given("on")
    return tuple(name for name in WISHES if not (other and name in MEMORY))


def _check_alone(names: tuple[str, ...]) -> None:
    options = {p.name: p.opts[0] for p in click.get_current_context().command.params}
    if given := [options[name] for name in names if name in options and is_given(name)]:
        raise ContradictoryWishes(
            f"a plan holds all choices, and {', '.join(given)} would change it", hint=f"drop {given[0]}, or drop --plan"
        )


def _without_wishes(arguments: dict[str, Any], saved: Plan, plugins: Plugins) -> dict[str, Any]:
    """The arguments with the plan's model, and without wishes that the environment has.

    A plan made before its model was downloaded has no path.
    """
    empty = {"keep": (), "cpu": ()}
    wishes = _wishes()
    arguments = {name: empty.get(name) if name in wishes else value for name, value in arguments.items()}
    if not is_given("model"):
        arguments["model"] = saved.model if saved.model in plugins.models.names() else saved.model_path or saved.model
    return arguments
