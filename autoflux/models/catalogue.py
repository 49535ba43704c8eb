"""Models known by name: where the hubs keep them, and under which terms."""

from __future__ import annotations

from autoflux.values import Value


class CatalogueEntry(Value, frozen=True, kw_only=True):
    """A model that people know by name.

    `huggingface` and `modelscope` are ids (`owner/name`). `files` are patterns of the files needed; none means those
    of the diffusers layout. `gated` says that Hugging Face asks for its terms to be accepted first.
    """

    name: str
    aliases: tuple[str, ...]
    huggingface: str
    modelscope: str
    licence: str
    gated: bool
    files: tuple[str, ...] = ()


_DEV_LICENCE = "flux-1-dev-non-commercial-license"

CATALOGUE = (
    CatalogueEntry(
        name="flux.1-dev",
        aliases=("flux-dev", "flux1-dev"),
        huggingface="black-forest-labs/FLUX.1-dev",
        modelscope="AI-ModelScope/FLUX.1-dev",
        licence=_DEV_LICENCE,
        gated=True,
    ),
    CatalogueEntry(
        name="flux.1-schnell",
        aliases=("flux-schnell", "flux1-schnell"),
        huggingface="black-forest-labs/FLUX.1-schnell",
        modelscope="AI-ModelScope/FLUX.1-schnell",
        licence="apache-2.0",
        gated=True,
    ),
    CatalogueEntry(
        name="flux.1-krea-dev",
        aliases=("flux-krea", "flux.1-krea", "flux1-krea-dev"),
        huggingface="black-forest-labs/FLUX.1-Krea-dev",
        modelscope="black-forest-labs/FLUX.1-Krea-dev",
        licence=_DEV_LICENCE,
        gated=True,
    ),
    CatalogueEntry(
        name="flux.1-kontext-dev",
        aliases=("flux-kontext", "flux.1-kontext", "flux1-kontext-dev"),
        huggingface="black-forest-labs/FLUX.1-Kontext-dev",
        modelscope="black-forest-labs/FLUX.1-Kontext-dev",
        licence=_DEV_LICENCE,
        gated=True,
    ),
    CatalogueEntry(
        name="flux.1-fill-dev",
        aliases=("flux-fill", "flux.1-fill", "flux1-fill-dev"),
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
