"""`autoflux machines`: the machines that `autoflux plan --on` knows."""

from __future__ import annotations

import click
from rich.table import Table

from autoflux.api import other_machine
from autoflux.cli.output import json_option, stdout, succeed
from autoflux.cli.probe import show
from autoflux.hardware.known import LOW_RAM, LOW_RAM_GIB, WINDOWS, known_machine, known_names
from autoflux.hardware.values import Accelerator, Figure, Hardware
from autoflux.units import format_bytes, format_number

COLUMNS = 64
"""What the list takes."""


@click.command("machines")
@click.argument("name", required=False)
@json_option
def command(*, name: str | None, as_json: bool) -> None:
    """List the machines that plans can be made for without having them, or all figures of NAME with their sources."""
    if name is None:
        machines = {known: known_machine(known) for known in known_names()}
        if as_json:
            succeed({known: machine.to_data() for known, machine in machines.items()})
        else:
            _list(machines)
        return
    machine = other_machine(name)
    if as_json:
        succeed(machine.to_data())
    else:
        show(machine)


def _list(machines: dict[str, Hardware]) -> None:
    # In a narrow terminal a row goes on in the next line: cut or folded, these figures would say nothing.
    width = COLUMNS if stdout.width < COLUMNS else None
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), width=width)
    for column in ("name", "memory", "TFLOP/s", "link", "RAM"):
        table.add_column(column, header_style="dim", justify="left" if column == "name" else "right", no_wrap=True)
    for name, machine in machines.items():
        cards = machine.accelerators
        memory, rate, link = _card(cards[0]) if cards else ("", _rate(machine.host.matmul_tflops), "")
        table.add_row(name, memory, rate, link, format_bytes(machine.host.total_bytes.value))
    stdout.print(table, crop=False)
    stdout.print()
    stdout.print(
        f"NAME{WINDOWS} is the same under Windows, NAME{LOW_RAM} the same with {LOW_RAM_GIB} GiB of RAM. "
        "All figures are assumed: `autoflux machines NAME` says from where.",
        style="dim",
    )


def _card(card: Accelerator) -> tuple[str, str, str]:
    link = card.link.to_device_gb_per_s(pinned=True) if card.link else None
    way = "unified" if card.unified_memory else f"{format_number(link.value)} GB/s" if link else ""
    return format_bytes(card.total_bytes.value), _rate(card.matmul_tflops), way


def _rate(rates: dict[str, Figure]) -> str:
    """The first that is listed, which is the one for FLUX's own format."""
    return next((format_number(rate.value) for rate in rates.values()), "")
