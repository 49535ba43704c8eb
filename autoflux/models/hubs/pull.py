"""Downloading a model: what is needed, verified, into the hub's own cache."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from autoflux.errors import DamagedDownload, HubUnavailable, ModelNotFound, OutputUnwritable
from autoflux.models import catalogue
from autoflux.models.hubs.cached import CachedModel, find_cached
from autoflux.models.hubs.checksums import fault
from autoflux.models.hubs.clients import Hub, offline, open_hub
from autoflux.models.hubs.selection import check_paths, needed_files
from autoflux.models.hubs.stores import Store, make_folder, stores
from autoflux.models.hubs.transfer import disk_full, fetch, flush_to_disk
from autoflux.models.hubs.transport import Patience, Wire
from autoflux.models.hubs.values import Listing, Record, Reference, RemoteFile
from autoflux.models.hubs.verify import named_files
from autoflux.units import format_bytes
from autoflux.values import Value

WORKERS = 4
"""Files at a time: one connection seldom fills a fast line, and hubs object to many."""

SPARE_BYTES = 64 << 20
"""What stays free on the disk: file systems need a little room for themselves."""


class Pulled(Value, frozen=True, kw_only=True):
    """A model that is complete on this machine."""

    listing: Listing
    path: str
    downloaded_bytes: int
    offline: bool = False
    """Whether the hub was not asked if there is something newer."""


class Watcher:
    """Told how a download goes on; this one keeps it to itself. `fetched` is called from several threads."""

    def listed(self, listing: Listing, missing: Sequence[RemoteFile], here_bytes: int) -> None:
        """What is to be downloaded is known, and how many bytes of it an earlier run left; nothing has begun."""

    def checking(self, file: RemoteFile) -> None:
        """A file that is here is read to compare its checksum."""

    def fetched(self, file: RemoteFile, count: int) -> None:
        """A file has gained that many bytes, or lost them."""

    def waiting(self, what: str) -> None:
        """Another process is at the same thing."""


def pull(
    reference: Reference,
    *,
    environment: Mapping[str, str] = os.environ,
    repair: bool = False,
    patience: Patience | None = None,
    watcher: Watcher | None = None,
) -> Pulled:
    """Make a model complete in the cache of its hub. What is there and right is not downloaded again.

    Args:
        reference: which; the first of its ids is taken.
        environment: endpoints, tokens, caches and `HF_HUB_OFFLINE`.
        repair: read what is there and download again what has changed.
        patience: how often to try again.
        watcher: told how it goes on.

    Raises:
        ModelNotFound, UnsupportedModel, UnsafeCheckpoint: nothing there that can be run.
        AccessDenied: a token or the acceptance of terms is missing.
        HubUnavailable: no answer, or offline and not complete.
        DiskFull: not enough room; found out before the download as far as possible.
        DamagedDownload: the hub sends what cannot be right.
        OutputUnwritable: the cache cannot be written to.
    """
    if offline(environment):
        return _found_offline(reference, environment)
    watcher = watcher or Watcher()
    with open_hub(reference.ids[0].source, environment, patience) as hub:
        listing = _needed(hub, reference, repair=repair)
        with locked(hub.store, hub.store.pull_lock(listing.repo_id), listing.repo_id, hub.wire, watcher):
            downloaded = _complete(hub, listing, watcher, repair=repair)
    return Pulled(
        listing=listing,
        path=str(hub.store.snapshot(listing.repo_id, listing.commit)),
        downloaded_bytes=downloaded,
    )


def _found_offline(reference: Reference, environment: Mapping[str, str]) -> Pulled:
    known = stores(environment)
    found = find_cached(reference, known)
    listing = _listed_offline(found, reference, known[found.source]) if found and found.complete else None
    if found is None or listing is None:
        raise HubUnavailable(
            f"{reference.name!r} is not complete on this machine, and HF_HUB_OFFLINE forbids the network",
            hint="unset HF_HUB_OFFLINE, or copy the hub's cache from a machine that has the model",
        )
    return Pulled(listing=listing, path=found.path, downloaded_bytes=0, offline=True)


def _listed_offline(found: CachedModel, reference: Reference, store: Store) -> Listing | None:
    """What the hub said of a model, or else what is there; None if that lacks the file that is asked for."""
    record = store.recorded(found.repo_id, found.commit)
    listing = record.listing if record else _listing_of(found, reference)
    try:
        if reference.file:
            needed_files(listing.files, (reference.file,))
    except ModelNotFound:
        return None
    return listing


def _listing_of(found: CachedModel, reference: Reference) -> Listing:
    """Of a model that another tool downloaded. What its licence is, only the hub says."""
    return Listing(
        source=found.source,
        repo_id=found.repo_id,
        revision=reference.revision or found.commit,
        commit=found.commit,
        licence=None,
        gated=False,
        files=named_files(Path(found.path)),
    )


def _needed(hub: Hub, reference: Reference, *, repair: bool) -> Listing:
    """What to download, of all that the hub lists."""
    listing = hub.list_files(reference.ids[0].repo_id, reference.revision)
    check_paths(listing.files)
    needed = _chosen(hub, listing, reference.file, repair=repair)
    for file in needed:
        if not (file.sha256 or file.git_sha1) and file.path.endswith((".safetensors", ".gguf")):
            raise DamagedDownload(
                f"{hub.wire.source.label} gives no checksum for {file.path!r}, so it cannot be verified",
                hint="take the model from the other hub with --source",
            )
    return listing.replace(files=needed)


def _chosen(hub: Hub, listing: Listing, pattern: str | None, *, repair: bool) -> tuple[RemoteFile, ...]:
    """The files asked for; to repair are those that were asked for before, also where that was a single one of many."""
    record = hub.store.recorded(listing.repo_id, listing.commit)
    paths = {file.path for file in record.listing.files} if record else set()
    before = tuple(file for file in listing.files if file.path in paths)
    if before and repair and not pattern:
        return before
    entry = catalogue.find(listing.repo_id)
    try:
        return needed_files(listing.files, (pattern,) if pattern else entry.files if entry else ())
    except ModelNotFound:
        if pattern or not before:
            raise
        return before


def _complete(hub: Hub, listing: Listing, watcher: Watcher, *, repair: bool) -> int:
    """Download what is missing; returns the bytes of the files that were."""
    store, before = hub.store, hub.store.recorded(listing.repo_id, listing.commit)
    missing = [f for f in listing.files if not _is_here(store, listing, f, before, watcher, repair=repair)]
    gathered = sum(_size(store.partial(listing, file)) for file in missing)
    watcher.listed(listing, missing, gathered)
    _check_room(store, sum(file.size_bytes for file in missing) - gathered)
    whole = _with_earlier(listing, before)
    verified = {file.path for file in whole.files} - {file.path for file in missing}
    store.record(Record(listing=whole, verified=tuple(sorted(verified))))
    for file in listing.files:
        if file not in missing:
            store.place(listing, file)
    try:
        _download(hub, listing, missing, watcher, verified)
    finally:
        store.record(Record(listing=whole, verified=tuple(sorted(verified))))
    store.finish(listing)
    return sum(file.size_bytes for file in missing)


def _is_here(
    store: Store, listing: Listing, file: RemoteFile, before: Record | None, watcher: Watcher, *, repair: bool
) -> bool:
    """Whether a file need not be downloaded.

    The name of a Hugging Face blob is its checksum. On ModelScope a branch moves, and a file that is not recorded as
    verified with the same checksum is read first.
    """
    path = store.content(listing, file)
    if not path.is_file():
        path = store.path(listing, file)
    if not path.is_file() or _size(path) != file.size_bytes:
        return False
    known = path.name == (file.sha256 or file.git_sha1) or (before is not None and before.vouches_for(file))
    if known and not repair:
        return True
    watcher.checking(file)
    return fault(path, file) is None


def _with_earlier(listing: Listing, before: Record | None) -> Listing:
    """Also what was downloaded of the same commit before, such as another single file of it."""
    paths = {file.path for file in listing.files}
    earlier = before.listing.files if before else ()
    return listing.replace(files=(*listing.files, *(file for file in earlier if file.path not in paths)))


def _check_room(store: Store, needed_bytes: int) -> None:
    folder = store.root
    while not folder.exists():
        folder = folder.parent
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > 0 and needed_bytes + SPARE_BYTES > free_bytes:
        raise disk_full(
            store.root, f"the download needs {format_bytes(needed_bytes)}, but {format_bytes(free_bytes)} are free"
        )


def _download(hub: Hub, listing: Listing, missing: Sequence[RemoteFile], watcher: Watcher, verified: set[str]) -> None:
    """Smallest first, and the first alone: if the hub refuses, it does so once and at once."""

    def bring(file: RemoteFile) -> None:
        _bring(hub, listing, file, watcher)
        verified.add(file.path)

    queue = sorted(missing, key=lambda file: file.size_bytes)
    for file in queue[:1]:
        bring(file)
    with ThreadPoolExecutor(WORKERS, thread_name_prefix="download") as pool:
        try:
            _raise_first([pool.submit(bring, file) for file in queue[1:]])
        except BaseException:
            hub.wire.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _raise_first(futures: Sequence[Future[None]]) -> None:
    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    for future in done:
        future.result()


def _bring(hub: Hub, listing: Listing, file: RemoteFile, watcher: Watcher) -> None:
    """One file from the hub to its final name, unless another process brings it while this one waits."""
    store = hub.store
    content = store.content(listing, file)
    make_folder(content.parent, inside=store.folder(listing.repo_id))
    was_here = content.exists()
    with locked(store, store.lock(listing, file), file.path, hub.wire, watcher):
        if was_here or fault(content, file) is not None:
            _fetch(hub, listing, file, watcher)
        else:
            watcher.fetched(file, file.size_bytes)
    store.place(listing, file)


def _fetch(hub: Hub, listing: Listing, file: RemoteFile, watcher: Watcher) -> None:
    content, partial = hub.store.content(listing, file), hub.store.partial(listing, file)
    fetch(
        hub.wire,
        hub.url(listing, file),
        file,
        partial,
        lambda response: hub.refuse(listing.repo_id, response),
        lambda count: watcher.fetched(file, count),
    )
    try:
        flush_to_disk(partial)
        partial.replace(content)
    except OSError as error:
        raise OutputUnwritable(f"cannot write {str(content)!r}: {error.strerror or error}") from error


@contextmanager
def locked(store: Store, path: Path, what: str, wire: Wire, watcher: Watcher) -> Iterator[None]:
    """Hold a lock that other processes respect; waits for it, and says so.

    Raises:
        Stopped: the download was called off.
        OutputUnwritable: the lock cannot be created.
    """
    make_folder(path.parent, inside=store.root)
    lock = FileLock(path, thread_local=False, mode=0o664)
    told = False
    while not lock.is_locked:
        try:
            lock.acquire(timeout=1.0)
        except Timeout:
            wire.check()
            if not told:
                watcher.waiting(what)
            told = True
        except OSError as error:
            raise OutputUnwritable(f"cannot lock {str(path)!r}: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
