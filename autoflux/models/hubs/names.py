"""Ids as people write them: catalogue names, `owner/name`, addresses of pages and files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

from autoflux.errors import ContradictoryWishes, UsageError
from autoflux.models import catalogue
from autoflux.models.catalogue import CatalogueEntry
from autoflux.models.hubs.values import HubId, Reference, Source

_HOSTS = {
    "huggingface.co": Source.HUGGINGFACE,
    "www.huggingface.co": Source.HUGGINGFACE,
    "hf.co": Source.HUGGINGFACE,
    "modelscope.cn": Source.MODELSCOPE,
    "www.modelscope.cn": Source.MODELSCOPE,
    "modelscope.ai": Source.MODELSCOPE,
    "www.modelscope.ai": Source.MODELSCOPE,
}
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REPO_ID = re.compile(rf"{_PART}/{_PART}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
_FILE_PAGES = ("blob", "resolve", "raw")


def default_source(environment: Mapping[str, str] = os.environ) -> Source:
    """What `AUTOFLUX_SOURCE` says, else Hugging Face.

    Raises:
        UsageError: it names no hub.
    """
    name = environment.get("AUTOFLUX_SOURCE", "").strip().lower() or Source.HUGGINGFACE.value
    if name not in set(Source):
        raise UsageError(
            f"AUTOFLUX_SOURCE is {name!r}, which is no source of models; there are {', '.join(Source)}",
            hint=f"set it to {Source.HUGGINGFACE.value!r} or {Source.MODELSCOPE.value!r}",
        )
    return Source(name)


def parse_reference(text: str, source: Source | None = None, *, usual: Source = Source.HUGGINGFACE) -> Reference | None:
    """Read a name; None when it is neither in the catalogue nor written like an id or an address.

    Args:
        text: what was written.
        source: the hub that was asked for; only ids on it are given.
        usual: the hub to try first when nothing says which.

    Raises:
        ContradictoryWishes: the address is on another hub than the one asked for.
        UsageError: an address without a model in it.
    """
    text = text.strip()
    if found := _parse_address(text):
        return _narrow(found, source)
    if entry := catalogue.find(text):
        return _of_entry(entry, text, source, usual)
    if not is_repo_id(text):
        return None
    first = source or usual
    others = () if source else tuple(HubId(source=s, repo_id=text) for s in Source if s != first)
    return Reference(name=text, ids=(HubId(source=first, repo_id=text), *others))


def is_repo_id(text: str) -> bool:
    """Whether it is written `owner/name` in characters that hubs allow, and so is safe as the name of a folder."""
    return bool(_REPO_ID.fullmatch(text)) and ".." not in text and "--" not in text


def is_revision(text: str) -> bool:
    """Whether it can be the name of a branch, a tag or a commit."""
    return bool(_REVISION.fullmatch(text)) and ".." not in text and "//" not in text and not text.endswith("/")


def known_names() -> list[str]:
    """What `did you mean` chooses from."""
    return list(dict.fromkeys(name for e in catalogue.CATALOGUE for name in (e.name, e.huggingface, e.modelscope)))


def catalogue_name(hub_id: HubId) -> str | None:
    """The short name of a model in the catalogue."""
    entry = catalogue.find(hub_id.repo_id)
    return entry.name if entry and hub_id.repo_id.lower() == _id_on(entry, hub_id.source).lower() else None


def _of_entry(entry: CatalogueEntry, text: str, source: Source | None, usual: Source) -> Reference:
    elsewhere = text.lower() == entry.modelscope.lower() != entry.huggingface.lower()
    first = source or (Source.MODELSCOPE if elsewhere else usual)
    order = (first,) if source else (first, *(s for s in Source if s != first))
    return Reference(name=entry.name, ids=tuple(HubId(source=s, repo_id=_id_on(entry, s)) for s in order))


def _id_on(entry: CatalogueEntry, source: Source) -> str:
    return entry.huggingface if source == Source.HUGGINGFACE else entry.modelscope


def _narrow(found: Reference, source: Source | None) -> Reference:
    (hub_id,) = found.ids
    if source is None or source == hub_id.source:
        return found
    entry = catalogue.find(hub_id.repo_id)
    if entry is None or found.revision or found.file:
        raise ContradictoryWishes(
            f"{found.name!r} is on {hub_id.source.label}, but --source asks for {source.label}",
            hint="leave --source away",
        )
    return found.replace(ids=(HubId(source=source, repo_id=_id_on(entry, source)),))


def _parse_address(text: str) -> Reference | None:
    try:
        parts = urlsplit(text if "://" in text else f"https://{text}")
    except ValueError:
        return None
    source = _HOSTS.get((parts.hostname or "").lower())
    if source is None or parts.scheme not in ("http", "https"):
        return None
    steps = [unquote(step) for step in parts.path.split("/") if step]
    if steps[:1] == ["models"]:
        steps = steps[1:]
    repo_id = "/".join(steps[:2])
    if not is_repo_id(repo_id):
        raise UsageError(f"{text!r} is not the address of a model", hint="copy that of the model's page")
    revision, file = _page(steps[2:])
    return Reference(name=text, ids=(HubId(source=source, repo_id=repo_id),), revision=revision, file=file)


def _page(steps: list[str]) -> tuple[str | None, str | None]:
    """Revision and file that the rest of an address leads to (`tree/main`, `blob/main/ae.safetensors`)."""
    if len(steps) >= 2 and steps[0] in ("tree", *_FILE_PAGES) and is_revision(steps[1]):
        file = "/".join(steps[2:]) if steps[0] in _FILE_PAGES else None
        return steps[1], file or None
    return None, None
