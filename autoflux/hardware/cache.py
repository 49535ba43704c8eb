"""Measurements kept between runs: one JSON file for each fingerprint of machine, driver and versions."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from autoflux.errors import DamagedFile, OutputUnwritable
from autoflux.files import check_writable, write_atomic
from autoflux.hardware.saved import impossible
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
    except (FileNotFoundError, NotADirectoryError):
        return None, []
    except (OSError, DamagedFile) as error:
        return None, [_ignored(path, str(error))]
    if (hardware.fingerprint, hardware.schema) != (key, SCHEMA):
        return None, [_ignored(path, "it is of another machine or version")]
    if fault := impossible(hardware):
        return None, [_ignored(path, f"{str(path)!r} cannot be right: {fault}")]
    return hardware, []


def save(folder: Path, hardware: Hardware) -> list[Problem]:
    """Keep `hardware`; a problem if that cannot be done."""
    path = _path(folder, hardware.fingerprint)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, hardware.to_json().encode())
    except OutputUnwritable as error:
        return [_unwritable(error.message)]
    except OSError as error:
        return [_unwritable(f"cannot write {str(path)!r}: {error.strerror or error}")]
    return []


def check(folder: Path) -> list[Problem]:
    """A problem if nothing new could be kept in the folder; for when there is nothing to keep now."""
    try:
        check_writable(folder)
    except OutputUnwritable as error:
        return [_unwritable(error.message)]
    return []


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key}.json"


def _unwritable(reason: str) -> Problem:
    return Problem(
        subject="cache",
        message=f"measurements are not kept: {reason}",
        hint="set AUTOFLUX_CACHE_DIR to a folder that can be written",
    )


def _ignored(path: Path, reason: str) -> Problem:
    return Problem(
        subject="cache",
        message=f"kept measurements were ignored: {reason}",
        hint=f"nothing to do: {path.name} is written anew by `autoflux probe`",
    )
