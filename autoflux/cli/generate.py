"""`autoflux generate`: pictures from the command line."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import click
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from autoflux.api import Prepared, find_model, open_session, prepare
from autoflux.cli.options import model_option, no_pack_option, order_options
from autoflux.cli.output import complain, fail, json_option, stderr, stdout, succeed, warn
from autoflux.cli.plan_text import summary
from autoflux.cli.saved import saved_plan_option
from autoflux.cli.wishes import wishes_options
from autoflux.errors import AutofluxError, OutputUnwritable, UsageError
from autoflux.files import check_target, check_writable, followed, is_there, write_atomic, write_new
from autoflux.models.pack_shelf import Shelf
from autoflux.models.request import Order, Request, make_requests
from autoflux.paths import expanded
from autoflux.planning.values import Plan, Wishes
from autoflux.plugin_manager import Plugins
from autoflux.runtime.auto_packing import lacking
from autoflux.runtime.picture import Picture, png_files
from autoflux.units import GIB, format_seconds

WORTH_PACKING_BYTES = GIB
"""Less is converted in a moment."""


class _Files(NamedTuple):
    """Where pictures go, one path each."""

    paths: list[Path]
    named: bool
    """By the user: what is there is replaced. Else by autoflux, which takes another name then."""

    @classmethod
    def of(cls, out: Path | None, requests: Sequence[Request]) -> _Files:
        if out is None or _is_folder(out):
            return cls([(out or Path()) / f"autoflux-{r.seed}.png" for r in requests], named=False)
        if len(requests) == 1:
            return cls([out], named=True)
        return cls([out.with_stem(f"{out.stem}-{r.seed}") for r in requests], named=True)

    def check(self) -> None:
        """Raises OutputUnwritable when one of them cannot be written."""
        if not self.named:
            check_writable(self.paths[0].parent)
            return
        for path in self.paths:
            check_target(followed(path))

    def write(self, number: int, png: bytes) -> Path:
        """Write the file of one picture; gives its name. Raises OutputUnwritable."""
        path = self.paths[number]
        if not self.named:
            return write_new(path, png)
        write_atomic(followed(path), png)
        return path


@click.command("generate")
@order_options
@click.option(
    "--out",
    callback=lambda _ctx, _param, value: _target(value),
    metavar="FILE",
    help="PNG file to write, replaced if it exists, or a folder. Several pictures get their seed in the name.",
)
@model_option
@no_pack_option
@saved_plan_option()
@wishes_options
@json_option
@click.pass_obj
def command(
    plugins: Plugins,
    *,
    order: Order,
    out: Path | None,
    model: str,
    base: str | None,
    wishes: Wishes,
    saved: Plan | None,
    as_json: bool,
) -> int:
    """Draw PROMPT and save it as PNG."""
    with stderr.status("taking stock") as status:
        # What the user typed is checked against the model before the machine is measured and the weights are read.
        found = find_model(model, plugins, base)
        requests = make_requests(found, order)
        files = _Files.of(out, requests)
        files.check()
        first = requests[0]
        wishes = wishes.replace(width=first.width, height=first.height, steps=first.steps, pictures=len(requests))
        prepared = prepare(model, wishes, plugins, base=base, on_stage=status.update, saved=saved)
    stderr.print(summary(prepared.plan, first.steps), style="dim", soft_wrap=True)
    pictures = _draw(prepared, plugins, requests)
    written, failed = _write(pictures, files)
    _tell(written, failed, prepared, as_json=as_json)
    if failed:
        return failed.exit_code
    _advise(prepared)
    return 0


def _advise(prepared: Prepared) -> None:
    """Tell how the next start is quicker.

    Nothing is packed here: who has the picture wants to go on, not to wait until as many bytes again are read and
    written.
    """
    with contextlib.suppress(AutofluxError):
        recipes = lacking(prepared.plan, prepared.model, Shelf())
        if sum(recipe.component.disk_bytes for recipe in recipes) >= WORTH_PACKING_BYTES:
            transformer = prepared.plan.component("transformer")
            formats = f"--precision {transformer.storage.value} --arithmetic {transformer.arithmetic.value}"
            command = f"autoflux models pack {shlex.quote(prepared.model.path)} {formats}"
            stderr.print(f"for a quicker start: {command}", style="dim", soft_wrap=True)


def _target(text: str | None) -> Path | None:
    if text is None:
        return None
    if not text.strip():
        raise UsageError("--out is empty", hint="name a file, or leave --out away")
    if text == "-":
        raise UsageError("pictures are not written to standard output", hint="name a file: --out picture.png")
    target = expanded(text)
    if _is_folder(target) or target.suffix.lower() == ".png":
        return target
    if text.endswith(("/", os.sep)):
        raise OutputUnwritable(f"the folder {text!r} is not there", hint="create it first, or name a file")
    if target.suffix:
        raise UsageError(
            f"pictures are saved as PNG, not {target.suffix!r}", hint=f"--out {target.with_suffix('.png')}"
        )
    return target.with_suffix(".png")


def _is_folder(path: Path) -> bool:
    return is_there(path) and path.is_dir()


def _draw(prepared: Prepared, plugins: Plugins, requests: tuple[Request, ...]) -> list[Picture]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task("starting", total=1.0)

        def on_load(stage: str, share: float) -> None:
            progress.update(task, description=stage, completed=share)

        def on_step(done: int, total: int) -> None:
            progress.update(task, description=f"step {done}/{total}", completed=done, total=total)

        prompts = [request.prompt for request in requests]
        with open_session(prepared.plan, prepared.model, plugins, on_load, prompts=prompts) as session:
            progress.reset(task, description="encoding the prompt")
            return session.draw(requests, on_step=on_step)


def _write(pictures: Sequence[Picture], files: _Files) -> tuple[dict[Path, Picture], OutputUnwritable | None]:
    """Save all that can be saved; gives them, and why others could not be."""
    written: dict[Path, Picture] = {}
    failures: list[OutputUnwritable] = []
    for number, (picture, png) in enumerate(zip(pictures, png_files(pictures), strict=True)):
        try:
            written[files.write(number, png)] = picture
        except OutputUnwritable as error:
            failures.append(error)
    if not failures:
        return written, None
    return written, OutputUnwritable("; ".join(error.message for error in failures), hint=failures[0].hint)


def _tell(
    written: Mapping[Path, Picture], failed: OutputUnwritable | None, prepared: Prepared, *, as_json: bool
) -> None:
    for warning in dict.fromkeys(w for picture in written.values() for w in picture.warnings):
        warn(warning)
    if as_json:
        drawn = [
            {"file": str(file), "seconds": picture.seconds, "request": picture.request.to_data()}
            for file, picture in written.items()
        ]
        data = {"pictures": drawn, "plan": prepared.plan.to_data()}
        fail(failed.report(), data) if failed else succeed(data)
        return
    for file, picture in written.items():
        stdout.print(f"{file}", soft_wrap=True)
        stderr.print(f"seed {picture.request.seed}, {format_seconds(picture.seconds)}", style="dim")
    if failed:
        complain(failed.report())
