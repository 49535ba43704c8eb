"""Which packs go when those of a model are to go: not those that another packed model is loaded from as well."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from autoflux.models.packs import Pack


class PackedModel(NamedTuple):
    """A model of which own files are packed, and not only what its base has."""

    name: str
    path: Path
    own: frozenset[str]
    """Components that come from its own files."""
    bases: frozenset[Path]
    """Of models that had the others."""

    def uses(self, pack: Pack) -> bool:
        """Whether it is loaded from the pack, in the formats that the pack has."""
        return pack.is_from(self.path) or (pack.component not in self.own and any(map(pack.is_from, self.bases)))


def packs_of(places: Collection[Path], packs: Sequence[Pack]) -> list[Pack]:
    """Those that are listed as of the models at these places, or are made from their files."""
    return [pack for pack in packs if Path(pack.model_path) in places or any(map(pack.is_from, places))]


def packed_models(packs: Sequence[Pack]) -> list[PackedModel]:
    """All that packs are listed as of, and whose own files are packed."""
    models = []
    for path, name in {pack.model_path: pack.model for pack in packs}.items():
        own = frozenset(pack.component for pack in packs if pack.is_from(Path(path)))
        bases = frozenset(Path(pack.base_path) for pack in packs if pack.model_path == path and pack.base_path)
        if own:
            models.append(PackedModel(name, Path(path), own, bases))
    return models
