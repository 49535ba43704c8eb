"""Models known by name: which FLUX.1 they are, where the hubs keep them, and under which terms."""

from __future__ import annotations

from autoflux.models.values import Family
from autoflux.values import Value


class CatalogueEntry(Value, frozen=True, kw_only=True):
    """A model that people know by name.

    `huggingface` and `modelscope` are ids (`owner/name`). `files` are patterns of the files needed; none means those
    of the diffusers layout. `gated` says that Hugging Face asks for its terms to be accepted first. `revision` is the
    one to take, None for the newest.
    """

    name: str
    aliases: tuple[str, ...]
    family: Family
    description: str
    huggingface: str
    modelscope: str
    licence: str
    gated: bool
    revision: str | None = None
    files: tuple[str, ...] = ()


_DEV_LICENCE = "flux-1-dev-non-commercial-license"

CATALOGUE = (
    CatalogueEntry(
        name="flux.1-dev",
        aliases=("flux-dev", "flux1-dev"),
        family=Family.DEV,
        description="draws from text, in 28 to 50 steps",
        huggingface="black-forest-labs/FLUX.1-dev",
        modelscope="AI-ModelScope/FLUX.1-dev",
        licence=_DEV_LICENCE,
        gated=True,
    ),
    CatalogueEntry(
        name="flux.1-schnell",
        aliases=("flux-schnell", "flux1-schnell"),
        family=Family.SCHNELL,
        description="draws from text, in 1 to 4 steps",
        huggingface="black-forest-labs/FLUX.1-schnell",
        modelscope="AI-ModelScope/FLUX.1-schnell",
        licence="apache-2.0",
        gated=True,  # since July 2025
    ),
    CatalogueEntry(
        name="flux.1-krea-dev",
        aliases=("flux-krea", "flux.1-krea", "flux1-krea-dev"),
        family=Family.KREA,
        description="draws from text, with a natural look",
        huggingface="black-forest-labs/FLUX.1-Krea-dev",
        modelscope="black-forest-labs/FLUX.1-Krea-dev",
        licence=_DEV_LICENCE,
        gated=True,
    ),
    CatalogueEntry(
        name="flux.1-kontext-dev",
        aliases=("flux-kontext", "flux.1-kontext", "flux1-kontext-dev"),
        family=Family.KONTEXT,
        description="changes a picture as it is told",
        huggingface="black-forest-labs/FLUX.1-Kontext-dev",
        modelscope="black-forest-labs/FLUX.1-Kontext-dev",
        licence=_DEV_LICENCE,
        gated=True,
    ),
    CatalogueEntry(
        name="flux.1-fill-dev",
        aliases=("flux-fill", "flux.1-fill", "flux1-fill-dev"),
        family=Family.FILL,
        description="fills in a part of a picture",
        huggingface="black-forest-labs/FLUX.1-Fill-dev",
        modelscope="AI-ModelScope/FLUX.1-Fill-dev",
        licence=_DEV_LICENCE,
        gated=True,
    ),
)


def find(name: str) -> CatalogueEntry | None:
    """The entry with that name, alias or hub id; upper and lower case are the same."""
    wanted = name.lower()
    for entry in CATALOGUE:
        if wanted in (entry.name, *entry.aliases, entry.huggingface.lower(), entry.modelscope.lower()):
            return entry
    return None
