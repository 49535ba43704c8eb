"""Loading a diffusers folder component by component: only safetensors, only from this disk, no code from the model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from autoflux import DamagedCheckpoint, LoadProgress, Model, Plan, Precision, Residence

# Both are read when the libraries are imported.
os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import diffusers
import transformers

DTYPES = {
    Precision.FLOAT32: torch.float32,
    Precision.BFLOAT16: torch.bfloat16,
    Precision.FLOAT16: torch.float16,
}

_NETWORKS: dict[str, Any] = {
    "text_encoder": transformers.CLIPTextModel,
    "text_encoder_2": transformers.T5EncoderModel,
    "transformer": diffusers.FluxTransformer2DModel,
    "vae": diffusers.AutoencoderKL,
}
_TIED = frozenset({"encoder.embed_tokens.weight"})
"""Names of T5's input table, stored once under another name."""


class Components:
    """The loaded parts: diffusers' own pipeline object, and where each network's weights live."""

    def __init__(self, pipe: diffusers.FluxPipeline, residences: dict[str, Residence]) -> None:
        self.pipe = pipe
        self.residences = residences


def load_components(plan: Plan, model: Model, progress: LoadProgress) -> Components:
    """Load every component in its precision and put it where the plan says, in the order they run.

    Raises:
        DamagedCheckpoint: weights or configuration do not fit each other.
    """
    _quiet()
    folder, device = Path(model.path), torch.device(plan.device)
    residences, networks = {}, {}
    done = 0
    for component in model.components:
        progress(f"loading {component.name.replace('_', ' ')}", done / model.disk_bytes)
        planned = plan.component(component.name)
        with _damage_named(folder / component.name):
            network = _load_network(folder, component.name, DTYPES[planned.arithmetic])
        networks[component.name] = network
        residences[component.name] = Residence(network, planned.placement, device)
        done += component.disk_bytes
    with _damage_named(folder):
        pipe = diffusers.FluxPipeline(**networks, **_load_small_parts(folder))
    pipe.set_progress_bar_config(disable=True)
    return Components(pipe, residences)


def _load_network(folder: Path, name: str, dtype: torch.dtype) -> torch.nn.Module:
    network, report = _NETWORKS[name].from_pretrained(
        folder / name,
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    missing = set(report["missing_keys"]) - _TIED
    if missing:
        raise ValueError(f"{len(missing)} weights are missing, such as {min(missing)!r}")
    module: torch.nn.Module = network.eval().requires_grad_(requires_grad=False)
    return module


def _load_small_parts(folder: Path) -> dict[str, Any]:
    local = {"local_files_only": True}
    return {
        "tokenizer": transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer", **local),
        "tokenizer_2": transformers.T5TokenizerFast.from_pretrained(folder / "tokenizer_2", **local),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler", **local),
    }


@contextmanager
def _damage_named(part: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise DamagedCheckpoint(f"{str(part)!r} cannot be loaded: {error}", hint="download the model again") from error


def _quiet() -> None:
    """Keep the libraries' progress bars and advice out of our output; our errors say what matters."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
