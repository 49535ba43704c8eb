"""Files that the system refuses to open, also for users who may open everything."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def refuse(monkeypatch: pytest.MonkeyPatch, name: str, code: int) -> None:
    """Have opening any file of that name fail with that error number."""
    opens = Path.open

    def refusing(path: Path, *arguments, **options):
        if path.name == name:
            raise OSError(code, os.strerror(code), str(path))
        return opens(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refusing)
