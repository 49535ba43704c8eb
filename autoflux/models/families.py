"""Which FLUX.1 a transformer is, as far as shapes and what is written beside the weights tell.

schnell has no guidance and Fill takes 384 channels; dev, Krea and Kontext have the same shapes, so for them only words
count: the class in `model_index.json`, metadata in the header, or the name of the repository on a hub.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from autoflux.errors import UnsupportedModel
from autoflux.models.values import Defaults, Family

PIPELINES = {"FluxPipeline": None, "FluxKontextPipeline": Family.KONTEXT, "FluxFillPipeline": Family.FILL}
"""diffusers' classes in `model_index.json` and the family each one says."""

DEFAULTS = {
    Family.DEV: Defaults(),
    Family.DEV_LIKE: Defaults(),
    Family.SCHNELL: Defaults(steps=4, guidance=0.0, text_tokens=256),
    Family.KREA: Defaults(guidance=4.5),
    Family.KONTEXT: Defaults(guidance=2.5),
    Family.FILL: Defaults(steps=50, guidance=30.0),
}
"""What suits each, from the examples on its model card; schnell was trained on 256 text tokens."""

_CHANNELS = {64: None, 384: Family.FILL}
_WORDS = (
    (Family.KREA, re.compile(r"flux[._-]*1[._-]krea|flux-krea")),
    (Family.KONTEXT, re.compile(r"flux[._-]*1[._-]kontext|flux-kontext")),
    (Family.DEV, re.compile(r"flux[._-]*1[._-]dev\b|flux-dev\b")),
)
_METADATA = ("modelspec.architecture", "modelspec.title", "general.name", "general.basename")
_HUB_FOLDER = re.compile(
    r"models--black-forest-labs--(?P<name>[^/\\]+)|(black-forest-labs|AI-ModelScope)[/\\](?P<plain>FLUX[^/\\]+)"
)
"""How the caches of Hugging Face and ModelScope name the folder of a repository."""


def tell_family(config: Mapping[str, Any], *, class_name: str | None = None, words: Iterable[str] = ()) -> Family:
    """The family of a transformer of this configuration; `words` are texts that may name it.

    Raises:
        UnsupportedModel: it takes inputs that no known family takes.
    """
    channels = int(config["in_channels"])
    if channels not in _CHANNELS:
        raise UnsupportedModel(
            f"the transformer takes {channels} channels; FLUX.1's take 64, and Fill's 384",
            hint="Depth and Canny, which take 128, are not supported",
        )
    if family := _CHANNELS[channels]:
        return family
    if not config["guidance_embeds"]:
        return Family.SCHNELL
    if class_name and (family := PIPELINES.get(class_name)):
        return family
    for text in words:
        for family, word in _WORDS:
            if word.search(text.lower()):
                return family
    return Family.DEV_LIKE


def words_beside(metadata: Mapping[str, str], path: str) -> list[str]:
    """What names the family in a header, and the hub's repository if the file lies in a hub's cache."""
    repository = _HUB_FOLDER.search(path)
    named = [metadata[key] for key in _METADATA if key in metadata]
    return named + ([repository["name"] or repository["plain"]] if repository else [])
