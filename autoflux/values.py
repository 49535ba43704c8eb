"""The base of every value that passes between stages: frozen, strict about its keys, and the same after JSON."""

from __future__ import annotations

import codecs
from typing import Self

import msgspec

from autoflux.errors import DamagedFile


class Value(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A frozen record. Equal values have equal JSON; unknown keys and wrong types are refused on reading."""

    def to_json(self) -> str:
        """Indented JSON that `from_json` reads back to an equal value."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode()

    def to_data(self) -> dict[str, object]:
        """The same as plain dictionaries, lists, strings and numbers."""
        data: dict[str, object] = msgspec.to_builtins(self)
        return data

    @classmethod
    def from_json(cls, text: str | bytes, *, origin: str = "the text") -> Self:
        """Read what `to_json` wrote.

        Raises:
            DamagedFile: not JSON, an unknown or missing key, a wrong type; the message names `origin` and the key.
        """
        try:
            return msgspec.json.decode(text, type=cls)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise DamagedFile(
                f"{origin} cannot be read as {cls.__name__}: {error}",
                hint="delete it, or correct what the message names",
            ) from error

    @classmethod
    def from_saved(cls, text: str | bytes, *, schema: int, origin: str, made_by: str) -> Self:
        """Read what the command `made_by` printed, in its envelope or without, and of this version only.

        The text may be in UTF-16 or begin with a byte order mark, as `>` of PowerShell writes it.

        Raises:
            DamagedFile: not JSON, the envelope of an error, something else, of another version than `schema`, or as of
                `from_json`.
        """
        try:
            data: object = msgspec.json.decode(_decoded(text))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise DamagedFile(f"{origin} is not JSON: {error}", hint=f"give what `{made_by}` wrote") from error
        data = _unwrapped(data, origin)
        if foreign := _foreign_keys(cls, data):
            raise DamagedFile(
                f"{origin} cannot be read as {cls.__name__}: it is something else, with {', '.join(foreign[:4])}",
                hint=f"give what `{made_by}` wrote",
            )
        if isinstance(data, dict) and isinstance(found := data.get("schema"), int) and found != schema:
            raise DamagedFile(
                f"{origin} is of version {found} and this autoflux reads version {schema}",
                hint="make it anew with this version of autoflux",
            )
        try:
            return cls.from_json(msgspec.json.encode(data), origin=origin)
        except DamagedFile as error:
            hint = f"give what `{made_by}` wrote, or correct what the message names"
            raise DamagedFile(error.message, hint=hint) from error

    def replace(self, **changes: object) -> Self:
        """A copy with some fields changed."""
        changed: Self = msgspec.structs.replace(self, **changes)
        return changed


def _decoded(text: str | bytes) -> str | bytes:
    """Without a byte order mark, and as text where it says UTF-16."""
    if isinstance(text, bytes) and text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return text.decode("utf-16")
    return text.removeprefix(codecs.BOM_UTF8) if isinstance(text, bytes) else text


def _foreign_keys(kind: type[msgspec.Struct], data: object) -> list[str]:
    """The keys of what is no `kind` of any version: most of them are not its own."""
    if not isinstance(data, dict):
        return []
    foreign = sorted(data.keys() - set(kind.__struct_fields__))
    return foreign if len(foreign) > len(data) / 2 else []


def _unwrapped(data: object, origin: str) -> object:
    """What is in the envelope of `--json`; what is in none stays as it is."""
    if not isinstance(data, dict) or set(data) != {"schema", "ok", "data", "error"}:
        return data
    if data["ok"] is not True:
        error = data["error"]
        message = error.get("message", "no message") if isinstance(error, dict) else "no message"
        raise DamagedFile(f"{origin} holds an error: {message}", hint="run the command that wrote it again")
    return data["data"]
