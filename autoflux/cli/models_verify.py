"""`autoflux models verify`: read a downloaded model again and compare checksums."""

from __future__ import annotations

import click

from autoflux.cli.models_options import byte_progress, source_option, the_one
from autoflux.cli.output import json_option, stderr, stdout, succeed
from autoflux.models.hubs.cached import CachedModel
from autoflux.models.hubs.stores import stores
from autoflux.models.hubs.values import RemoteFile, Source
from autoflux.models.hubs.verify import Verification, expected_files, verify
from autoflux.units import format_bytes


@click.command("verify")
@click.argument("name", metavar="NAME|ID")
@source_option
@json_option
@click.pass_context
def command(ctx: click.Context, *, name: str, source: Source | None, as_json: bool) -> None:
    """Read every file of a model and compare it with what its hub promised. Exits with 1 if one has changed."""
    verification = _read(the_one(name, source, stores()))
    if as_json:
        succeed({"whole": not verification.faulty, **verification.to_data()})
    else:
        _show(verification)
    if verification.faulty:
        ctx.exit(1)


def _read(model: CachedModel) -> Verification:
    known = stores()
    total = sum(file.size_bytes for file in expected_files(model, known[model.source]))
    with byte_progress() as progress:
        task = progress.add_task("reading", total=total)

        def on_file(file: RemoteFile) -> None:
            progress.update(task, description=file.path)

        return verify(model, known, on_file, lambda count: progress.update(task, advance=count))


def _show(verification: Verification) -> None:
    for file in verification.faulty:
        stdout.print(f"{file.path} {file.fault}", markup=False, soft_wrap=True)
    unknown = sum(not file.checked for file in verification.files)
    if unknown:
        stderr.print(f"{unknown} files have no checksum; their sizes were compared", style="dim")
    if verification.faulty:
        mend = f"autoflux models pull {verification.repo_id} --source {verification.source} --repair"
        stderr.print(f"[bold]try:[/]   {mend}", soft_wrap=True)
        return
    size = format_bytes(sum(file.size_bytes for file in verification.files))
    stdout.print(f"{verification.name}: {len(verification.files)} files, {size}, all as they should be", markup=False)
