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
from autoflux.errors import DoesNotFit, ModelNotFound, UnknownName
from autoflux.hardware.known import known_machine, known_names
from autoflux.hardware.values import Accelerator, Hardware
from autoflux.models.flops import image_tokens, step_flop
from autoflux.models.values import Architecture, Block, BlockList, Component, Model, ParameterCount, Precision
from autoflux.planning.values import Plan, Waiting, Wishes
from autoflux.plugin_manager import Plugins, load_plugins
from autoflux.units import format_bytes, format_seconds

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
    model = flux_dev(plugins)
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
        yield (
            f"device memory: {format_bytes(card.total_bytes.value)}, of which {format_bytes(card.usable_bytes.value)} "
            f"are usable ({card.usable_bytes.note}); less {format_bytes(plan.priors.reserve_bytes)} left free for "
            f"others, {format_bytes(plan.vram_limit_bytes)} may be taken"
        )
        passed = f" and {format_bytes(ring)} the ring that weights pass through" if ring else ""
        yield (
            f"needed: {format_bytes(peaks.encode)} to encode, {format_bytes(peaks.denoise)} to denoise, "
            f"{format_bytes(peaks.decode)} to decode; of each {format_bytes(plan.priors.context_bytes)} is the "
            f"driver's context{passed}"
        )
    pinned = f", {format_bytes(told.pinned_bytes)} of it pinned" if told.pinned_bytes else ""
    yield f"RAM: needs {format_bytes(told.peak_ram_bytes)}{pinned}; {format_bytes(plan.ram_limit_bytes)} may be taken"


def time(plan: Plan, machine: Hardware, model: Model) -> Iterator[str]:
    """What arithmetic alone and the link alone would take, against the step that the planner predicts."""
    picture, part = plan.predicted.picture, plan.component("transformer")
    tokens = picture.text_tokens + image_tokens(model.architecture, picture.width, picture.height)
    flop = step_flop(model.architecture, tokens)
    card = _card(plan, machine)
    rates = card.matmul_tflops if card else machine.host.matmul_tflops
    rate = rates[part.arithmetic].value if part.arithmetic in rates else plan.priors.matmul_tflops
    share = plan.priors.step_efficiency
    yield (
        f"arithmetic: {flop / 1e12:.1f} TFLOP a step / ({rate:.3g} TFLOP/s in {part.arithmetic.value} x {share:g}) = "
        f"{format_seconds(flop / (rate * 1e12 * share))}"
    )
    link = card.link.to_device_gb_per_s(pinned=True) if card and card.link else None
    if link and (streamed := streamed_bytes(plan, model)):
        yield (
            f"link: {format_bytes(streamed)} streamed a step / {link.value:.3g} GB/s ({link.note}) = "
            f"{format_seconds(streamed / (link.value * 1e9))}; weights wait in {WAITING[plan.waiting]}"
        )
    yield f"predicted: {format_seconds(plan.predicted.seconds_per_step)} a step, {picture.steps} steps a picture"


def streamed_bytes(plan: Plan, model: Model) -> int:
    """Bytes of the transformer's blocks that come over the link in each step."""
    part = plan.component("transformer")
    if part.placement != "streamed":
        return 0
    coming = [b for i, b in enumerate(model.component("transformer").blocks) if i not in part.resident]
    left_out = sum(b.parameters.modulation for b in coming) if plan.hoist_modulation else 0
    return (sum(b.parameters.total for b in coming) - left_out) * part.storage.item_bytes


def _way(plan: Plan) -> str:
    part = plan.component("transformer")
    where = {"device": "all weights stay", "visiting": "a component at a time", "streamed": "streamed"}[part.placement]
    staying = f", {len(part.resident)} blocks stay" if part.resident else ""
    waiting = f" from {WAITING[part.waiting]}" if part.placement == "streamed" else ""
    return f"{plan.device} in {part.storage.value}, {where}{waiting}{staying}"


def _need(error: DoesNotFit) -> str:
    return error.message.partition(": ")[2].partition(" (")[0]


def _card(plan: Plan, machine: Hardware) -> Accelerator | None:
    return next((card for card in machine.accelerators if card.device == plan.device), None)


def flux_dev(plugins: Plugins) -> Model:
    """FLUX.1-dev without its weights: as autoflux knows it, or else from its published sizes."""
    try:
        return find_model("flux.1-dev", plugins)
    except (UnknownName, ModelNotFound):
        return FLUX_DEV


def _block(total: int, modulation: int = 0) -> Block:
    counts = ParameterCount(matmul=total - modulation, modulation=modulation)
    return Block(parameters=counts, disk_bytes=2 * total)


def _component(name: str, rest: int, **lists: tuple[int, Block]) -> Component:
    blocks = (BlockList(path=path, blocks=(block,) * count) for path, (count, block) in lists.items())
    return Component(
        name=name, class_name="", disk_precision=Precision.BFLOAT16, block_lists=tuple(blocks), rest=_block(rest)
    )


FLUX_DEV = Model(
    name="flux.1-dev",
    path="flux.1-dev",
    revision="published sizes",
    architecture=Architecture(
        hidden_size=3072,
        head_count=24,
        double_blocks=19,
        single_blocks=38,
        patch_pixels=16,
        guidance=True,
        text_hidden_size=4096,
        text_layers=24,
        text_parameters=4_762_310_656,
        vae_channels=(128, 256, 512, 512),
        vae_layers=2,
        latent_channels=16,
    ),
    components=(
        _component("text_encoder", 38_006_016, layers=(12, _block(7_087_872))),
        _component("text_encoder_2", 131_602_432, block=(24, _block(192_946_176))),
        _component(
            "transformer",
            64_124_992,
            transformer_blocks=(19, _block(339_831_296, 12 * 3072**2)),
            single_transformer_blocks=(38, _block(141_591_808, 3 * 3072**2)),
        ),
        _component("vae", 83_819_683),
    ),
)
"""11.9 G parameters in the transformer, 4.76 G and 123 M in the text encoders, 84 M in the VAE."""

if __name__ == "__main__":
    main()
