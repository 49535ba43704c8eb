"""What configurations say beside the shapes of weights, and whether it can be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from autoflux.errors import DamagedCheckpoint
from autoflux.models.configs import FLUX_DEV

Config = Mapping[str, Any]
Rule = tuple[str, Callable[[Any, Config], bool]]
"""What is needed, in words, and whether a value is that in its configuration."""

MOST_TIMESTEPS = 100_000
"""FLUX was trained on 1000; the scheduler makes a list of them."""

ACTIVATIONS = frozenset(
    {
        "gelu",
        "gelu_10",
        "gelu_accurate",
        "gelu_fast",
        "gelu_new",
        "gelu_python",
        "gelu_python_tanh",
        "gelu_pytorch_tanh",
        "hardswish",
        "laplace",
        "leaky_relu",
        "linear",
        "mish",
        "quick_gelu",
        "relu",
        "relu2",
        "relu6",
        "sigmoid",
        "silu",
        "sqrtsoftplus",
        "swish",
        "tanh",
    }
)
"""Functions that transformers knows by name (`ACT2FN`) and that have no weights. To import them takes seconds."""


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and len(values) > 0 and all(map(_is_count, values))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf


def _is_activation(name: Any) -> bool:
    return isinstance(name, str) and name in ACTIVATIONS


_COUNT: Rule = ("a whole number above 0", lambda value, _: _is_count(value))
_COUNTS: Rule = ("a list of whole numbers above 0", lambda values, _: _are_counts(values))
_NUMBER_OR_NULL: Rule = ("a number or null", lambda value, _: value is None or _is_number(value))

_FUNCTION = "the name of a function that transformers knows"

_RULES: dict[str, dict[str, Rule]] = {
    "tokenizer": {
        "model_max_length": (
            "a whole number above 1 or null",
            lambda value, _: value is None or (_is_count(value) and value > 1),
        ),
    },
    "text_encoder": {
        "hidden_size": _COUNT,
        "num_attention_heads": (
            "a whole number that divides 'hidden_size'",
            lambda heads, config: _is_count(heads) and config["hidden_size"] % heads == 0,
        ),
        "hidden_act": (_FUNCTION, lambda name, _: _is_activation(name)),
    },
    "text_encoder_2": {
        "feed_forward_proj": (
            f"{_FUNCTION}, with 'gated-' before it or without",
            lambda name, _: isinstance(name, str) and _is_activation(name.removeprefix("gated-")),
        ),
    },
    "transformer": {
        "attention_head_dim": _COUNT,
        "axes_dims_rope": (
            "three even numbers with the sum 'attention_head_dim'",
            lambda axes, config: (
                _are_counts(axes)
                and len(axes) == 3
                and not any(axis % 2 for axis in axes)
                and sum(axes) == config["attention_head_dim"]
            ),
        ),
    },
    "vae": {
        "block_out_channels": _COUNTS,
        "norm_num_groups": (
            "a whole number that divides all of 'block_out_channels'",
            lambda groups, config: _is_count(groups) and not any(w % groups for w in config["block_out_channels"]),
        ),
        "scaling_factor": ("a number other than 0", lambda value, _: _is_number(value) and value != 0),
        "shift_factor": _NUMBER_OR_NULL,
    },
    "scheduler": {
        "num_train_timesteps": (
            f"a whole number from 1 to {MOST_TIMESTEPS}",
            lambda value, _: _is_count(value) and value <= MOST_TIMESTEPS,
        ),
        "shift": ("a number above 0", lambda value, _: _is_number(value) and value > 0),
        "base_shift": _NUMBER_OR_NULL,
        "max_shift": _NUMBER_OR_NULL,
    },
}
"""For each part the keys that nothing else here depends on, those first that others are compared with."""


def check_values(part: str, config: Config, file: Path) -> None:
    """Refuse a configuration that the libraries would take and only fail with later.

    Raises:
        DamagedCheckpoint: the file, the key, its value, and what is needed.
    """
    whole = {**FLUX_DEV.get(part, {}), **config}
    for key, (needed, holds) in _RULES.get(part, {}).items():
        if key in whole and not holds(whole[key], whole):
            what = f"is {whole[key]!r}" if key in config else f"is left out, and then {whole[key]!r}"
            raise DamagedCheckpoint(
                f"{str(file)!r}: {key!r} {what}; needed is {needed}", hint="download the file again"
            )
