"""The base of every value that passes between stages: frozen, strict about its keys, and the same after JSON."""

from __future__ import annotations

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

    def replace(self, **changes: object) -> Self:
        """A copy with some fields changed."""
        changed: Self = msgspec.structs.replace(self, **changes)
        return changed
