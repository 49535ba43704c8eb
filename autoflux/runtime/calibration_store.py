"""Calibrations kept between runs: one JSON file for each machine and model. Does not import torch."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from autoflux.errors import DamagedFile, OutputUnwritable
from autoflux.files import read_small, write_atomic
from autoflux.hardware.values import Hardware
from autoflux.models.values import Model
from autoflux.paths import cache_dir
from autoflux.planning.calibration import CALIBRATION_SCHEMA, Calibration

FOLDER = "calibration"
"""In the cache folder, beside that of the probe."""

VARIABLE = "AUTOFLUX_CALIBRATION"
"""Environment variable: `off` plans as if nothing had ever run here, and keeps nothing."""


_MEASURED_AGAIN = (
    "what earlier runs took is not counted, as this machine was measured again since; `autoflux tune` counts it anew"
)


def is_off() -> bool:
    """Whether the user wants nothing to be known."""
    return os.environ.get(VARIABLE, "").strip().lower() in ("off", "no", "none", "false", "0")


@dataclass(frozen=True)
class CalibrationStore:
    """Where calibrations are. What is there and cannot be used is left out with a warning, and written anew later."""

    folder: Path = field(default_factory=lambda: cache_dir() / FOLDER)

    def load(self, hardware: Hardware, model: Model) -> tuple[Calibration | None, str | None]:
        """What is known of that model on that machine, and a warning if it, or a part of it, cannot be used.

        None if the model never ran there, or if its files have changed since.
        """
        path = self.path(hardware.fingerprint, model)
        try:
            if is_off() or not path.exists():
                return None, None
            found = Calibration.from_saved(
                read_small(path), schema=CALIBRATION_SCHEMA, origin=repr(str(path)), made_by="autoflux tune"
            )
        except (OSError, DamagedFile) as error:
            return None, _ignored(str(error))
        if (found.fingerprint, *_identity(found)) != (hardware.fingerprint, model.revision, model.disk_bytes):
            return None, _ignored(f"{str(path)!r} is of another machine or model")
        if found.probed_at == hardware.probed_at:
            return found, None
        held = found.after_a_probe(hardware.probed_at)
        return held, None if held == found.replace(probed_at=hardware.probed_at) else _MEASURED_AGAIN

    def save(self, calibration: Calibration, model: Model) -> str | None:
        """Keep it in the place of what was known before; a warning if that cannot be done."""
        if is_off():
            return None
        path = self.path(calibration.fingerprint, model)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, calibration.to_json().encode())
        except OutputUnwritable as error:
            return f"what was measured is not kept: {error.message}"
        except OSError as error:
            return f"what was measured is not kept: cannot write {str(path)!r}: {error.strerror or error}"
        return None

    def forget(self, fingerprint: str, model: Model) -> None:
        """Delete what is known."""
        self.path(fingerprint, model).unlink(missing_ok=True)

    def path(self, fingerprint: str, model: Model) -> Path:
        """The file. Names are of hexadecimal digits: that of a model may hold anything."""
        identity = json.dumps([model.revision, model.disk_bytes])
        return self.folder / f"{fingerprint}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"


def _identity(calibration: Calibration) -> tuple[str, int]:
    return calibration.model_revision, calibration.model_bytes


def _ignored(reason: str) -> str:
    return f"what earlier runs measured was ignored: {reason}; the next `autoflux tune` writes it anew"
