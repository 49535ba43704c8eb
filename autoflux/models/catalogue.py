"""FLUX.1's models by name: where they are published, under what licence, and what they are made of.

The counts come from the architecture, so that a plan can be made before anything is downloaded.
"""

from __future__ import annotations

import re
from math import prod
from typing import Any

from autoflux.models.checkpoints import Part
from autoflux.models.components import architecture, make_component
from autoflux.models.configs import CLASSES, FLUX_DEV, SCHEDULERS
from autoflux.models.families import DEFAULTS
from autoflux.models.shapes import weights_of
from autoflux.models.values import Family, Layout, Model
from autoflux.values import Value

HUGGING_FACE, MODELSCOPE = "huggingface", "modelscope"

FOLDER_FILES = (
    "model_index.json",
    "scheduler/*.json",
    "text_encoder/*.json",
    "text_encoder/*.safetensors",
    "text_encoder_2/*.json",
    "text_encoder_2/*.safetensors",
    "tokenizer/*",
    "tokenizer_2/*",
    "transformer/*.json",
    "transformer/*.safetensors",
    "vae/*.json",
    "vae/*.safetensors",
)
"""What is needed of a repository; the single file beside it holds the same transformer again."""

_DEV_LICENCE = "FLUX.1 [dev] Non-Commercial License"
_PUBLISHER = "black-forest-labs"


class Entry(Value, frozen=True, kw_only=True):
    """A published model. `hubs` gives its id by hub, `files` the patterns of what is needed of it.

    `gated`: whether Hugging Face gives the files only to those who have signed in and accepted the licence.
    `revision`: the one to take, None for the newest.
    """

    name: str
    aliases: tuple[str, ...] = ()
    family: Family
    description: str
    hubs: dict[str, str]
    revision: str | None = None
    files: tuple[str, ...] = FOLDER_FILES
    licence: str
    licence_url: str
    gated: bool


def _entry(name: str, family: Family, repository: str, description: str, aliases: tuple[str, ...]) -> Entry:
    return Entry(
        name=name,
        aliases=aliases,
        family=family,
        description=description,
        hubs={HUGGING_FACE: f"{_PUBLISHER}/{repository}", MODELSCOPE: f"{_PUBLISHER}/{repository}"},
        licence="Apache-2.0" if family == Family.SCHNELL else _DEV_LICENCE,
        licence_url=f"https://huggingface.co/{_PUBLISHER}/{repository}",
        gated=True,
    )


_NAMES = (
    ("flux.1-dev", Family.DEV, "FLUX.1-dev", "from text, in 28 to 50 steps", ("flux-dev", "flux.1")),
    ("flux.1-schnell", Family.SCHNELL, "FLUX.1-schnell", "from text, in 1 to 4 steps", ("flux-schnell",)),
    ("flux.1-krea-dev", Family.KREA, "FLUX.1-Krea-dev", "from text, with a natural look", ("flux-krea", "flux.1-krea")),
    ("flux.1-kontext-dev", Family.KONTEXT, "FLUX.1-Kontext-dev", "edits pictures", ("flux-kontext", "flux.1-kontext")),
    ("flux.1-fill-dev", Family.FILL, "FLUX.1-Fill-dev", "fills in parts of pictures", ("flux-fill", "flux.1-fill")),
)
ENTRIES = tuple(_entry(*fields) for fields in _NAMES)
"""The models of Black Forest Labs that share FLUX.1's architecture. Hugging Face asks for the licence of all of them
to be accepted, of schnell since July 2025."""


def names() -> list[str]:
    """The names of all entries, without the aliases."""
    return [entry.name for entry in ENTRIES]


def find(name: str) -> Entry | None:
    """The entry of that name, alias or hub id, in any spelling of case and separators; None if there is none."""
    wanted = _plain(name)
    for entry in ENTRIES:
        if wanted in map(_plain, (entry.name, *entry.aliases, *entry.hubs.values())):
            return entry
    return None


def model(entry: Entry) -> Model:
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


def _plain(name: str) -> str:
    return re.sub(r"[\s._-]+", "-", name.strip().lower())
