"""The backend that builds pipelines with Hugging Face diffusers. Importing this module imports neither it nor torch."""

from __future__ import annotations

from collections.abc import Callable, Collection
from importlib.util import find_spec
from typing import ClassVar

from autoflux import Backend, LoadProgress, Model, Pipeline, Plan, collection_paused, hookimpl


class DiffusersBackend:
    """Runs any FLUX folder in the diffusers layout on cuda, xpu, mps and the CPU."""

    name: ClassVar[str] = "diffusers"
    defers: ClassVar[bool] = True
    as_packed: ClassVar[bool] = True

    def missing(self) -> str | None:
        """The pip command for what is not installed, None when all is."""
        packages = [name for name in ("torch", "diffusers", "transformers") if find_spec(name) is None]
        return f"pip install {' '.join(packages)}" if packages else None

    def build(self, plan: Plan, model: Model, progress: LoadProgress, later: Collection[str] = ()) -> Pipeline:
        """Load the model's components where the plan puts them; text encoders named in `later` when they are used."""
        with collection_paused():
            from .diffusers_loading import load_components  # noqa: PLC0415 — imports torch and diffusers
            from .diffusers_pipeline import DiffusersPipeline  # noqa: PLC0415

        return DiffusersPipeline(load_components(plan, model, progress, later=later), plan, model)


@hookimpl
def register_backends(register: Callable[[Backend], None]) -> None:
    """Register the backend `diffusers`."""
    register(DiffusersBackend())
