"""Models of the catalogue that are not on this machine: what they are made of, from their architecture.

The counts are derived and not stored, so that a plan can be made before anything is downloaded.
"""

from __future__ import annotations

from math import prod
from typing import Any

from autoflux.models.catalogue import CatalogueEntry
from autoflux.models.checkpoints import Part
from autoflux.models.components import architecture, make_component
from autoflux.models.configs import CLASSES, FLUX_DEV, SCHEDULERS
from autoflux.models.families import DEFAULTS
from autoflux.models.shapes import weights_of
from autoflux.models.values import Family, Layout, Model


def absent_model(entry: CatalogueEntry) -> Model:
    """The model of an entry, not on this machine: what it is made of, from its architecture."""
    configs: dict[str, dict[str, Any]] = {**FLUX_DEV, "transformer": FLUX_DEV["transformer"] | _changes(entry.family)}
    components = []
    for name in CLASSES:
        weights = weights_of(name, configs[name]).items()
        parts = {weight: Part("", ((0, 2 * prod(shape)),), "BF16", shape) for weight, shape in weights}
        components.append(make_component(name, configs[name], parts, origin=entry.name))
    return Model(
        name=entry.name,
        path="",
        revision=f"catalogue:{entry.name}",
        layout=Layout.ABSENT,
        family=entry.family,
        scheduler=SCHEDULERS[entry.family != Family.SCHNELL],
        architecture=architecture(components, entry.name),
        components=tuple(components),
        defaults=DEFAULTS[entry.family],
    )


def _changes(family: Family) -> dict[str, Any]:
    """In what the transformer's configuration differs from dev's."""
    if family == Family.FILL:
        return {"in_channels": 384, "out_channels": 64}
    return {"guidance_embeds": family != Family.SCHNELL}
