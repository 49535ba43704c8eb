"""The libraries behind torch's kernels, loaded before the first step asks for them: each takes its time once."""

from __future__ import annotations

import logging
import threading

import torch
from torch import Tensor
from torch.nn import functional

from autoflux.hardware.products import HEAD_SIZE
from autoflux.hardware.rotation import rotate, rotates
from autoflux.models.values import Precision
from autoflux.runtime.quantized import QuantizedLinear, quantize

SIDE = 256
"""Of what is computed: a size that every kernel takes."""

_log = logging.getLogger(__name__)


def warm_up(device: torch.device, dtype: torch.dtype, narrow: Precision | None, hidden_size: int) -> threading.Thread:
    """Compute a little of each kind in a thread: products, attention, convolution; and products in `narrow`, if given.

    Kernels of our own are compiled for each width of rows: those of a transformer of that hidden size are. What fails
    here fails again where it is needed, and is told there.
    """
    thread = threading.Thread(target=_try_all, args=(device, dtype, narrow, hidden_size), name="warm-up", daemon=True)
    thread.start()
    return thread


def _try_all(device: torch.device, dtype: torch.dtype, narrow: Precision | None, hidden_size: int) -> None:
    try:
        with torch.inference_mode():
            _compute(torch.ones(SIDE, SIDE, device=device, dtype=dtype))
            _run_kernels(torch.ones(SIDE, hidden_size, device=device, dtype=dtype), narrow)
    except Exception:  # noqa: BLE001 — see above
        _log.debug("warming up failed", exc_info=True)


def _compute(x: Tensor) -> None:
    # Nothing here may import libraries: the main thread does, and two that import each other's parts wait for each
    # other.
    functional.linear(x, x, x[0])
    for width, mask in ((64, x), (128, None)):  # of CLIP's and T5's attention, and of the transformer's
        heads = x.view(1, 1, SIDE, SIDE)[..., :width]
        functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)
    picture = x.view(1, 16, 64, 64)
    functional.conv2d(picture, x.view(-1)[: 16 * 16 * 9].view(16, 16, 3, 3), padding=1)
    functional.group_norm(picture, 4)


def _run_kernels(x: Tensor, narrow: Precision | None) -> None:
    """`x` is (tokens, hidden size)."""
    if narrow:
        for times in (1, 4, 5):  # widths of the rows that a block's layers are given
            wide = x.repeat(1, times)
            QuantizedLinear(*quantize(wide, narrow), None, native=True)(wide)
    # Another kernel is compiled for numbers that lie side by side, which those of the libraries do not.
    angles = torch.ones(len(x), HEAD_SIZE, device=x.device)[:, ::2]
    heads = x.view(1, len(x), -1, HEAD_SIZE)
    if rotates(heads):
        rotate(heads, angles, angles)
