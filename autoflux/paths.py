"""Where autoflux keeps its own files: `AUTOFLUX_CACHE_DIR` and `AUTOFLUX_CONFIG_DIR`, else the platform's places."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """What can be deleted at any time: probe results, calibration."""
    return Path(os.environ.get("AUTOFLUX_CACHE_DIR") or platformdirs.user_cache_dir("autoflux"))


def config_dir() -> Path:
    """What the user wrote: own profiles, settings."""
    return Path(os.environ.get("AUTOFLUX_CONFIG_DIR") or platformdirs.user_config_dir("autoflux"))


def expanded(path: str | Path) -> Path:
    """The path with `~` or `~user` replaced by that home; as it was written where there is no such home."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 — `Path.expanduser` raises for a user without a home
