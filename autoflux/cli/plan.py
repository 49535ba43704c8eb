"""`autoflux plan`: what would be done on this machine, why, and what it would take."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import click

from autoflux.api import Prepared, WhatIf, all_ways, prepare
from autoflux.cli.options import PictureSize, model_option
from autoflux.cli.output import complain, fail, json_option, stderr, stdout, succeed
from autoflux.cli.plan_text import comparison, show, warnings_of
from autoflux.cli.saved import saved_plan_option
from autoflux.cli.what_if import what_if_options
from autoflux.cli.wishes import wishes_options
from autoflux.errors import DoesNotFit, UsageError
from autoflux.files import check_target, followed, write_atomic
from autoflux.planning.drawing import draw
from autoflux.planning.drawing_svg import to_svg
from autoflux.planning.drawing_text import to_text
from autoflux.planning.planner import Detail
from autoflux.planning.values import Alternative, Plan, Wishes
from autoflux.plugin_manager import Plugins


@click.command("plan")
@model_option
@click.option("--size", type=PictureSize(), help="Size of the picture to plan for, such as 1024 or 1344x768.")
@click.option("--steps", type=int, help="Denoise steps of the picture to plan for.")
@click.option("--refresh", is_flag=True, help="Measure the machine again first.")
@click.option(
    "--explain", is_flag=True, help="Every choice: why, how that is known, and what the next best would cost."
)
@click.option(
    "--compare",
    is_flag=True,
    help="The best way of every device, strategy, precision and quality, or what it lacks to fit.",
)
@click.option("--drawing", is_flag=True, help="Draw the plan below the tables: blocks, memory, a step.")
@click.option(
    "--svg",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the drawing as SVG, replaced if it exists.",
)
@click.option("--save", type=click.Path(path_type=Path), metavar="FILE", help="Also write the plan, for --plan.")
@saved_plan_option("size", "steps", "refresh", "compare", "link_gb_per_s", "disk_gb_per_s")
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
    explain: bool,
    compare: bool,
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
    if svg is not None and save is not None and svg.resolve() == save.resolve():
        raise UsageError("--save and --svg name the same file, which holds one of them", hint="name two files")
    save, svg = _checked(save), _checked(svg)
    width, height = size or (None, None)
    wishes = wishes.replace(width=width, height=height, steps=steps)
    detail = Detail(explain=explain, compare=compare)
    try:
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
                detail=detail,
            )
    except DoesNotFit as error:
        if not compare:
            raise
        _refuse(error, all_ways(model, wishes, plugins, base=base, what_if=what_if), as_json=as_json)
    if save is not None:
        write_atomic(save, prepared.plan.to_json().encode())
    if svg is not None:
        write_atomic(svg, to_svg(draw(prepared.plan, prepared.model)).encode())
    if as_json:
        succeed({**prepared.plan.to_data(), "warnings": warnings_of(prepared)})
        return
    show(prepared, detail)
    if drawing:
        _show_drawing(prepared)


def _checked(path: Path | None) -> Path | None:
    """Where to write, found out before the work. Raises OutputUnwritable."""
    if path is None:
        return None
    target = followed(path)
    check_target(target)
    return target


def _refuse(error: DoesNotFit, ways: tuple[Alternative, ...], *, as_json: bool) -> NoReturn:
    """Say why nothing fits, with what every way lacks, and end."""
    if as_json:
        fail(error.report(), {"rejected": [way.to_data() for way in ways]})
    else:
        for table in comparison(ways):
            if table.row_count:
                stdout.print(table)
        complain(error.report())
    click.get_current_context().exit(error.exit_code)


def _show_drawing(prepared: Prepared) -> None:
    drawing = draw(prepared.plan, prepared.model)
    text = to_text(drawing, columns=stdout.width, unicode=not stdout.options.ascii_only)
    stdout.print()
    stdout.print(text, emoji=False, soft_wrap=True)
