"""Measurements kept between runs: one JSON file for each fingerprint of machine, driver and versions."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from autoflux.errors import DamagedFile, OutputUnwritable
from autoflux.files import write_atomic
from autoflux.hardware.values import SCHEMA, Hardware, Problem


def fingerprint(facts: dict[str, object]) -> str:
    """Sixteen hexadecimal digits that change when one of `facts` does."""
    text = json.dumps({"schema": SCHEMA, **facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load(folder: Path, key: str) -> tuple[Hardware | None, list[Problem]]:
    """What was kept under `key`; None if there is nothing, and a problem if there is but it cannot be read."""
    path = _path(folder, key)
    try:
        hardware = Hardware.from_json(path.read_bytes(), origin=str(path))
    except FileNotFoundError:
        return None, []
    except (OSError, DamagedFile) as error:
        return None, [_ignored(path, str(error))]
    if (hardware.fingerprint, hardware.schema) != (key, SCHEMA):
        return None, [_ignored(path, "it is of another machine or version")]
    return hardware, []


def save(folder: Path, hardware: Hardware) -> list[Problem]:
    """Keep `hardware`; a problem if that cannot be done."""
    path = _path(folder, hardware.fingerprint)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, hardware.to_json().encode())
    except (OSError, OutputUnwritable) as error:
        return [
            Problem(
                subject="cache",
                message=f"measurements are not kept: cannot write {str(path)!r}: {error}",
                hint="set AUTOFLUX_CACHE_DIR to a folder that can be written",
            )
        ]
    return []


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key}.json"


def _ignored(path: Path, reason: str) -> Problem:
    return Problem(
        subject="cache",
        message=f"kept measurements were ignored: {reason}",
        hint=f"nothing to do: {path.name} is written anew by `autoflux probe`",
    )
