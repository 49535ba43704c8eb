"""The backend that computes the transformer with DiffSynth. Importing this module imports neither it nor torch."""

from __future__ import annotations

from collections.abc import Callable, Collection
from importlib.util import find_spec
from typing import ClassVar

from autoflux import (
    Backend,
    BackendFacts,
    Component,
    LoadProgress,
    MissingExtra,
    Model,
    Pipeline,
    Plan,
    PluginFailure,
    hookimpl,
)

INSTALL = "pip install 'autoflux[diffsynth]'"

IMPORT_SECONDS = 1.6
"""Importing DiffSynth beside diffusers, which it needs too: benchmarks/backend_starts.py, two cores of an AMD EPYC."""


def unreadable(transformer: Component) -> str:
    """Why DiffSynth's loader cannot read a transformer from where it is; "" if it can."""
    gguf = any(file.endswith(".gguf") for file in transformer.files)
    if transformer.prefix or transformer.scaled or gguf:
        return (
            "it reads transformers from diffusers folders and plain safetensors files, not from those with a prefix "
            "such as 'model.diffusion_model.' before all names, weights with scales, or GGUF"
        )
    return ""


class DiffSynthBackend:
    """Runs what the backend `diffusers` runs, from the same folders, with DiffSynth's transformer and step function.

    Text encoders and decoder are those of that backend: DiffSynth's compute the same, but in FLUX.1's sizes only.
    """

    name: ClassVar[str] = "diffsynth"
    defers: ClassVar[bool] = True

    def missing(self) -> str | None:
        """The pip command that installs it, None when it is installed."""
        absent = any(find_spec(name) is None for name in ("diffsynth", "diffusers", "torchvision", "transformers"))
        return INSTALL if absent else None

    def facts(self, model: Model) -> BackendFacts:
        """What the planner chooses by."""
        refuses = unreadable(model.component("transformer"))
        return BackendFacts(name=self.name, refuses=refuses, start_seconds=IMPORT_SECONDS)

    def build(self, plan: Plan, model: Model, progress: LoadProgress, later: Collection[str] = ()) -> Pipeline:
        """Load the model's components where the plan puts them; text encoders named in `later` when they are used.

        Raises:
            MissingExtra: DiffSynth is not installed.
            PluginFailure: it is installed and cannot be imported.
        """
        if command := self.missing():
            raise MissingExtra(f"the backend {self.name!r}", command)
        try:
            from .diffsynth_pipeline import DiffSynthPipeline  # noqa: PLC0415 — imports torch and DiffSynth
        except (ImportError, RuntimeError) as error:
            raise PluginFailure(
                f"DiffSynth is installed and cannot be imported: {error}",
                hint="torch and torchvision must come from the same index: `pip install --force-reinstall torch "
                "torchvision`",
            ) from error
        return DiffSynthPipeline.load(plan, model, progress, later)


@hookimpl
def register_backends(register: Callable[[Backend], None]) -> None:
    """Register the backend `diffsynth`."""
    register(DiffSynthBackend())
