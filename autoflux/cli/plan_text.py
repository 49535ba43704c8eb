"""A plan as `autoflux plan` prints it: what it takes, where the weights go, why, and what else there is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from autoflux.api import Prepared
from autoflux.cli.output import stdout, warn
from autoflux.cli.tables import table as _table
from autoflux.models.values import Model
from autoflux.planning.comparing import as_alternative
from autoflux.planning.planner import BRIEF, Detail
from autoflux.planning.terms import Offload, Origin, Placement, Waiting
from autoflux.planning.values import Alternative, ComponentPlan, Instead, Plan
from autoflux.planning.weights import component_bytes
from autoflux.units import counted, format_bytes, format_seconds

DECISIVE = ("device", "weights", "offload", "compiling")
"""Choices that are told without being asked for."""


KNOWN = {
    Origin.WISH: "wished",
    Origin.CALIBRATED: "by runs of this model here",
    Origin.MEASURED: "measured",
    Origin.REPORTED: "reported",
    Origin.ASSUMED: "assumed",
    Origin.PRIOR: "a prior of the profile",
}
"""How what a choice rests on is known, in words."""

LEAST = 1e-4
"""Differences below it are not told: seconds, or bytes."""


def show(prepared: Prepared, detail: Detail) -> None:
    """Print a plan for people, as much of it as was asked for."""
    plan = prepared.plan
    if plan.machine is not None:
        stdout.print(
            f"what if: this plan is for {plan.machine}, not for this machine, and cannot be run here",
            soft_wrap=True,
        )
    stdout.print(summary(plan), style="bold", soft_wrap=True)
    if detail.explain or not detail.compare:
        _print(_predictions(plan), _components(plan, prepared.model))
        stdout.print()
        _explain(plan) if detail.explain else stdout.print(_choices(plan))
    if detail.compare:
        _print(*comparison((as_alternative(plan), *plan.rejected)))
    if detail == BRIEF:
        stdout.print()
        stdout.print("--explain: every choice and the next best to it; --compare: all other ways", style="dim")
    for warning in warnings_of(prepared):
        warn(warning)


def _print(*tables: Table) -> None:
    """Those that have rows, with a blank line before each."""
    for table in tables:
        if table.row_count:
            stdout.print()
            stdout.print(table)


def warnings_of(prepared: Prepared) -> list[str]:
    """What there is to know of the plan, and of the machine that it is for."""
    return [*prepared.plan.warnings, *(f"{p.subject}: {p.message}" for p in prepared.hardware.problems)]


def summary(plan: Plan, steps: int | None = None) -> str:
    """The plan in one line, for pictures of so many steps if not of those that it was made for."""
    where = {
        Offload.NONE: "all weights there",
        Offload.COMPONENT: "one component there at a time",
        Offload.STREAM: f"streamed {plan.unit.value} by {plan.unit.value}",
        Offload.NATIVE: f"brought there by {plan.backend}",
    }[plan.offload]
    precision = plan.component("transformer").storage.value
    if plan.offload == Offload.STREAM and not plan.predicted.streamed_bytes:
        where = "all blocks there"
    predicted, picture = plan.predicted, plan.predicted.picture
    steps = steps or picture.steps
    seconds = predicted.seconds_per_image + (steps - picture.steps) * predicted.seconds_per_step / picture.batch
    return (
        f"{plan.model} on {plan.device} in {precision}, {where}: "
        f"about {format_seconds(max(0.0, seconds))} "
        f"for {picture.width}x{picture.height} in {steps} step{'s' * (steps != 1)}"
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
            _place(part, places, home, streams=bool(plan.predicted.streamed_bytes)),
        )
    return table


def _place(part: ComponentPlan, places: Mapping[Placement, str], home: str, *, streams: bool) -> str:
    """Where it is; `streams` says whether any of the transformer's blocks does, which all may stay."""
    waiting = {Waiting.PINNED: "pinned RAM", Waiting.PAGEABLE: "RAM", Waiting.DISK: "its files"}[part.waiting]
    count = len(part.resident)
    if count and not streams:
        return f"{home}, all {counted(count, 'block')} stay"
    staying = f", {counted(count, 'block')} {'stays' if count == 1 else 'stay'}" if count else ""
    return places[part.placement] + (waiting if part.placement == Placement.STREAMED else "") + staying


def _choices(plan: Plan) -> Table:
    """Those that decide most."""
    table = _table("choice", "value", "because", title="Why")
    for choice in plan.choices:
        if choice.topic in DECISIVE:
            table.add_row(choice.topic, choice.value, choice.reason)
    return table


def _explain(plan: Plan) -> None:
    """Every choice with its reason, how what it rests on is known, and the next best."""
    stdout.print("Why", style="bold")
    for choice in plan.choices:
        stdout.print(Text.assemble(f"{choice.topic}: ", (choice.value, "bold"), "  ", (KNOWN[choice.origin], "dim")))
        for line in (choice.reason, *_instead(choice.instead, plan)):
            stdout.print(Padding(line, (0, 0, 0, 4)))


def _instead(instead: Instead | None, plan: Plan) -> Iterable[str]:
    """What the next best would cost, against the plan."""
    if instead is None:
        return
    if instead.lacks:
        yield f"instead {instead.value}: {instead.lacks}"
        return
    told = plan.predicted
    changes = [
        _change(format_seconds, instead.seconds_per_step - told.seconds_per_step, "a step"),
        _change(format_seconds, instead.seconds_per_image - told.seconds_per_image, "a picture"),
        _change(format_seconds, instead.seconds_to_start - told.seconds_to_start, "to start"),
        _change(format_bytes, instead.peak_vram_bytes - told.peak_vram_bytes.peak, "of device memory"),
        _change(format_bytes, instead.peak_ram_bytes - told.peak_ram_bytes, "of RAM"),
    ]
    yield f"instead {instead.value}: {', '.join(filter(None, changes)) or 'the same'}"


def _change(words: Callable[[float], str], difference: float, what: str) -> str:
    """With its sign; empty if there is none to speak of."""
    if abs(difference) < LEAST:
        return ""
    return f"{'+' if difference > 0 else '-'}{words(abs(difference))} {what}"


def comparison(ways: Iterable[Alternative]) -> tuple[Table, Table]:
    """All ways beside each other: those that fit, the one that was taken first; and what the others lack."""
    fitting = _table("way", "quality", "a step", "a picture", "VRAM", "RAM", "start", title="Ways that fit")
    others = _table("way", "quality", "a picture", "does not fit", title="Ways that do not fit")
    for way in ways:
        step, picture = format_seconds(way.seconds_per_step), format_seconds(way.seconds_per_image)
        if not way.fits:
            others.add_row(_way(way), way.quality.value, picture, way.reason)
            continue
        vram = format_bytes(way.peak_vram_bytes) if way.peak_vram_bytes else "-"
        start = format_seconds(way.seconds_to_start)
        fitting.add_row(_way(way), way.quality.value, step, picture, vram, format_bytes(way.peak_ram_bytes), start)
    return fitting, others


def _way(way: Alternative) -> str:
    """Device, strategy, format of the transformer's weights and how they are computed with."""
    widened = way.precision.item_bytes == 1 and not way.native
    words = (way.device, way.offload, way.precision.short_name, "widened" * widened)
    return " ".join(filter(None, (*words, "compiled" * way.compiled)))
