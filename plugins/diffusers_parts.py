"""What a FLUX pipeline has beside its networks, and trying its text encoders while others are on their way."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from transformers import CLIPTokenizer, T5TokenizerFast

from autoflux import Placement, Plan

ENCODERS = ("text_encoder", "text_encoder_2")


def load_small_parts(folder: Path) -> dict[str, Any]:
    """Tokenizers and scheduler, by their names in the pipeline."""
    local = {"local_files_only": True}
    return {
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer", **local),
        "tokenizer_2": T5TokenizerFast.from_pretrained(folder / "tokenizer_2", **local),
        "scheduler": FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler", **local),
    }


def encode_once(pipe: FluxPipeline, plan: Plan) -> None:
    """Encode on a card whose encoders are there: the first time takes long.

    What fails here fails again with the first prompt, and is told then.
    """
    there = all(plan.component(name).placement == Placement.DEVICE for name in ENCODERS)
    if not (there and plan.device.startswith("cuda")):
        return
    tokens = plan.predicted.picture.text_tokens
    with suppress(Exception), torch.inference_mode():
        pipe.encode_prompt("", prompt_2=None, device=torch.device(plan.device), max_sequence_length=tokens)
