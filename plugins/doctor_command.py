"""The command `autoflux doctor`: looks for what commonly goes wrong and says what to do about it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from autoflux import (
    cache_dir,
    config_dir,
    find_model,
    hookimpl,
    json_option,
    probe,
    stderr,
    stdout,
    succeed,
    user_profiles,
)

from . import doctor_checks as checks
from .doctor_checks import Finding, State

OWN_VARIABLES = (
    "AUTOFLUX_CACHE_DIR",
    "AUTOFLUX_CONFIG_DIR",
    "AUTOFLUX_DEBUG",
    "AUTOFLUX_FAKE",
    "AUTOFLUX_PLUGINS",
    "AUTOFLUX_PROMPT_CACHE",
    "AUTOFLUX_NO_PACK",
    "AUTOFLUX_BASE",
    "AUTOFLUX_CALIBRATION",
    "AUTOFLUX_PACK_LIMIT",
    "AUTOFLUX_SOURCE",
)
"""Those that belong to no option of a command."""

STYLES = {State.OK: "green", State.WARNING: "yellow", State.FAILURE: "bold red"}

Check = tuple[str, Callable[[], checks.Findings]]


@hookimpl
def register_commands(register: Callable[[click.Command], None]) -> None:
    """Register `autoflux doctor`."""
    register(command)


@click.command(name="doctor")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    envvar="AUTOFLUX_HOST",
    show_envvar=True,
    help="Address to serve at.",
)
@click.option(
    "--port",
    default=6006,
    show_default=True,
    type=click.IntRange(1, 65535),
    envvar="AUTOFLUX_PORT",
    show_envvar=True,
    help="Port to serve at.",
)
@click.option(
    "--model",
    default="sample",
    show_default=True,
    envvar="AUTOFLUX_MODEL",
    show_envvar=True,
    help="Name or folder of a model.",
)
@json_option
@click.pass_context
def command(ctx: click.Context, host: str, port: int, model: str, as_json: bool) -> None:  # noqa: FBT001 — a flag
    """Look for what commonly goes wrong. Exits with 1 if anything fails.

    Checks Python, torch and driver, devices, memory, disk, link, packages, plugins, profiles, folders, port and
    model. The first run measures this machine, as `autoflux probe` does.
    """
    findings = [finding for name, check in _checks(ctx, host, port, model) for finding in checks.run_check(name, check)]
    if as_json:
        failures = sum(finding.state == State.FAILURE for finding in findings)
        succeed({"healthy": failures == 0, "findings": findings})
    else:
        _show(findings)
    if any(finding.state == State.FAILURE for finding in findings):
        ctx.exit(1)


def _checks(ctx: click.Context, host: str, port: int, model: str) -> Iterator[Check]:
    plugins = ctx.obj
    hardware = _probe(_models_folder(model, plugins))
    yield "python", checks.check_python
    for name, check in (
        ("torch", checks.check_torch),
        ("devices", checks.check_devices),
        ("vram", checks.check_free_memory),
        ("ram", checks.check_ram),
        ("disk", checks.check_disk),
        ("link", checks.check_link),
    ):
        yield name, partial(check, hardware)
    yield "packages", checks.check_packages
    yield "plugins", lambda: checks.check_plugins(plugins.problems, len(plugins.sources))
    yield "profiles", lambda: checks.check_profiles(user_profiles(known=plugins.profiles))
    yield "folders", lambda: checks.check_folder("cache", cache_dir(), "AUTOFLUX_CACHE_DIR")
    yield "folders", lambda: checks.check_folder("configuration", config_dir(), "AUTOFLUX_CONFIG_DIR")
    yield "port", lambda: checks.check_port(host, port)
    yield "address", lambda: checks.check_address(host, port, os.environ)
    yield "memory lock", lambda: checks.check_memory_lock(checks.memory_lock_limits())
    yield "environment", lambda: checks.check_environment(os.environ, _known_variables(ctx))
    yield "model", lambda: checks.check_model(model, plugins)


def _probe(models_path: Path | None) -> Any:
    if not stderr.is_terminal:
        return probe(models_path=models_path)
    with stderr.status("looking at this machine") as status:
        return probe(models_path=models_path, on_stage=status.update)


def _models_folder(name: str, plugins: Any) -> Path | None:
    """The folder whose disk matters; the usual place of models where the name does not lead to one."""
    try:
        return Path(find_model(name, plugins).path)
    except Exception:  # noqa: BLE001 — the check of the model says what is wrong with it
        return None


def _known_variables(ctx: click.Context) -> set[str]:
    """What the options of all commands can be set by."""
    program = ctx.find_root().command
    known = set(OWN_VARIABLES)
    if isinstance(program, click.Group):
        for name in program.list_commands(ctx):
            found = program.get_command(ctx, name)
            known.update(variable for option in (found.params if found else ()) for variable in _variables(option))
    return known


def _variables(option: click.Parameter) -> list[str]:
    given = option.envvar or []
    return [given] if isinstance(given, str) else list(given)


def _show(findings: list[Finding]) -> None:
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        line = Text(f"{finding.state:<7}  ", style=STYLES[finding.state])
        line.append(f"{finding.check:<{width}}  {finding.message}", style="not bold default")
        stdout.print(line, soft_wrap=True)
        if finding.hint:
            stdout.print(Text(f"{'':<{width + 9}}  try: {finding.hint}"), soft_wrap=True)
    counts = [sum(finding.state == state for finding in findings) for state in State]
    warnings, failures = (
        f"{n} {what}{'s' * (n != 1)}" for n, what in zip(counts[1:], ("warning", "failure"), strict=True)
    )
    stdout.print(Text(f"\n{counts[0]} ok, {warnings}, {failures}"))
