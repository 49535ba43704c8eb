"""`autoflux bench`: measurements of this machine with this model."""

from __future__ import annotations

from autoflux.cli.groups import LazyGroup

command = LazyGroup("bench", ("load",), help="Measure how a model runs on this machine.")
