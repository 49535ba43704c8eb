"""`autoflux models rm`: delete a downloaded model."""

from __future__ import annotations

import click

from autoflux.cli import interrupt
from autoflux.cli.models_options import source_option, the_one
from autoflux.cli.models_pack_rm import remove_packs, tell_removed
from autoflux.cli.output import fail, json_option, stderr, stdout, succeed
from autoflux.errors import UsageError
from autoflux.models.hubs.remove import Removal, plan_removal, remove
from autoflux.models.hubs.stores import stores
from autoflux.models.hubs.values import Source
from autoflux.models.pack_shelf import Shelf
from autoflux.units import format_bytes


@click.command("rm")
@click.argument("name", metavar="NAME|ID")
@source_option
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def command(*, name: str, source: Source | None, yes: bool, as_json: bool) -> int:
    """Delete all revisions of a model from its hub's cache, and its packs. Files that other models link to stay."""
    known = stores()
    model = the_one(name, source, known)
    planned = plan_removal(model, known)
    if not yes and not _agreed(planned, as_json=as_json):
        stderr.print("nothing was removed", style="dim")
        return 0
    # Before the files that tell whose they are go.
    packs = remove_packs(pack.key for pack in Shelf().of_model(known[model.source].folder(model.repo_id)))
    removed = remove(model, known)
    data = {**removed.to_data(), "packs": packs.to_data()}
    if as_json and packs.error:
        fail(packs.error, data)
    elif as_json:
        succeed(data)
    else:
        stdout.print(f"removed {removed.name}: {format_bytes(removed.freed_bytes)} freed", soft_wrap=True)
        tell_removed(packs)
        for path in removed.kept:
            stderr.print(f"kept, since another model links to it: {path}", soft_wrap=True)
    return 1 if packs.error else 0


def _agreed(planned: Removal, *, as_json: bool) -> bool:
    refusal = UsageError("removing a model needs a yes", hint="add --yes")
    if as_json:
        raise refusal
    question = f"Remove {planned.name} from {planned.source.label}'s cache, {format_bytes(planned.freed_bytes)}?"
    try:
        return click.confirm(question, err=True)
    except click.Abort as stop:
        if interrupt.seen():
            raise
        stderr.print()  # the error begins a line of its own
        raise refusal from stop
