"""What autoflux would do with FLUX.1-dev on machines that are not here: predictions, with their arithmetic.

    python -m benchmarks.what_if                # print the tables of docs/machines.md
    python -m benchmarks.what_if --write        # put them into docs/machines.md

Nothing is measured: machines are public specifications (`autoflux machines`), times and memory are the planner's.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from autoflux.api import find_model, plan_for
from autoflux.errors import DoesNotFit
from autoflux.hardware.known import known_machine, known_names
from autoflux.hardware.values import Accelerator, Hardware, Size
from autoflux.models.flops import image_tokens, step_flop
from autoflux.models.values import Model
from autoflux.planning import streaming
from autoflux.planning.terms import Waiting
from autoflux.planning.values import Plan, Wishes
from autoflux.plugin_manager import Plugins, load_plugins
from autoflux.units import GB, counted, format_bytes, format_seconds

PAGE = Path(__file__).parents[1] / "docs" / "machines.md"
BEGIN, END = "<!-- begin: python -m benchmarks.what_if --write -->", "<!-- end -->"

SHOWN = (
    "rtx-3050-laptop-4gb-windows",
    "rtx-4060-8gb",
    "rtx-4060-laptop-8gb-windows",
    "rtx-3060-12gb",
    "rtx-3060-12gb-low-ram",
    "rtx-4090-24gb",
    "m3-max-64gb",
)
"""Those whose arithmetic is shown."""

SMALLER = (768, 512, 256)
"""Sides, in pixels, to try where 1024x1024 is refused."""

WAITING = {Waiting.PINNED: "pinned RAM", Waiting.PAGEABLE: "ordinary RAM", Waiting.DISK: "their files"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"replace the tables in {PAGE.name}")
    text = "\n".join(page(load_plugins()))
    if parser.parse_args().write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{rest.partition(END)[2]}")
    else:
        print(text)


def page(plugins: Plugins) -> Iterator[str]:
    """Markdown: the arithmetic of some machines, then one line for every known one."""
    model = find_model("flux.1-dev", plugins, absent=True)
    for name in SHOWN:
        yield from section(name, model, plugins)
    yield "## All known machines"
    yield ""
    yield "| machine | what would be done | a step | a picture | card memory | RAM |"
    yield "|---|---|--:|--:|--:|--:|"
    for name in known_names():
        yield row(name, model, plugins)
    yield ""


def section(name: str, model: Model, plugins: Plugins) -> Iterator[str]:
    """One machine in words and figures."""
    machine = known_machine(name)
    yield f"### {name}"
    yield ""
    try:
        plan = plan_for(model, Wishes(), plugins, machine)
    except DoesNotFit as error:
        yield f"**Refused**: {error.message}."
        yield from _smaller(machine, model, plugins)
    else:
        yield f"On {_way(plan)}: {format_seconds(plan.predicted.seconds_per_image)} a picture."
        yield ""
        yield from (f"- {line}" for line in (*memory(plan, machine), *time(plan, machine, model)))
    yield ""


def _smaller(machine: Hardware, model: Model, plugins: Plugins) -> Iterator[str]:
    """The largest of some smaller sizes that the machine could draw."""
    for side in SMALLER:
        try:
            plan = plan_for(model, Wishes(width=side, height=side), plugins, machine)
        except DoesNotFit:
            continue
        told = plan.predicted
        peak = told.peak_vram_bytes.peak or told.peak_ram_bytes
        yield (
            f"At {side}x{side} it would run on {_way(plan)}: {format_seconds(told.seconds_per_image)} a picture, "
            f"{format_bytes(peak)} at peak."
        )
        return
    yield f"Nor would pictures of {SMALLER[-1]}x{SMALLER[-1]} fit."


def row(name: str, model: Model, plugins: Plugins) -> str:
    """One machine in a line."""
    try:
        plan = plan_for(model, Wishes(), plugins, known_machine(name))
    except DoesNotFit as error:
        return f"| {name} | refused: {_need(error)} | | | | |"
    told = plan.predicted
    step, picture = format_seconds(told.seconds_per_step), format_seconds(told.seconds_per_image)
    vram = format_bytes(told.peak_vram_bytes.peak) if plan.vram_limit_bytes is not None else ""
    return f"| {name} | {_way(plan)} | {step} | {picture} | {vram} | {format_bytes(told.peak_ram_bytes)} |"


def memory(plan: Plan, machine: Hardware) -> Iterator[str]:
    """Need against have, on the card and in RAM."""
    told = plan.predicted
    card = _card(plan, machine)
    if card is not None and plan.vram_limit_bytes is not None:
        peaks, ring = told.peak_vram_bytes, plan.ring_bytes
        # Of unified memory the driver keeps none for itself: all that is free is usable.
        sizes = [_size(card.free_bytes, "are free")] if card.usable_bytes != card.free_bytes else []
        sizes += [_size(card.usable_bytes, "are usable"), f"{format_bytes(plan.vram_limit_bytes)} may be taken"]
        yield (
            f"device memory: {format_bytes(card.total_bytes.value)}, of which {', '.join(sizes)} "
            f"(less {format_bytes(plan.priors.reserve_bytes)} left free for others)"
        )
        passed = f" and {format_bytes(ring)} the ring that weights pass through" if ring else ""
        yield (
            f"needed: {format_bytes(peaks.encode)} to encode, {format_bytes(peaks.denoise)} to denoise, "
            f"{format_bytes(peaks.decode)} to decode; of each {format_bytes(plan.priors.context_bytes)} is the "
            f"driver's context{passed}"
        )
    pinned = f", {format_bytes(told.pinned_bytes)} of it pinned" if told.pinned_bytes else ""
    yield f"RAM: needs {format_bytes(told.peak_ram_bytes)}{pinned}; {format_bytes(plan.ram_limit_bytes)} may be taken"


def _size(size: Size, what: str) -> str:
    """With its note, so that each figure of a line follows from the one before."""
    return f"{format_bytes(size.value)} {what} ({size.note})"


def time(plan: Plan, machine: Hardware, model: Model) -> Iterator[str]:
    """What arithmetic alone and copies alone would take, against the step that the planner predicts."""
    picture, part = plan.predicted.picture, plan.component("transformer")
    tokens = picture.text_tokens + image_tokens(model.architecture, picture.width, picture.height)
    flop = step_flop(model.architecture, tokens)
    card = _card(plan, machine)
    rates = card.matmul_tflops if card else machine.host.matmul_tflops
    multiplied = part.storage if part.native else part.arithmetic
    rate = rates[multiplied].value if multiplied in rates else plan.priors.matmul_tflops
    blocks = {kind: format_seconds(seconds) for kind, seconds in plan.predicted.block_seconds.items()}
    yield (
        f"arithmetic: {flop / 1e12:.1f} TFLOP a step, products at {rate:.3g} TFLOP/s in {multiplied.value}; with "
        f"attention and the rest {blocks['double']} for each of {model.architecture.double_blocks} double blocks and "
        f"{blocks['single']} for each of {model.architecture.single_blocks} single ones"
        f"{', compiled' * plan.compiled}, together {format_seconds(computed_seconds(plan, model))}"
    )
    if streamed := streamed_bytes(plan, model):
        yield copies(plan, machine, streamed)
    yield f"predicted: {format_seconds(plan.predicted.seconds_per_step)} a step, {picture.steps} steps a picture"


def copies(plan: Plan, machine: Hardware, streamed: int) -> str:
    """What is streamed a step over the slowest part of its way: steps wait for that one, which need not be the link."""
    card, rate = _card(plan, machine), plan.predicted.copy_gb_per_s
    link = card.link.to_device_gb_per_s(pinned=True) if card and card.link else None
    slowest, beside = "link", f" ({link.note})" if link else ""
    if link and rate < link.value:
        slowest = {Waiting.DISK: "disk", Waiting.PAGEABLE: "RAM"}.get(plan.waiting, "link")
        beside = f", over a link of {link.value:.3g} GB/s ({link.note})"
    seconds = format_seconds(streamed / (rate * GB))
    return (
        f"{slowest}: {format_bytes(streamed)} streamed a step / {rate:.3g} GB/s{beside} = {seconds}; "
        f"weights wait in {WAITING[plan.waiting]}"
    )


def computed_seconds(plan: Plan, model: Model) -> float:
    """What all blocks of a step compute for."""
    size, seconds = model.architecture, plan.predicted.block_seconds
    return size.double_blocks * seconds["double"] + size.single_blocks * seconds["single"]


def streamed_bytes(plan: Plan, model: Model) -> int:
    """Bytes of the transformer's blocks that come over the link in each step."""
    part = plan.component("transformer")
    if part.placement != "streamed":
        return 0
    return streaming.streamed_bytes(model, plan.arrangement)


def _way(plan: Plan) -> str:
    part = plan.component("transformer")
    there = f"{plan.device} in {part.storage.value}"
    count = len(part.resident)
    if count and not plan.predicted.streamed_bytes:
        return f"{there}, all {counted(count, 'block')} stay"
    where = {"device": "all weights stay", "visiting": "a component at a time", "streamed": "streamed"}[part.placement]
    staying = f", {counted(count, 'block')} {'stays' if count == 1 else 'stay'}" if count else ""
    waiting = f" from {WAITING[part.waiting]}" if part.placement == "streamed" else ""
    return f"{there}, {where}{waiting}{staying}"


def _need(error: DoesNotFit) -> str:
    return error.message.partition(": ")[2].partition(" (")[0]


def _card(plan: Plan, machine: Hardware) -> Accelerator | None:
    return next((card for card in machine.accelerators if card.device == plan.device), None)


if __name__ == "__main__":
    main()
