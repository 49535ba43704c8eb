"""The program: finds plugins, dispatches commands, and turns every error into a message and an exit code."""

from __future__ import annotations

import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import click

from autoflux import __version__, process
from autoflux.cli import interrupt, output
from autoflux.errors import AutofluxError, ErrorReport, OutputUnwritable, PluginConflict, UnknownName, describe
from autoflux.plugin_manager import Plugins, load_plugins
from autoflux.runtime import bytecode

COMMANDS = ("probe", "machines", "plan", "tune", "generate", "serve", "bench", "models", "plugins")
"""Modules of `autoflux.cli` that hold a click command named `command`, in the order of the help page."""


class Program(click.Group):
    """The `autoflux` command. Modules of commands are imported when they are asked for."""

    def __init__(self, plugins: Plugins) -> None:
        super().__init__("autoflux", help="Measure this machine, plan the best way to run a FLUX model on it, run it.")
        self.params.append(_version_option())
        self.plugins = plugins
        for name in plugins.commands.names():
            if name in COMMANDS:
                raise PluginConflict(
                    f"the plugin {plugins.commands.owner(name)!r} offers a command named {name!r}, which is built in",
                    hint="uninstall that plugin",
                )

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return [*COMMANDS, *self.plugins.commands.names()]

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            raise UnknownName("command", args[0], self.list_commands(ctx), hint="autoflux --help")
        return super().resolve_command(ctx, args)

    def get_command(self, _ctx: click.Context, name: str) -> click.Command | None:
        if name in COMMANDS:
            command: click.Command = importlib.import_module(f"autoflux.cli.{name}").command
            return command
        return self.plugins.commands.get(name) if name in self.plugins.commands.names() else None


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit: 0 ok, 1 failed, 2 usage, 3 does not fit this machine, 130 interrupted."""
    interrupt.install()
    process.claim()
    bytecode.keep()
    _open_closed_streams()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A file name that the terminal's encoding lacks is no reason to fail after the work is done.
            stream.reconfigure(errors="backslashreplace")
    sys.exit(_flushed(run(arguments)))


def _open_closed_streams() -> None:
    """Give a stream that was closed (`>&-`) somewhere to go; else a file opened later would get its number."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 — open until the end


def _flushed(code: int) -> int:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _close_stdout()
    except OSError as error:
        _close_stdout()
        output.complain(
            ErrorReport(code="output_unwritable", message=f"cannot write to standard output: {error.strerror}")
        )
        return 1
    return code


def run(arguments: Sequence[str], plugins: Plugins | None = None) -> int:
    """Run one command; returns the exit code and lets no exception out."""
    try:
        with interrupt.command_running():
            result = _dispatch(list(arguments), plugins or load_plugins())
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, click.Abort):
        return _interrupted(as_json="--json" in arguments)
    except BrokenPipeError:
        return _close_stdout()
    except Exception as error:  # noqa: BLE001 — the one place where errors become messages
        as_json = "--json" in arguments
        return _interrupted(as_json=as_json) if interrupt.seen() else _report(error, as_json=as_json)
    return result if isinstance(result, int) else 0


def _dispatch(arguments: list[str], plugins: Plugins) -> object:
    return Program(plugins).main(arguments, prog_name="autoflux", standalone_mode=False, obj=plugins)


def _report(error: Exception, *, as_json: bool) -> int:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message(), err=True)
        return error.exit_code
    if isinstance(error, click.ClickException):
        report, code = _usage_report(error), error.exit_code
    else:
        report, code = describe(error), error.exit_code if isinstance(error, AutofluxError) else 1
    if os.environ.get("AUTOFLUX_DEBUG"):
        traceback.print_exception(error)
    try:
        if as_json:
            output.fail(report)
            return code
    except OutputUnwritable as unwritable:
        report = unwritable.report()
    output.complain(report)
    return code


def _interrupted(*, as_json: bool) -> int:
    report = ErrorReport(code="interrupted", message="interrupted")
    if as_json:
        output.fail(report)
    else:
        output.stderr.print("interrupted", style="dim")
    return interrupt.EXIT_CODE


def _usage_report(error: click.ClickException) -> ErrorReport:
    context = error.ctx if isinstance(error, click.UsageError) else None
    hint = f"{context.command_path} --help" if context else None
    return ErrorReport(code="usage", message=error.format_message(), hint=hint)


def _close_stdout() -> int:
    # The reader (such as `head`) has gone; without this the interpreter complains when it flushes at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _version_option() -> click.Option:
    def show(ctx: click.Context, _param: click.Parameter, value: bool) -> None:  # noqa: FBT001 — click's signature
        if value:
            click.echo(f"autoflux {__version__}")
            ctx.exit()

    return click.Option(
        ["--version"], is_flag=True, expose_value=False, is_eager=True, callback=show, help="Show the version and exit."
    )
