"""`autoflux models verify`: read a downloaded model again and compare checksums."""

from __future__ import annotations

from pathlib import Path

import click

from autoflux.cli.models_options import byte_progress, source_option, the_one
from autoflux.cli.models_verify_packs import check_packs, show_packs
from autoflux.cli.output import hint, json_option, stderr, stdout, succeed
from autoflux.files import check_text, is_there
from autoflux.models.hubs.cached import CachedModel
from autoflux.models.hubs.stores import stores
from autoflux.models.hubs.values import RemoteFile, Source
from autoflux.models.hubs.verify import Verification, expected_files, verify
from autoflux.paths import expanded
from autoflux.plugin_manager import Plugins
from autoflux.units import counted, format_bytes


@click.command("verify")
@click.argument("name", metavar="NAME|ID|PATH")
@source_option
@json_option
@click.pass_context
def command(ctx: click.Context, *, name: str, source: Source | None, as_json: bool) -> None:
    """Read every file of a model and compare it with what its hub promised, and its packs with what was written.

    Of a model that is from no hub only the packs are read. Exits with 1 if anything has changed.
    """
    place, verification = _place(name, ctx.obj), None
    if place is None:
        model = the_one(name, source, stores())
        place, verification = stores()[model.source].folder(model.repo_id), _read(model)
    packs = check_packs(place)
    faulty = bool(verification and verification.faulty) or any(pack.is_faulty for pack in packs)
    if as_json:
        checked = [pack.to_data() for pack in packs]
        succeed({"whole": not faulty, **(verification.to_data() if verification else {"name": name}), "packs": checked})
    else:
        if verification:
            _show(verification)
        show_packs(packs)
        if not verification and not packs:
            said = f"{name}: from no hub and without packs; there is nothing to compare it with"
            stdout.print(said, soft_wrap=True)
    if faulty:
        ctx.exit(1)


def _place(name: str, plugins: Plugins) -> Path | None:
    """Where a model is that is from no hub."""
    registered = {entry.name: Path(entry.path) for entry in plugins.models}
    if name in registered:
        return registered[name]
    path = expanded(name)
    if not is_there(path):
        return None
    check_text(path.absolute())
    return path.resolve() if path.is_dir() else path.absolute() if path.is_file() else None


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
        stdout.print(f"{file.path} {file.fault}", soft_wrap=True)
    unknown = sum(not (file.checked or file.fault) for file in verification.files)
    if unknown:
        stderr.print(f"without a checksum, compared by size: {counted(unknown, 'file')}", style="dim")
    if verification.faulty:
        mend = f"autoflux models pull {verification.repo_id} --source {verification.source} --repair"
        hint(mend)
        return
    size = format_bytes(sum(file.size_bytes for file in verification.files))
    files = counted(len(verification.files), "file")
    stdout.print(f"{verification.name}: {files}, {size}, all as they should be", soft_wrap=True)
