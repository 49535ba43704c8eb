"""Trying text encoders while the transformer is on its way."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

from autoflux import Placement, Plan

ENCODERS = ("text_encoder", "text_encoder_2")


def encode_once(pipe: Any, plan: Plan) -> None:
    """Encode on a card whose encoders are there: the first time takes long.

    What fails here fails again with the first prompt, and is told then.
    """
    there = all(plan.component(name).placement == Placement.DEVICE for name in ENCODERS)
    if not (there and plan.device.startswith("cuda")):
        return
    tokens = plan.predicted.picture.text_tokens
    with suppress(Exception), torch.inference_mode():
        pipe.encode_prompt("", prompt_2=None, device=torch.device(plan.device), max_sequence_length=tokens)
