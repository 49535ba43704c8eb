"""The model that ships with autoflux: a real FLUX pipeline in miniature that draws coloured shapes."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources

from autoflux import ModelEntry, hookimpl


@hookimpl
def register_models(register: Callable[[ModelEntry], None]) -> None:
    """Register the model `sample`."""
    register(
        ModelEntry(
            name="sample",
            path=str(resources.files("autoflux.models") / "sample"),
            description="a FLUX in miniature, 256x256: shapes in colours; ships with autoflux, needs no GPU",
        )
    )
