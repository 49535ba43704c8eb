"""`autoflux models pull`: download a model, or what is missing of it."""

from __future__ import annotations

from collections.abc import Sequence

import click
from rich.progress import Progress, TaskID

from autoflux.cli.models_options import byte_progress, refer, source_option
from autoflux.cli.output import json_option, stderr, stdout, succeed
from autoflux.errors import ContradictoryWishes, UsageError
from autoflux.models.hubs.names import catalogue_name, is_revision
from autoflux.models.hubs.pull import Pulled, Watcher, pull
from autoflux.models.hubs.values import HubId, Listing, Reference, RemoteFile, Source
from autoflux.units import counted, format_bytes

LABEL_LENGTH = 40
"""Characters."""


@click.command("pull")
@click.argument("name", metavar="NAME|ID")
@source_option
@click.option("--revision", help="A branch, tag or commit instead of the newest state.")
@click.option("--file", metavar="PATTERN", help="Only files that match, such as 'flux1-dev.safetensors' or '*Q8_0*'.")
@click.option("--repair", is_flag=True, help="Read what is here and download again what has changed.")
@json_option
def command(
    *, name: str, source: Source | None, revision: str | None, file: str | None, repair: bool, as_json: bool
) -> None:
    """Download a model, or go on with a download that was interrupted.

    NAME is flux.1-dev and the like, OWNER/NAME, or the address of a model's page. Files go to the cache of the hub's
    own tools, are verified by checksum, and appear only when they are whole.
    """
    reference = _with_wishes(refer(name, source), revision, file)
    with byte_progress() as progress:
        pulled = pull(reference, repair=repair, watcher=_Bars(progress))
    _tell(pulled, as_json=as_json)


def _with_wishes(reference: Reference, revision: str | None, file: str | None) -> Reference:
    for option, wished, said in (("--revision", revision, reference.revision), ("--file", file, reference.file)):
        if wished and said and wished != said:
            raise ContradictoryWishes(f"the address says {said!r}, but {option} {wished!r}", hint="give one of them")
    if revision and not is_revision(revision):
        raise UsageError(f"{revision!r} cannot be the name of a revision", hint="a branch, tag or commit, such as main")
    return reference.replace(revision=revision or reference.revision, file=file or reference.file)


class _Bars(Watcher):
    """Shows a bar for each file on its way, and one for all together."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._whole: TaskID | None = None
        self._tasks: dict[str, TaskID] = {}

    def listed(self, listing: Listing, missing: Sequence[RemoteFile], here_bytes: int) -> None:
        to_come = sum(file.size_bytes for file in missing)
        _say(f"{listing.repo_id} from {listing.source.label}, {listing.revision} ({listing.commit[:12]})")
        _say(_licence_line(listing))
        files = counted(len(listing.files), "file")
        _say(f"{files}, {format_bytes(listing.size_bytes)}; {_amount(missing, here_bytes)}")
        if missing:
            self._whole = self._progress.add_task("all files", total=to_come)
            for file in sorted(missing, key=lambda file: file.size_bytes):
                task = self._progress.add_task(_label(file.path), total=file.size_bytes, visible=False)
                self._tasks[file.path] = task

    def checking(self, file: RemoteFile) -> None:
        _say(f"reading {file.path} ({format_bytes(file.size_bytes)})")

    def fetched(self, file: RemoteFile, count: int) -> None:
        task = self._tasks[file.path]
        self._progress.update(task, advance=count, visible=True)
        if self._whole is not None:
            self._progress.update(self._whole, advance=count)
        if self._progress.tasks[task].finished:
            self._progress.update(task, visible=False)

    def waiting(self, what: str) -> None:
        _say(f"waiting for another process that is downloading {what}")


def _label(path: str) -> str:
    """A path short enough to stand before a bar; the end of a shard's name tells it from the others."""
    folder, _, name = path.rpartition("/")
    return path if len(path) <= LABEL_LENGTH else f"{folder[:18]}/…{name[-20:]}"


def _licence_line(listing: Listing) -> str:
    if listing.licence is None:
        return "licence: the hub states none"
    gated = "; its terms have to be accepted there first" if listing.gated else ""
    return f"licence: {listing.licence.name}, {listing.licence.url}{gated}"


def _amount(missing: Sequence[RemoteFile], here_bytes: int) -> str:
    if not missing:
        return "all here"
    to_come = sum(file.size_bytes for file in missing) - here_bytes
    return f"to download: {format_bytes(to_come)} in {counted(len(missing), 'file')}"


def _say(text: str) -> None:
    stderr.print(text, style="dim", soft_wrap=True)


def _tell(pulled: Pulled, *, as_json: bool) -> None:
    listing = pulled.listing
    name = catalogue_name(HubId(source=listing.source, repo_id=listing.repo_id)) or listing.repo_id
    if as_json:
        succeed({"name": name, **pulled.to_data()})
        return
    stdout.print(pulled.path, soft_wrap=True)
    if pulled.offline:
        _say("offline: the hub was not asked whether there is something newer")
    _say(f"complete; use it with --model {name}")
