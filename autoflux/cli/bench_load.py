"""`autoflux bench load`: ways to start a model, timed, each in a process of its own."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import click
from rich.table import Table

from autoflux.api import Prepared, find_model, prepare
from autoflux.cli.models_pack import make_packs
from autoflux.cli.options import PictureSize, model_option
from autoflux.cli.output import json_option, stderr, stdout, succeed, warn
from autoflux.cli.plan_text import summary
from autoflux.cli.tables import table
from autoflux.cli.wishes import wishes_options
from autoflux.hardware import page_cache
from autoflux.models.pack_shelf import NO_PACK, Shelf
from autoflux.models.packs import WEIGHTS, Recipe, recipes
from autoflux.models.request import Order, make_requests
from autoflux.models.values import Model
from autoflux.planning.values import Wishes
from autoflux.plugin_manager import Plugins
from autoflux.runtime import prompt_cache
from autoflux.serving.stopwatch import StartTimes, TimedService
from autoflux.units import format_bytes, format_seconds
from autoflux.values import Value

PROMPT = "a lighthouse above a calm sea at dawn"


class Strategy(NamedTuple):
    """A way to start."""

    description: str
    when_ready: bool = False
    """Orders are accepted only once all is loaded."""
    packs: bool = False
    known: bool = False
    """The prompt was encoded by an earlier run."""

    @property
    def environment(self) -> dict[str, str]:
        remembers = {} if self.packs else {prompt_cache.VARIABLE: "off"}
        return {NO_PACK: "0" if self.packs else "1", **remembers}


STRATEGIES = {
    "wait": Strategy("load everything, then accept orders", when_ready=True),
    "queue": Strategy("accept orders at once, load meanwhile"),
    "packs": Strategy("the same from packed weights", packs=True),
    "known": Strategy("the same with a prompt that was encoded before", packs=True, known=True),
}


@click.command("load")
@click.option(
    "--only", "names", multiple=True, type=click.Choice(list(STRATEGIES)), help="Of the strategies this one. Repeat."
)
@click.option("--prompt", default=PROMPT, show_default=True, help="What to draw.")
@click.option("--steps", type=int, help="Denoise steps.")
@click.option("--size", type=PictureSize(), help="Size in pixels, such as 1024 or 1344x768.")
@click.option(
    "--cold/--hot",
    default=page_cache.CAN_DROP,
    help="Drop the model's files from the page cache before each start, or read them into it. Cold where that can be.",
)
@model_option
@wishes_options
@json_option
@click.pass_obj
def command(  # noqa: PLR0913 — one for each option
    plugins: Plugins,
    *,
    names: Sequence[str],
    prompt: str,
    steps: int | None,
    size: tuple[int, int] | None,
    cold: bool,
    model: str,
    base: str | None,
    wishes: Wishes,
    as_json: bool,
) -> None:
    """Time ways to start: until text encoders are loaded, an order is accepted, the first picture is there.

    Before each, the files that it needs are read and nothing done with them: no start can be quicker. All follow the
    same plan. Packs that are missing are made first, as `autoflux models pack` does, and stay.
    """
    width, height = size or (None, None)
    order = Order(prompt=prompt, seed=0, steps=steps, width=width, height=height)
    (request,) = make_requests(find_model(model, plugins, base), order)
    wishes = wishes.replace(width=request.width, height=request.height, steps=request.steps, pictures=1)
    with stderr.status("taking stock") as status, _environment({NO_PACK: "1"}):
        prepared = prepare(model, wishes, plugins, base=base, on_stage=status.update)
    stderr.print(summary(prepared.plan), style="dim", soft_wrap=True)
    cold = cold and _can_drop()
    found = _measure(prepared, order, list(dict.fromkeys(names)) or list(STRATEGIES), cold=cold)
    if as_json:
        rows = [{"strategy": name, **read.to_data(), **times.to_data()} for name, (read, times) in found.items()]
        succeed({"model": prepared.model.name, "cold": cold, "strategies": rows, "plan": prepared.plan.to_data()})
        return
    stdout.print(_table(found, cold=cold))
    for name in found:
        stdout.print(f"{name}: {STRATEGIES[name].description}", style="dim")


class Reading(Value, frozen=True, kw_only=True):
    """The files that a start needs, and the time it takes only to read them, one after the other."""

    read_bytes: int
    read_seconds: float


Measured = dict[str, tuple[Reading, StartTimes]]


def _measure(prepared: Prepared, order: Order, names: Sequence[str], *, cold: bool) -> Measured:
    wanted = _recipes(prepared) if any(STRATEGIES[name].packs for name in names) else []
    found: Measured = {}
    with Shelf().kept(recipe.key() for recipe in wanted):
        if wanted:
            make_packs(prepared.model, wanted)
        for name in names:
            strategy = STRATEGIES[name]
            with stderr.status(f"{name}: {strategy.description}"), _environment(strategy.environment):
                _set_prompt(prepared, order, known=strategy.known)
                reading = _read(_files(prepared.model, wanted, strategy), cold=cold)
                found[name] = reading, TimedService(prepared).time_start(order, when_ready=strategy.when_ready)
    return found


def _recipes(prepared: Prepared) -> list[Recipe]:
    transformer = prepared.plan.component("transformer")
    return recipes(prepared.model, transformer.storage, transformer.arithmetic)


def _set_prompt(prepared: Prepared, order: Order, *, known: bool) -> None:
    """See to it that the prompt was encoded before, or was not."""
    kept = prompt_cache.PromptCache.open(prepared.model, prepared.plan)
    if not known:
        kept.forget(order.prompt)
    elif not kept.knows(order.prompt):
        TimedService(prepared).time_start(order.replace(steps=1), when_ready=False)


def _files(model: Model, wanted: Sequence[Recipe], strategy: Strategy) -> list[Path]:
    if not strategy.packs:
        return sorted({Path(file) for component in model.components for file in component.files})
    read = (r for r in wanted if not (strategy.known and r.component.name.startswith(prompt_cache.ENCODERS)))
    return [Shelf().folder(recipe.key()) / WEIGHTS for recipe in read]


def _can_drop() -> bool:
    if page_cache.CAN_DROP:
        return True
    warn("this system does not drop files from its page cache: all starts are hot")
    return False


def _read(files: Sequence[Path], *, cold: bool) -> Reading:
    """Read the files only. They are in the page cache before and after, or with `cold` they are not."""
    if cold:
        page_cache.drop(files)
    else:
        page_cache.read_all(files)
    began = time.perf_counter()
    nbytes = page_cache.read_all(files)
    seconds = time.perf_counter() - began
    if cold:
        page_cache.drop(files)
    return Reading(read_bytes=nbytes, read_seconds=seconds)


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """What this process and those that it starts are told, for the time of the context."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _table(found: Measured, *, cold: bool) -> Table:
    title = f"starts, files {'not ' if cold else ''}in the page cache"
    made = table(
        "strategy", "files", "only read", "encoders", "accepted", "ready", "picture", "VRAM", "RAM", title=title
    )
    for name, (reading, times) in found.items():
        made.add_row(
            name,
            format_bytes(reading.read_bytes),
            format_seconds(reading.read_seconds),
            format_seconds(times.encoder_seconds) if times.encoder_seconds else "not read",
            format_seconds(times.accepted_seconds),
            format_seconds(times.ready_seconds),
            format_seconds(times.first_picture_seconds),
            format_bytes(times.peak_vram_bytes),
            format_bytes(times.peak_ram_bytes),
        )
    return made
