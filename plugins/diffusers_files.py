"""Networks made from single files: their configuration from the headers, their weights from where they lie."""

from __future__ import annotations

from typing import Any

import accelerate
import diffusers
import torch
from transformers.initialization import no_init_weights

from autoflux import Component, Store, leave_parts_on_disk, load_parts, locate


def load_network(kind: Any, component: Component, dtype: torch.dtype) -> tuple[torch.nn.Module, Store | None]:
    """The network with its weights in RAM.

    Raises:
        DamagedCheckpoint: a file has changed or cannot be read any more.
    """
    network = bare_network(kind, component.config)
    # As `from_pretrained` does: T5 overflows in float16.
    careful = (getattr(kind, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else ()
    load_parts(network, locate(component), dtype, float32=careful)
    return network.eval().requires_grad_(requires_grad=False), None


def open_network(kind: Any, component: Component, dtype: torch.dtype) -> tuple[torch.nn.Module, Store | None]:
    """The network without weights, and what reads them when they are needed.

    Raises:
        DamagedCheckpoint: a file has changed or cannot be read any more.
    """
    network = bare_network(kind, component.config)
    store = leave_parts_on_disk(network, locate(component), dtype)
    return network.eval().requires_grad_(requires_grad=False), store


def bare_network(kind: Any, config: dict[str, Any]) -> torch.nn.Module:
    """A network whose parameters take no memory, and no time: nothing is drawn for them."""
    with accelerate.init_empty_weights(include_buffers=False), no_init_weights():
        if issubclass(kind, diffusers.ModelMixin):
            network: torch.nn.Module = kind.from_config(config)
        else:
            made = kind(kind.config_class.from_dict(config))
            # One table, not two of equal shape.
            made.set_input_embeddings(made.get_input_embeddings())
            network = made
    return network


def bound_tokens(pipe: diffusers.FluxPipeline) -> None:
    """Give CLIP no more tokens than it has positions: without `tokenizer_config.json` its tokenizer knows no limit."""
    positions: int = pipe.text_encoder.config.max_position_embeddings
    pipe.tokenizer_max_length = min(pipe.tokenizer_max_length, positions)
