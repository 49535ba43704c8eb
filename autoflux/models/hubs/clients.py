"""What both hubs can be asked, and what their refusals mean."""

from __future__ import annotations

import difflib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn
from urllib.parse import quote, urlencode

import httpx

from autoflux.errors import AccessDenied, DamagedDownload, HubUnavailable, ModelNotFound
from autoflux.models.hubs.names import known_names
from autoflux.models.hubs.stores import Store, stores
from autoflux.models.hubs.transport import Patience, Wire, connect, said
from autoflux.models.hubs.values import Licence, Listing, RemoteFile, Source

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Hub(ABC):
    """One hub: its answers become values, its refusals errors that say what to do."""

    def __init__(self, wire: Wire, store: Store) -> None:
        self.wire = wire
        self.store = store

    @abstractmethod
    def list_files(self, repo_id: str, revision: str | None) -> Listing:
        """All files of a model.

        Raises:
            ModelNotFound: no such model or revision, or a private one.
            AccessDenied: the hub wants a token.
            HubUnavailable: no answer that makes sense.
        """

    @abstractmethod
    def url(self, listing: Listing, file: RemoteFile) -> str:
        """Where a file can be downloaded."""

    @abstractmethod
    def page(self, repo_id: str) -> str:
        """The page of a model, for people."""

    @abstractmethod
    def refuse(self, repo_id: str, response: httpx.Response) -> None:
        """Raise what an answer other than content means."""

    def not_found(self, repo_id: str, response: httpx.Response) -> NoReturn:
        """Raises ModelNotFound, with the closest name that is known."""
        other = self.wire.source.other
        close = difflib.get_close_matches(repo_id, known_names(), n=1, cutoff=0.75)
        raise ModelNotFound(
            f"{self.wire.source.label} has no model {repo_id!r} that you may see ({_said(response)})",
            hint=f"did you mean {close[0]!r}?"
            if close and close[0] != repo_id
            else f"check the name at {self.page(repo_id)}, or look on {other.label} with --source {other}",
        )


class HuggingFace(Hub):
    """https://huggingface.co, or what `HF_ENDPOINT` says."""

    def list_files(self, repo_id: str, revision: str | None) -> Listing:
        wanted = revision or "main"
        path = f"/api/models/{repo_id}/revision/{quote(wanted, safe='')}?blobs=true"
        data = self.wire.get_json(path, lambda response: self.refuse(repo_id, response))
        commit = str(data.get("sha"))
        if not _COMMIT.fullmatch(commit):
            raise self.wire.unavailable("answered with no commit; is the endpoint right?")
        return Listing(
            source=Source.HUGGINGFACE,
            repo_id=repo_id,
            revision=wanted,
            commit=commit,
            licence=self._licence(repo_id, data.get("cardData")),
            gated=bool(data.get("gated")),
            files=tuple(_read_files(self.wire, data.get("siblings"), _huggingface_file)),
        )

    def url(self, listing: Listing, file: RemoteFile) -> str:
        return f"{self.wire.endpoint}/{listing.repo_id}/resolve/{listing.commit}/{quote(file.path)}"

    def page(self, repo_id: str) -> str:
        return f"{self.wire.endpoint}/{repo_id}"

    def refuse(self, repo_id: str, response: httpx.Response) -> None:
        if response.status_code in (200, 206):
            return
        code = response.headers.get("X-Error-Code", "")
        again = "log in with `hf auth login`, and run the command again"
        if code == "GatedRepo":
            raise AccessDenied(
                f"{repo_id!r} is gated: its owners want their terms accepted before it can be downloaded",
                hint=f"accept them at {self.page(repo_id)}, {again}",
            )
        if response.status_code == 403:
            raise AccessDenied(
                f"Hugging Face refuses {repo_id!r} ({_said(response)}): it may be gated, or closed to your account, "
                "token or network",
                hint=f"see {self.page(repo_id)}, accept its terms if it has any, {again}",
            )
        if code == "RevisionNotFound":
            raise ModelNotFound(f"{repo_id!r} has no such revision", hint=f"see {self.page(repo_id)}/tree/main")
        if response.status_code == 401 and "Authorization" in self.wire.headers and code != "RepoNotFound":
            raise AccessDenied("Hugging Face does not accept your token", hint="log in again with `hf auth login`")
        if response.status_code in (401, 404):
            self.not_found(repo_id, response)
        raise self.wire.answered(response.status_code)

    def _licence(self, repo_id: str, card: object) -> Licence | None:
        if not isinstance(card, dict):
            return None
        name = card.get("license_name") or card.get("license")
        link = str(card.get("license_link") or "")
        if not link.startswith(("https://", "http://")):
            link = f"{self.page(repo_id)}/blob/main/{quote(link)}" if link else self.page(repo_id)
        return Licence(name=str(name), url=link) if name else None


class ModelScope(Hub):
    """https://modelscope.cn, or what `MODELSCOPE_ENDPOINT` or `MODELSCOPE_DOMAIN` says."""

    def list_files(self, repo_id: str, revision: str | None) -> Listing:
        wanted = revision or "master"
        query = urlencode({"Revision": wanted, "Recursive": "True"})
        data = self._data(repo_id, f"/api/v1/models/{repo_id}/repo/files?{query}")
        about = self._data(repo_id, f"/api/v1/models/{repo_id}")
        licence = about.get("License")
        return Listing(
            source=Source.MODELSCOPE,
            repo_id=repo_id,
            revision=wanted,
            commit=wanted,
            licence=Licence(name=str(licence), url=self.page(repo_id)) if licence else None,
            gated=False,
            files=tuple(_read_files(self.wire, data.get("Files"), _modelscope_file)),
        )

    def url(self, listing: Listing, file: RemoteFile) -> str:
        query = urlencode({"Revision": listing.revision, "FilePath": file.path})
        return f"{self.wire.endpoint}/api/v1/models/{listing.repo_id}/repo?{query}"

    def page(self, repo_id: str) -> str:
        return f"{self.wire.endpoint}/models/{repo_id}"

    def refuse(self, repo_id: str, response: httpx.Response) -> None:
        if response.status_code in (200, 206):
            return
        if response.status_code in (401, 403):
            raise AccessDenied(
                f"ModelScope lets only some people download {repo_id!r}",
                hint=f"ask for it at {self.page(repo_id)}, and set MODELSCOPE_API_TOKEN to a token of your account",
            )
        if response.status_code in (400, 404):
            self.not_found(repo_id, response)
        raise self.wire.answered(response.status_code)

    def _data(self, repo_id: str, path: str) -> dict[str, Any]:
        answer = self.wire.get_json(path, lambda response: self.refuse(repo_id, response))
        data = answer.get("Data")
        if not isinstance(data, dict):
            raise self.wire.unavailable(f"answered: {answer.get('Message') or 'no data'}")
        return data


@contextmanager
def open_hub(
    source: Source, environment: Mapping[str, str] = os.environ, patience: Patience | None = None
) -> Iterator[Hub]:
    """A connection to a hub, with the endpoint, token and cache that the environment names.

    Raises:
        HubUnavailable: the endpoint is not an address.
    """
    endpoint = _endpoint(source, environment)
    with connect() as client:
        wire = Wire(client, source, endpoint, _headers(source, environment), patience or Patience())
        kind = HuggingFace if source == Source.HUGGINGFACE else ModelScope
        yield kind(wire, stores(environment)[source])


def offline(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether `HF_HUB_OFFLINE` forbids the network; it counts for both hubs."""
    return environment.get("HF_HUB_OFFLINE", "").strip().upper() in ("1", "ON", "YES", "TRUE")


def _said(response: httpx.Response) -> str:
    """The hub's own words about a refusal, else its status."""
    return response.headers.get("X-Error-Message") or f"it {said(response.status_code)}"


def _endpoint(source: Source, environment: Mapping[str, str]) -> str:
    if source == Source.HUGGINGFACE:
        endpoint = environment.get("HF_ENDPOINT") or "https://huggingface.co"
    else:
        given = environment.get("MODELSCOPE_ENDPOINT") or environment.get("MODELSCOPE_DOMAIN")
        endpoint = given or "https://modelscope.cn"
        endpoint = endpoint if "://" in endpoint else f"https://{endpoint}"
    if not endpoint.startswith(("https://", "http://")):
        raise HubUnavailable(f"{endpoint!r} is not the address of {source.label}", hint="it begins with https://")
    return endpoint.rstrip("/")


def _headers(source: Source, environment: Mapping[str, str]) -> dict[str, str]:
    if source == Source.HUGGINGFACE:
        from huggingface_hub import get_token  # noqa: PLC0415 — 0.1 s; knows all places of a token

        token = get_token()
        return {"Authorization": f"Bearer {token}"} if token else {}
    token = environment.get("MODELSCOPE_API_TOKEN")
    return {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"} if token else {}


def _read_files(wire: Wire, entries: object, read: Any) -> Iterable[RemoteFile]:
    if not isinstance(entries, list):
        raise wire.unavailable("answered with no list of files; is the endpoint right?")
    for entry in entries:
        try:
            if file := read(entry):
                yield file
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedDownload(f"{wire.source.label}'s list of files cannot be read: {entry!r}") from error


def _huggingface_file(entry: dict[str, Any]) -> RemoteFile:
    lfs = entry.get("lfs") or {}
    sha256 = lfs.get("sha256")
    return RemoteFile(
        path=str(entry["rfilename"]),
        size_bytes=int(lfs["size"] if sha256 else entry["size"]),
        sha256=_hexadecimal(_SHA256, sha256),
        git_sha1=None if sha256 else _hexadecimal(_SHA1, entry["blobId"]),
    )


def _modelscope_file(entry: dict[str, Any]) -> RemoteFile | None:
    if entry.get("Type") == "tree":
        return None
    sha256 = _hexadecimal(_SHA256, entry.get("Sha256") or None)
    return RemoteFile(path=str(entry["Path"]), size_bytes=int(entry["Size"]), sha256=sha256)


def _hexadecimal(form: re.Pattern[str], value: object) -> str | None:
    """A checksum, which also names a file in the cache and so must be nothing else. Raises ValueError."""
    if value is None:
        return None
    text = str(value).lower()
    if not form.fullmatch(text):
        raise ValueError(text)
    return text
