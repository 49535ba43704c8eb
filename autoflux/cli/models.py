"""`autoflux models`: the models on this machine, and how they get there."""

from __future__ import annotations

from autoflux.cli.groups import LazyGroup

command = LazyGroup(
    "models",
    ("list", "show", "pull", "verify", "pack", "rm"),
    help="List, describe, download, verify, pack and remove models.",
)
