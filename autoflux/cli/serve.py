"""`autoflux serve`: the model behind a web page and an API."""

from __future__ import annotations

import contextlib
import getpass
import os
import signal
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from autoflux.api import find_model, prepare
from autoflux.cli.options import model_option, no_pack_option
from autoflux.cli.output import stderr, warn
from autoflux.cli.plan_text import summary
from autoflux.cli.saved import saved_plan_option
from autoflux.cli.wishes import wishes_options
from autoflux.errors import MissingExtra
from autoflux.planning.values import Plan, Wishes
from autoflux.plugin_manager import Plugins
from autoflux.runtime.calibration_store import is_off
from autoflux.serving.jobs import Status, WorkerState
from autoflux.serving.replanning import Replanner
from autoflux.serving.server import Stopping, open_port, run_server
from autoflux.serving.service import Service

if TYPE_CHECKING:
    from autoflux.serving.frontend import AsgiApp, Frontend

ALL_ADDRESSES = ("0.0.0.0", "::")  # noqa: S104 — what to warn about

API = "api"
"""The frontend that is always there."""


@click.command("serve")
@click.option(
    "--frontend",
    "names",
    multiple=True,
    default=("gradio",),
    show_default=True,
    envvar="AUTOFLUX_FRONTEND",
    show_envvar=True,
    help="What to show at /; further ones are at /NAME. The API is always at /api.",
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    envvar="AUTOFLUX_HOST",
    show_envvar=True,
    help="Address to listen on.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=6006,
    show_default=True,
    envvar="AUTOFLUX_PORT",
    show_envvar=True,
    help="Port to listen on; 0 takes a free one.",
)
@click.option(
    "--allow-host", "allowed_hosts", multiple=True, help="Another name this server is reached by, as behind a proxy."
)
@click.option("--no-warmup", is_flag=True, help="Do not draw a first step before the first user comes.")
@model_option
@no_pack_option
@saved_plan_option()
@wishes_options
@click.pass_obj
def command(  # noqa: PLR0913 — one for each option
    plugins: Plugins,
    *,
    names: Sequence[str],
    host: str,
    port: int,
    allowed_hosts: Sequence[str],
    no_warmup: bool,
    model: str,
    base: str | None,
    wishes: Wishes,
    saved: Plan | None,
) -> int:
    """Serve a model: the page answers at once, the model loads behind it."""
    frontends = _frontends(plugins, names)
    api = plugins.frontends.get(API)
    found = find_model(model, plugins, base)
    listening = open_port(host, port)
    address = listening.getsockname()[1]
    stopping = Stopping()
    # A plan that was given is followed, whatever it takes.
    planner = None if saved or is_off() else Replanner(found, wishes, plugins)
    service = Service(found, planner=planner, warm_up=not no_warmup, on_status=_narrator(lambda: service))

    def make_app() -> AsgiApp:
        from autoflux.serving import app  # noqa: PLC0415 — imports the HTTP libraries

        return app.make_app(
            service, api, frontends, bound_host=host, allowed_hosts=allowed_hosts, on_failed=stopping.fail
        )

    with stopping.taking_signals():
        stderr.print(f"autoflux: serving {model}", soft_wrap=True)
        _announce(host, address)
        service.start(
            lambda on_stage: prepare(model, wishes, plugins, base=base, on_stage=on_stage, saved=saved), stopping.fail
        )
        run_server(service, listening, make_app, stopping)
    return _ending(stopping)


def _frontends(plugins: Plugins, names: Sequence[str]) -> list[Frontend]:
    """The frontends with pages, each once.

    Raises:
        UnknownName: there is none of that name.
        MissingExtra: one needs packages that are not installed.
    """
    frontends = [plugins.frontends.get(name) for name in dict.fromkeys(names)]
    for frontend in frontends:
        if install := frontend.missing():
            raise MissingExtra(f"the frontend {frontend.name!r}", install)
    return [frontend for frontend in frontends if frontend.name != API]


def _announce(host: str, port: int) -> None:
    shown = "127.0.0.1" if host in ALL_ADDRESSES else host
    shown = f"[{shown}]" if ":" in shown else shown
    stderr.print(f"http://{shown}:{port}", style="bold", soft_wrap=True)
    stderr.print(f"from another computer: {_tunnel(shown, port)}", style="dim", soft_wrap=True)
    if host in ALL_ADDRESSES:
        warn("anyone who can reach this computer can use this server; there is no password")


def _tunnel(host: str, port: int) -> str:
    """The command that makes the page reachable over SSH; in an SSH session with the names it was opened with."""
    connection = os.environ.get("SSH_CONNECTION", "").split()
    target = f"{getpass.getuser()}@{connection[2]}" if len(connection) == 4 else "USER@HOST"
    ssh_port = f" -p {connection[3]}" if len(connection) == 4 and connection[3] != "22" else ""
    return f"ssh -N -L {port}:{host}:{port}{ssh_port} {target}"


def _narrator(service: Callable[[], Service]) -> Callable[[Status], None]:
    """Tells on the terminal what the worker does, a line a stage.

    Of a failure only once the server was ready: before, it is the error that the command ends with.
    """
    said, noted, was_ready = "", "", False

    def tell(status: Status) -> None:
        nonlocal said, noted, was_ready
        was_ready = was_ready or status.worker is WorkerState.READY
        if status.note != noted:
            noted = status.note
            with contextlib.suppress(OSError):
                stderr.print(noted, soft_wrap=True)
        if status.worker is WorkerState.FAILED and not was_ready:
            return
        line = _line(status, service())
        if line and line != said:
            said = line
            with contextlib.suppress(OSError):  # the terminal has been closed; the server goes on
                stderr.print(line, soft_wrap=True)

    return tell


def _line(status: Status, service: Service) -> str:
    if status.worker is WorkerState.READY:
        return f"ready: {summary(service.plan) if service.plan else status.device}"
    if status.worker is WorkerState.STARTING and status.error:
        return f"starting again: {status.error.message}"
    if status.worker in (WorkerState.STARTING, WorkerState.LOADING):
        return f"{status.stage} …" if status.stage else ""
    if status.worker is WorkerState.FAILED and status.error:
        return f"failed: {status.error.message}"
    return ""


def _ending(stopping: Stopping) -> int:
    """The exit code, as shells expect it of a program that was ended by a signal."""
    if stopping.signal == signal.SIGINT:
        raise KeyboardInterrupt
    if stopping.signal is not None:
        return 128 + stopping.signal
    if stopping.error is not None:
        raise stopping.error
    return 0
