"""Reads what `autoflux probe --json` printed, perhaps on another machine."""

from __future__ import annotations

import msgspec

from autoflux.errors import DamagedFile
from autoflux.hardware.values import Hardware


class _Envelope(msgspec.Struct):
    """What every command prints with `--json`, as far as it matters here."""

    ok: bool
    data: msgspec.Raw


def read_probe(text: str | bytes, *, origin: str = "the text") -> Hardware:
    """The machine in `text`: the envelope that `autoflux probe --json` prints, or its `data` alone.

    Raises:
        DamagedFile: it is of another version of autoflux, of a probe that failed, or no probe at all.
    """
    try:
        envelope = msgspec.json.decode(text, type=_Envelope)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return Hardware.from_json(text, origin=origin)
    if not envelope.ok:
        raise DamagedFile(f"{origin} holds an error, not a machine", hint="autoflux probe --json")
    return Hardware.from_json(bytes(envelope.data), origin=origin)
