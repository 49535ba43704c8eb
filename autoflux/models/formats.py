"""Number formats of stored weights: safetensors' and GGUF's names, and how many bytes they take."""

from __future__ import annotations

from typing import NamedTuple

from autoflux.models.values import Precision


class Format(NamedTuple):
    """`block_bytes` hold `block_items` numbers; `precision` is what comes next to it in torch."""

    block_items: int
    block_bytes: int
    precision: Precision


SAFETENSORS = {
    "F32": Format(1, 4, Precision.FLOAT32),
    "F16": Format(1, 2, Precision.FLOAT16),
    "BF16": Format(1, 2, Precision.BFLOAT16),
    "F8_E4M3": Format(1, 1, Precision.FLOAT8),
    "F8_E5M2": Format(1, 1, Precision.FLOAT8_E5M2),
    "I8": Format(1, 1, Precision.INT8),
}
"""What weights may be stored as."""

SCALES = tuple(name for name, form in SAFETENSORS.items() if form.precision != Precision.INT8)
"""What the factors of narrow weights may be stored as."""

GGML = {
    0: ("F32", Format(1, 4, Precision.FLOAT32)),
    1: ("F16", Format(1, 2, Precision.FLOAT16)),
    2: ("Q4_0", Format(32, 18, Precision.INT8)),
    3: ("Q4_1", Format(32, 20, Precision.INT8)),
    6: ("Q5_0", Format(32, 22, Precision.INT8)),
    7: ("Q5_1", Format(32, 24, Precision.INT8)),
    8: ("Q8_0", Format(32, 34, Precision.INT8)),
    10: ("Q2_K", Format(256, 84, Precision.INT8)),
    11: ("Q3_K", Format(256, 110, Precision.INT8)),
    12: ("Q4_K", Format(256, 144, Precision.INT8)),
    13: ("Q5_K", Format(256, 176, Precision.INT8)),
    14: ("Q6_K", Format(256, 210, Precision.INT8)),
    20: ("IQ4_NL", Format(32, 18, Precision.INT8)),
    23: ("IQ4_XS", Format(256, 136, Precision.INT8)),
    30: ("BF16", Format(1, 2, Precision.BFLOAT16)),
}
"""GGUF's formats by number, those of ggml that diffusers can widen (`dequantize_functions` of its GGUF quantizer)."""

FORMATS = {**SAFETENSORS, **dict(GGML.values())}
"""All of them by name."""

QUANTIZED = {name: number for number, (name, form) in GGML.items() if form.block_items > 1}
"""GGUF's block formats by name, with their numbers."""
