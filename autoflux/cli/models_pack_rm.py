"""Removing packs, for `autoflux models pack --rm` and `autoflux models rm`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from autoflux.api import find_model
from autoflux.cli.output import complain, stderr, stdout, warn
from autoflux.errors import AutofluxError, ErrorReport, OutputUnwritable
from autoflux.files import is_there
from autoflux.models.pack_removal import packed_models, packs_of
from autoflux.models.pack_shelf import Shelf
from autoflux.models.packs import Pack
from autoflux.models.values import Precision
from autoflux.paths import expanded
from autoflux.planning.terms import TRANSFORMER
from autoflux.plugin_manager import Plugins
from autoflux.units import counted, format_bytes
from autoflux.values import Value


class RemovedPacks(Value, frozen=True, kw_only=True):
    """Keys of packs that are gone, and of those that stay."""

    removed: tuple[str, ...] = ()
    remains: tuple[str, ...] = ()
    """Those of them that were no packs any more, or never: damaged, or left by processes that were ended."""
    freed_bytes: int = 0
    in_use: tuple[str, ...] = ()
    """Somebody reads or makes them now."""
    shared: Mapping[str, tuple[str, ...]] = {}
    """With the names of the other models that are loaded from them."""
    failed: Mapping[str, ErrorReport] = {}
    """Why they cannot be deleted."""

    @property
    def error(self) -> ErrorReport | None:
        """Why the first that cannot be deleted cannot; None if all can."""
        return next(iter(self.failed.values()), None)


def remove_packs_of(
    name: str, plugins: Plugins, precision: Precision | None = None, arithmetic: Precision | None = None
) -> RemovedPacks:
    """Delete the packs of a model that no other one uses, and what was left by processes that were ended.

    The model is named as everywhere, or as `autoflux models list` names it, also when it is not there any more. With
    `precision` only those of its transformer in that, with `arithmetic` only those with everything else in that.

    Raises:
        AutofluxError: there is no such model, and nothing is listed under that name.
    """
    shelf = Shelf()
    packs = shelf.packs()
    places = _places(name, plugins, packs)
    others = [model for model in packed_models(packs) if model.path not in places]

    def meant(among: Sequence[Pack]) -> list[Pack]:
        return [pack for pack in packs_of(places, among) if _is_of(pack, precision, arithmetic)]

    users = {p.key: tuple(sorted(m.name for m in others if m.uses(p))) for p in meant(packs)}
    own = [key for key, names in users.items() if not names]
    left = [left for left in shelf.remains() if left.told is None or meant([left.told])]
    removed = remove_packs(own, [remains.key for remains in left if remains.key not in own])
    return removed.replace(shared={key: names for key, names in users.items() if names})


def remove_packs(keys: Iterable[str], remains: Collection[str] = ()) -> RemovedPacks:
    """Delete these packs, but for those in use, and what remains of others, unless it is a pack by now.

    What others delete meanwhile is told by them.
    """
    shelf = Shelf()
    removed: dict[str, int] = {}
    kept: list[str] = []
    failed: dict[str, ErrorReport] = {}
    for key in (*keys, *remains):
        nbytes = shelf.bytes_of(key)
        try:
            if shelf.remove(key, only_remains=key in remains):
                removed[key] = nbytes
            elif key not in remains:
                kept.append(key)
        except OutputUnwritable as error:
            failed[key] = error.report()
    return RemovedPacks(
        removed=tuple(removed),
        remains=tuple(key for key in remains if key in removed),
        freed_bytes=sum(removed.values()),
        in_use=tuple(filter(shelf.holds, kept)),
        failed=failed,
    )


def tell_removed(packs: RemovedPacks) -> None:
    """For people; nothing if there were none."""
    if packs.removed:
        whole = len(packs.removed) - len(packs.remains)
        what = [counted(whole, "pack")] if whole else []
        if packs.remains:
            what.append(f"what remained of {counted(len(packs.remains), 'pack')}")
        stdout.print(f"removed {' and '.join(what)}: {format_bytes(packs.freed_bytes)} freed")
    if packs.in_use:
        kept = counted(len(packs.in_use), "pack")
        warn(f"in use, and kept: {kept}; `autoflux models pack NAME --rm` removes them later")
    for names in dict.fromkeys(packs.shared.values()):
        count = sum(shared == names for shared in packs.shared.values())
        told = ", ".join(map(repr, names))
        stderr.print(f"kept, since they are also of {told}: {counted(count, 'pack')}", soft_wrap=True)
    if packs.error:
        complain(packs.error)


def _is_of(pack: Pack, precision: Precision | None, arithmetic: Precision | None) -> bool:
    """Whether a pack is of these formats. A precision says nothing of other components than the transformer, whose
    packs those of all its precisions share."""
    if arithmetic and pack.arithmetic != arithmetic:
        return False
    return not precision or (pack.component == TRANSFORMER and pack.storage == precision)


def _places(name: str, plugins: Plugins, packs: Iterable[Pack]) -> set[Path]:
    """Where the models of that name are, or were when they were packed.

    A path that is there, or that packs are listed as of, is not also the name of models elsewhere: those are listed by
    the names of their folders. The same goes for the path of a registered model.
    """
    registered = (Path(entry.path) for entry in plugins.models if entry.name == name)
    path = next(registered, expanded(name)).absolute()
    listed = {Path(pack.model_path): pack.model for pack in packs}
    places = {path, path.resolve()} & listed.keys()
    if not places and not is_there(path):
        places = {place for place, model in listed.items() if model == name}
    try:
        places.add(Path(find_model(name, plugins).path))
    except AutofluxError:
        # A file whose base is not given, or what is only listed.
        if not places and not (is_there(path) and path.is_file()):
            raise
    return places
