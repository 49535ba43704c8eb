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
from autoflux.hardware.values import (
    NEVER,
    Accelerator,
    Disk,
    Figure,
    Hardware,
    Host,
    Link,
    Problem,
    Size,
    Source,
    Transfer,
)
from autoflux.paths import expanded
from autoflux.units import KIB, MIB, format_bytes, format_number, format_seconds

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

    The first run measures (up to 20 seconds) and keeps the result; later runs only look at what is free now.
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
    folder = expanded(path)
    if not os.path.isdir(folder):  # noqa: PTH112 — `Path` raises for a folder that one may not look into
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
    # What a system would report of itself is as invented as all else of a machine that is only known by name.
    told = Source.ASSUMED if hardware.probed_at == NEVER else Source.REPORTED
    for accelerator in hardware.accelerators:
        yield f"{accelerator.name} ({accelerator.device})", list(_accelerator_rows(accelerator, told))
    if not hardware.accelerators:
        yield "no accelerator: pictures are computed on the processor", []
    yield f"{hardware.host.processor} (cpu)", list(_host_rows(hardware.host, told))
    yield f"disk of {hardware.disk.path}".removesuffix(" of "), list(_disk_rows(hardware.disk))
    yield "versions", [(name, version, "") for name, version in hardware.versions.items()]


def _accelerator_rows(accelerator: Accelerator, told: Source) -> Iterator[Row]:
    yield _size("memory", accelerator.total_bytes)
    yield _size("free", accelerator.free_bytes)
    yield _size("usable", accelerator.usable_bytes)
    if accelerator.unified_memory:
        yield ("", "shared with the processor", "")
    if accelerator.capability:
        yield ("compute capability", accelerator.capability, str(told))
    if accelerator.link:
        yield from _link_rows(accelerator.link, told)
    yield from _rate_rows("matmul", accelerator.matmul_tflops)
    yield from _rate_rows("attention", accelerator.attention_tflops)
    for kind, timing in accelerator.blocks.items():
        yield (f"{kind} block", format_seconds(timing.seconds.value), _known(timing.seconds))
        if timing.launch_seconds:
            yield ("", f"launched in {format_seconds(timing.launch_seconds.value)}", _known(timing.launch_seconds))


def _link_rows(link: Link, told: Source) -> Iterator[Row]:
    if link.pcie_generation and link.pcie_width:
        yield ("link", _link_name(link), str(told))
    yield from _copy_rows(link.transfers)
    if link.pin_seconds_per_gb:
        seconds = format_seconds(link.pin_seconds_per_gb.value)
        yield ("pinning RAM", f"{seconds} a GB", _known(link.pin_seconds_per_gb))


def _copy_rows(transfers: tuple[Transfer, ...]) -> Iterator[Row]:
    """A line for each size, under one that says what is in which column."""
    if not transfers:
        return
    yield ("copies, GB/s", _columns(["pinned in", "out", "pageable in", "out"]), "")
    for size in sorted({transfer.block_bytes for transfer in transfers}):
        rates = [rate for pinned in (True, False) for rate in _rates(transfers, size, pinned=pinned)]
        known = next(str(rate.source) for rate in rates if rate)
        yield (f"  of {_block(size)}", _columns([_copy_rate(rate) for rate in rates]), known)


def _rates(transfers: tuple[Transfer, ...], size: int, *, pinned: bool) -> tuple[Figure | None, Figure | None]:
    found = next((t for t in transfers if (t.block_bytes, t.pinned) == (size, pinned)), None)
    return (found.to_device_gb_per_s, found.to_host_gb_per_s) if found else (None, None)


def _columns(texts: list[str]) -> str:
    return "".join(f"{text:>{width}}" for text, width in zip(texts, (9, 7, 14, 7), strict=True))


def _copy_rate(rate: Figure | None) -> str:
    """With one decimal, so that points stand below each other; the slowest with two."""
    return "-" if rate is None else f"{rate.value:.{2 if rate.value < 0.995 else 1}f}"


def _block(size: int) -> str:
    return f"{size / MIB:.0f} MiB" if size >= MIB else f"{size / KIB:.0f} KiB"


def _link_name(link: Link) -> str:
    name = f"PCIe {link.pcie_generation} x{link.pcie_width}"
    now = (link.current_generation, link.current_width)
    if None in now or now == (link.pcie_generation, link.pcie_width):
        return name
    return f"{name}, now {now[0]} x{now[1]}"


def _host_rows(host: Host, told: Source) -> Iterator[Row]:
    yield ("system", host.system, str(told))
    yield ("cores", str(host.cores), str(told))
    yield _size("RAM", host.total_bytes)
    yield _size("available", host.available_bytes)
    yield _size("can be pinned", host.pinnable_bytes)
    if host.copy_gb_per_s:
        yield ("copies in RAM", f"{format_number(host.copy_gb_per_s.value)} GB/s", str(host.copy_gb_per_s.source))
    yield from _rate_rows("matmul", host.matmul_tflops)


def _disk_rows(disk: Disk) -> Iterator[Row]:
    yield _size("free", disk.free_bytes)
    if disk.read_gb_per_s:
        yield ("reading", f"{format_number(disk.read_gb_per_s.value)} GB/s", _known(disk.read_gb_per_s))


def _rate_rows(what: str, rates: dict[str, Figure]) -> Iterator[Row]:
    for name, rate in rates.items():
        yield (f"{what} {name}", f"{format_number(rate.value)} TFLOP/s", _known(rate))


def _size(name: str, size: Size) -> Row:
    return (name, format_bytes(size.value), _known(size))


def _known(figure: Figure | Size) -> str:
    return f"{figure.source}{f': {figure.note}' if figure.note else ''}"


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
