"""`autoflux probe`: what this machine is, each figure with how it is known."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from autoflux.cli import output
from autoflux.errors import AutofluxError, UsageError
from autoflux.hardware import probe as hardware
from autoflux.hardware.values import Accelerator, Disk, Figure, Hardware, Host, Link, Problem, Size
from autoflux.units import format_bytes

Row = tuple[str, str, str]
"""What, how much, how it is known."""


@click.command(name="probe")
@click.option("--refresh", is_flag=True, help="Measure again, even if this machine was measured before.")
@click.option("--cached", is_flag=True, help="Only say what an earlier probe found; measure nothing.")
@click.option(
    "--models",
    "models_path",
    type=click.Path(path_type=Path),
    help="Folder of models, whose disk is measured (default: Hugging Face's cache).",
)
@output.json_option
def command(refresh: bool, cached: bool, models_path: Path | None, as_json: bool) -> None:  # noqa: FBT001 — flags
    """Say what this machine is: memory, link bandwidth, arithmetic rate, RAM, disk.

    The first run measures (some 20 seconds) and keeps the result; later runs only look at what is free now.
    """
    if refresh and cached:
        raise click.UsageError("--refresh measures and --cached does not: use one of them")
    if models_path is not None:
        _check_folder(models_path)
    found = _from_cache(models_path) if cached else _probe(models_path, refresh=refresh)
    if as_json:
        output.succeed(found)
    else:
        show(found)


def _check_folder(path: Path) -> None:
    """Without this the disk of the nearest folder above would be measured, as it must be for models yet to come."""
    folder = os.path.expanduser(path)  # noqa: PTH111 — `Path` raises for a user without a home
    if not os.path.isdir(folder):  # noqa: PTH112 — nor for a folder that one may not look into
        what = "is not a folder" if os.path.exists(folder) else "does not exist"  # noqa: PTH110
        raise UsageError(
            f"the folder of models {str(path)!r} {what}",
            hint="without --models it is Hugging Face's cache",
            param="models",
        )


def show(hardware: Hardware, console: Console = output.stdout) -> None:
    """Print `hardware` for people. Lines are never cut or folded, so that the output can be searched."""
    sections = list(_sections(hardware))
    # One odd long figure must not push all others beyond the edge of the screen.
    widths = [min(24, max(len(row[column]) for _, rows in sections for row in rows)) for column in (0, 1)]
    for title, rows in sections:
        _print(console, Text(title, style="bold"))
        for row in rows:
            _print(console, _line(row, widths))
        _print(console, Text())
    for problem in hardware.problems:
        _show_problem(console, problem)


def _from_cache(models_path: Path | None) -> Hardware:
    found = hardware.cached(models_path=models_path)
    if found is None:
        raise AutofluxError("this machine, as it is now, was not measured yet", hint="autoflux probe")
    return found


def _probe(models_path: Path | None, *, refresh: bool) -> Hardware:
    if not output.stderr.is_terminal:
        return hardware.probe(refresh=refresh, models_path=models_path)
    with output.stderr.status("looking at this machine") as status:
        say: Callable[[str], None] = status.update
        return hardware.probe(refresh=refresh, models_path=models_path, on_stage=say)


def _sections(hardware: Hardware) -> Iterator[tuple[str, list[Row]]]:
    for accelerator in hardware.accelerators:
        yield f"{accelerator.name} ({accelerator.device})", list(_accelerator_rows(accelerator))
    if not hardware.accelerators:
        yield "no accelerator: pictures are computed on the processor", []
    yield f"{hardware.host.processor} (cpu)", list(_host_rows(hardware.host))
    yield f"disk of {hardware.disk.path}", list(_disk_rows(hardware.disk))
    yield "versions", [(name, version, "") for name, version in hardware.versions.items()]


def _accelerator_rows(accelerator: Accelerator) -> Iterator[Row]:
    yield _size("memory", accelerator.total_bytes)
    yield _size("free", accelerator.free_bytes)
    yield _size("usable", accelerator.usable_bytes)
    if accelerator.unified_memory:
        yield ("", "shared with the processor", "")
    if accelerator.capability:
        yield ("compute capability", accelerator.capability, "reported")
    if accelerator.link:
        yield from _link_rows(accelerator.link)
    yield from _rate_rows(accelerator.matmul_tflops)


def _link_rows(link: Link) -> Iterator[Row]:
    if link.pcie_generation and link.pcie_width:
        yield ("link", _link_name(link), "reported")
    for transfer in sorted(link.transfers, key=lambda t: (not t.pinned, t.block_bytes)):
        memory = "pinned" if transfer.pinned else "pageable"
        size = f"{transfer.block_bytes / 2**20:.0f} MiB"
        to_device, to_host = transfer.to_device_gb_per_s, transfer.to_host_gb_per_s
        rates = f"{_number(to_device.value)} GB/s in, {_number(to_host.value)} out"
        yield (f"copies {memory} {size}", rates, str(to_device.source))


def _link_name(link: Link) -> str:
    name = f"PCIe {link.pcie_generation} x{link.pcie_width}"
    now = (link.current_generation, link.current_width)
    if None in now or now == (link.pcie_generation, link.pcie_width):
        return name
    return f"{name}, now {now[0]} x{now[1]}"


def _host_rows(host: Host) -> Iterator[Row]:
    yield ("system", host.system, "reported")
    yield ("cores", str(host.cores), "reported")
    yield _size("RAM", host.total_bytes)
    yield _size("available", host.available_bytes)
    yield _size("can be pinned", host.pinnable_bytes)
    if host.copy_gb_per_s:
        yield ("copies in RAM", f"{_number(host.copy_gb_per_s.value)} GB/s", str(host.copy_gb_per_s.source))
    yield from _rate_rows(host.matmul_tflops)


def _disk_rows(disk: Disk) -> Iterator[Row]:
    yield _size("free", disk.free_bytes)
    if disk.read_gb_per_s:
        yield ("reading", f"{_number(disk.read_gb_per_s.value)} GB/s", str(disk.read_gb_per_s.source))


def _rate_rows(rates: dict[str, Figure]) -> Iterator[Row]:
    for precision, rate in rates.items():
        yield (f"matmul {precision}", f"{_number(rate.value)} TFLOP/s", str(rate.source))


def _size(name: str, size: Size) -> Row:
    return (name, format_bytes(size.value), f"{size.source}{f': {size.note}' if size.note else ''}")


def _number(value: float) -> str:
    """Three significant figures."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}"


def _line(row: Row, widths: list[int]) -> Text:
    label, figure, known = row
    line = Text(f"  {label:<{widths[0]}}  ")
    if not known:
        return line.append(figure)
    return line.append(f"{figure:<{widths[1]}}  ").append(known, style="dim")


def _show_problem(console: Console, problem: Problem) -> None:
    line = Text("problem: ", style="bold yellow")
    _print(console, line.append(f"{problem.subject}: {problem.message}", style="not bold default"))
    if problem.hint:
        _print(console, Text(f"  try: {problem.hint}"))


def _print(console: Console, line: Text) -> None:
    console.print(line, soft_wrap=True)
