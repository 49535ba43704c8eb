"""`autoflux plan`: what would be done on this machine, why, and what it would take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click
from rich.markup import escape
from rich.table import Table

from autoflux.api import Prepared, WhatIf, prepare
from autoflux.cli.options import PictureSize, model_option
from autoflux.cli.output import json_option, stderr, stdout, succeed, warn
from autoflux.cli.saved import saved_plan_option
from autoflux.cli.tables import table as _table
from autoflux.cli.what_if import what_if_options
from autoflux.cli.wishes import wishes_options
from autoflux.errors import UsageError
from autoflux.files import check_writable, write_atomic
from autoflux.models.values import Model
from autoflux.planning.drawing import draw
from autoflux.planning.drawing_svg import to_svg
from autoflux.planning.drawing_text import to_text
from autoflux.planning.values import ComponentPlan, Offload, Placement, Plan, Rejected, Waiting, Wishes
from autoflux.planning.weights import component_bytes
from autoflux.plugin_manager import Plugins
from autoflux.units import format_bytes, format_seconds


@click.command("plan")
@model_option
@click.option("--size", type=PictureSize(), help="Size of the picture to plan for, such as 1024 or 1344x768.")
@click.option("--steps", type=int, help="Denoise steps of the picture to plan for.")
@click.option("--refresh", is_flag=True, help="Measure the machine again first.")
@click.option("--drawing", is_flag=True, help="Draw the plan below the tables: blocks, memory, a step.")
@click.option(
    "--svg",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the drawing as SVG, replaced if it exists.",
)
@click.option("--save", type=click.Path(path_type=Path), metavar="FILE", help="Also write the plan, for --plan.")
@saved_plan_option("size", "steps", "link_gb_per_s", "disk_gb_per_s")
@wishes_options
@what_if_options
@json_option
@click.pass_obj
def command(  # noqa: PLR0913 — one for each option
    plugins: Plugins,
    *,
    model: str,
    base: str | None,
    wishes: Wishes,
    size: tuple[int, int] | None,
    steps: int | None,
    refresh: bool,
    drawing: bool,
    svg: Path | None,
    save: Path | None,
    saved: Plan | None,
    what_if: WhatIf,
    as_json: bool,
) -> None:
    """Show how a model would run: the choice, the reasons, the time and the memory. Loads nothing.

    Here, or with --on on another machine.
    """
    if drawing and as_json:
        raise UsageError("--drawing is text and --json is not: use one of them", hint="--svg FILE goes with --json")
    if svg is not None:
        check_writable(svg.parent)
    width, height = size or (None, None)
    wishes = wishes.replace(width=width, height=height, steps=steps)
    with stderr.status("taking stock") as status:
        prepared = prepare(
            model,
            wishes,
            plugins,
            base=base,
            refresh=refresh,
            on_stage=status.update,
            what_if=what_if,
            saved=saved,
        )
    if save is not None:
        write_atomic(save, prepared.plan.to_json().encode())
    if svg is not None:
        write_atomic(svg, to_svg(draw(prepared.plan, prepared.model)).encode())
    if as_json:
        succeed(prepared.plan.to_data())
        return
    show(prepared)
    if drawing:
        _show_drawing(prepared)


def show(prepared: Prepared) -> None:
    """Print a plan for people."""
    plan = prepared.plan
    if plan.machine is not None:
        stdout.print(
            escape(f"what if: this plan is for {plan.machine}, not for this machine, and cannot be run here"),
            soft_wrap=True,
        )
    stdout.print(f"[bold]{escape(summary(plan))}[/]", soft_wrap=True)
    for table in (_predictions(plan), _components(plan, prepared.model), _choices(plan), _rejected(plan)):
        if table.row_count:
            stdout.print()
            stdout.print(table)
    for warning in (*plan.warnings, *(f"{p.subject}: {p.message}" for p in prepared.hardware.problems)):
        warn(warning)


def _show_drawing(prepared: Prepared) -> None:
    drawing = draw(prepared.plan, prepared.model)
    text = to_text(drawing, columns=stdout.width, unicode=not stdout.options.ascii_only)
    stdout.print()
    stdout.print(text, markup=False, emoji=False, soft_wrap=True)


def summary(plan: Plan) -> str:
    """The plan in one line."""
    where = {
        Offload.NONE: "all weights there",
        Offload.COMPONENT: "one component there at a time",
        Offload.STREAM: "streamed block by block",
        Offload.NATIVE: f"brought there by {plan.backend}",
    }[plan.offload]
    precision = plan.component("transformer").storage.value
    if plan.offload == Offload.STREAM and not plan.predicted.streamed_bytes:
        where = "all blocks there"
    picture = plan.predicted.picture
    return (
        f"{plan.model} on {plan.device} in {precision}, {where}: "
        f"about {format_seconds(plan.predicted.seconds_per_image)} "
        f"for {picture.width}x{picture.height} in {picture.steps} step{'s' * (picture.steps != 1)}"
    )


def _predictions(plan: Plan) -> Table:
    table = _table("", "predicted", title="What it takes")
    predicted = plan.predicted
    table.add_row("a step", format_seconds(predicted.seconds_per_step))
    table.add_row("a picture", format_seconds(predicted.seconds_per_image))
    table.add_row("to start", format_seconds(predicted.seconds_to_start))
    if plan.vram_limit_bytes is not None:
        peaks = predicted.peak_vram_bytes
        for phase, need in (("encode", peaks.encode), ("denoise", peaks.denoise), ("decode", peaks.decode)):
            table.add_row(f"device memory, {phase}", f"{format_bytes(need)} of {format_bytes(plan.vram_limit_bytes)}")
    pinned = f", {format_bytes(predicted.pinned_bytes)} pinned" if predicted.pinned_bytes else ""
    table.add_row("RAM", f"{format_bytes(predicted.peak_ram_bytes)} of {format_bytes(plan.ram_limit_bytes)}{pinned}")
    return table


def _components(plan: Plan, model: Model) -> Table:
    table = _table("component", "parameters", "precision", "weights", "place", title="Where the weights go")
    home = plan.device if plan.vram_limit_bytes is not None else "RAM"
    places = {
        Placement.DEVICE: home,
        Placement.VISITING: f"RAM, visits {home}",
        Placement.STREAMED: f"streams to {home} from ",
        Placement.NATIVE: f"RAM, brought to {home} by {plan.backend}",
        Placement.HOST: "RAM, computed by the processor",
    }
    for part in plan.components:
        component = model.component(part.name)
        table.add_row(
            part.name,
            f"{component.parameter_count:,}",
            part.storage.value,
            format_bytes(component_bytes(model, part)),
            _place(part, places),
        )
    return table


def _place(part: ComponentPlan, places: Mapping[Placement, str]) -> str:
    waiting = {Waiting.PINNED: "pinned RAM", Waiting.PAGEABLE: "RAM", Waiting.DISK: "its files"}[part.waiting]
    staying = f", {len(part.resident)} blocks stay" if part.resident else ""
    return places[part.placement] + (waiting if part.placement == Placement.STREAMED else "") + staying


def _choices(plan: Plan) -> Table:
    table = _table("choice", "value", "because", "known", title="Why")
    for choice in plan.choices:
        table.add_row(choice.topic, choice.value, choice.reason, choice.origin.value)
    return table


def _rejected(plan: Plan) -> Table:
    table = _table("device", "offload", "weights", "a picture", "not taken because", title="Alternatives")
    for other in plan.rejected:
        seconds = "-" if other.seconds_per_image is None else format_seconds(other.seconds_per_image)
        table.add_row(other.device, other.offload.value, _weights(other), seconds, other.reason)
    return table


def _weights(other: Rejected) -> str:
    """Format of the transformer's weights and how they are computed with."""
    native = ", multiplied so" if other.native else ""
    return other.precision.value + native + (", compiled" if other.compiled else "")
