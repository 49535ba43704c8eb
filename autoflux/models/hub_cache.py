"""Models that are already on this machine, where Hugging Face's and ModelScope's own programs keep them. No network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from autoflux.models.catalogue import CatalogueEntry


def find_cached(entry: CatalogueEntry) -> Path | None:
    """The folder of a model in the hubs' caches, None if no cache has its index."""
    return next((folder for folder in _folders(entry) if (folder / "model_index.json").is_file()), None)


def hugging_face_cache() -> Path:
    """Where huggingface_hub keeps repositories: its own variables in its own order."""
    if folder := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(folder).expanduser()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache")
    home = os.environ.get("HF_HOME") or str(cache / "huggingface")
    return Path(os.path.expandvars(home)).expanduser() / "hub"


def modelscope_cache() -> Path:
    """Where modelscope keeps repositories."""
    return Path(os.environ.get("MODELSCOPE_CACHE") or _home() / ".cache" / "modelscope" / "hub").expanduser()


def _folders(entry: CatalogueEntry) -> Iterator[Path]:
    yield from _snapshots(hugging_face_cache() / f"models--{entry.huggingface.replace('/', '--')}", entry.revision)
    # Dots became three underscores in folders of some versions of modelscope.
    for name in (entry.modelscope, entry.modelscope.replace(".", "___")):
        yield modelscope_cache() / "models" / name
        yield modelscope_cache() / name


def _snapshots(folder: Path, revision: str | None) -> Iterator[Path]:
    """The snapshot of a revision, by default the one that was current when the cache last asked."""
    wanted = revision
    if wanted is None:
        try:
            wanted = (folder / "refs" / "main").read_text().strip()
        except (OSError, UnicodeDecodeError):
            wanted = None
    if wanted:
        yield folder / "snapshots" / wanted
    if revision is None:
        yield from sorted((folder / "snapshots").glob("*"))


def _home() -> Path:
    return Path(os.path.expanduser("~"))  # noqa: PTH111 — `Path.home` raises for a user without one
