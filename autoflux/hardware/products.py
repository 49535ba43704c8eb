"""Times matrix products and attention at the sizes of FLUX's layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from autoflux.hardware.device import Device, Findings, measured
from autoflux.hardware.timing import Call, climb
from autoflux.hardware.values import FLUX_IMAGE_TOKENS, FLUX_TEXT_TOKENS, Figure, attention_operations

FLUX_HIDDEN = 3072
FLUX_HEADS = 24
HEAD_SIZE = 128
TOKENS = FLUX_IMAGE_TOKENS + FLUX_TEXT_TOKENS


@dataclass(frozen=True)
class Product:
    """(rows, inner) times (columns, inner) transposed, as a linear layer does it."""

    rows: int
    inner: int
    columns: int

    @property
    def operations(self) -> float:
        return 2.0 * self.rows * self.inner * self.columns

    @property
    def bytes_needed(self) -> int:
        """Of the random numbers in float32 that it is made of, and of the result."""
        return 4 * (self.rows * self.inner + self.inner * self.columns + self.rows * self.columns)

    def __str__(self) -> str:
        return f"{self.rows} x {self.inner} -> {self.columns}"


@dataclass(frozen=True)
class Attention:
    """Every one of `tokens` looks at all, in `heads` heads of 128 numbers."""

    tokens: int
    heads: int = FLUX_HEADS

    @property
    def operations(self) -> float:
        return attention_operations(self.heads * HEAD_SIZE, self.tokens)

    @property
    def bytes_needed(self) -> int:
        """Of queries, keys, values and result in 2 bytes, twice over. What holds all scores needs more, and fails."""
        return 2 * 4 * 2 * self.tokens * self.heads * HEAD_SIZE

    def __str__(self) -> str:
        return f"{self.heads} heads x {HEAD_SIZE}, {self.tokens} tokens"


DEVICE_PRODUCTS = tuple(Product(TOKENS // n, FLUX_HIDDEN // n, 4 * FLUX_HIDDEN // n) for n in (16, 8, 4, 2, 1))
"""Tried upwards to the widest layer of FLUX.1: a picture of 1024 x 1024 and 512 text tokens into the inner layer of a
feed-forward part, 348 * 10^9 operations."""

HOST_PRODUCTS = tuple(Product(side, side, side) for side in (256, 512, 1024, 2048))

ATTENTIONS = tuple(Attention(TOKENS // n) for n in (8, 4, 2, 1))

Make = Callable[[Product], Call]


def matmul_rates(
    device: Device, precisions: Iterable[str], products: Sequence[Product], findings: Findings
) -> dict[str, Figure]:
    """Sustained rate by precision, in 10^12 operations a second, at the largest product that is quick enough."""
    if not products:
        return {}
    rates = {
        precision: findings.attempt(f"arithmetic in {precision}", partial(_matmul_rate, device, precision, products))
        for precision in precisions
    }
    return {precision: rate for precision, rate in rates.items() if rate}


def _matmul_rate(device: Device, precision: str, products: Sequence[Product]) -> Figure:
    product, seconds = climb(products, _maker(device, precision), device.synchronize)
    return measured(product.operations / seconds / 1e12, str(product))


def _maker(device: Device, precision: str) -> Make:
    if precision == "float8_e4m3fn":
        return partial(_product_fp8, device.torch, device.name)
    if precision == "int8":
        return partial(_product_int8, device.torch, device.name)
    return partial(_product, device.torch, device.name, getattr(device.torch, precision))


def _product(torch: Any, device: str, dtype: Any, product: Product) -> Call:
    left, right = _random(torch, device, product, dtype)
    return partial(torch.nn.functional.linear, left, right)


def _product_fp8(torch: Any, device: str, product: Product) -> Call:
    left, right = _random(torch, device, product, torch.float8_e4m3fn)
    return partial(
        torch._scaled_mm,  # noqa: SLF001 — torch's only fp8 product; called as the engine does
        left,
        right.t(),
        scale_a=torch.ones(product.rows, 1, device=device),
        scale_b=torch.ones(1, product.columns, device=device),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def _product_int8(torch: Any, device: str, product: Product) -> Call:
    sizes = ((product.rows, product.inner), (product.columns, product.inner))
    left, right = (torch.randint(-127, 127, size, device=device, dtype=torch.int8) for size in sizes)
    return partial(torch._int_mm, left, right.t())  # noqa: SLF001 — torch's only int8 product


def _random(torch: Any, device: str, product: Product, dtype: Any) -> tuple[Any, Any]:
    # Random numbers: on zeros cards draw less power and run faster than they ever do in earnest.
    left = torch.randn(product.rows, product.inner, device=device).to(dtype)
    return left, torch.randn(product.columns, product.inner, device=device).to(dtype)


def attention_rates(
    device: Device, precision: str, attentions: Sequence[Attention], findings: Findings, *, cudnn: bool
) -> dict[str, Figure]:
    """Sustained rate by what computes it, in 10^12 operations a second. `cudnn` is whether that is tried."""
    if not attentions:
        return {}
    rates = {
        name: findings.attempt(
            f"attention by {name}", partial(_attention_rate, device, precision, attentions, restricted)
        )
        for name, restricted in _backends(device, cudnn=cudnn).items()
    }
    return {name: rate for name, rate in rates.items() if rate}


def _backends(device: Device, *, cudnn: bool) -> dict[str, Callable[[], AbstractContextManager[object]]]:
    """What confines torch to one way of computing attention, by its name."""
    backends: dict[str, Callable[[], AbstractContextManager[object]]] = {"default": nullcontext}
    if cudnn:
        attention = device.torch.nn.attention
        backends["cudnn"] = partial(attention.sdpa_kernel, attention.SDPBackend.CUDNN_ATTENTION)
    return backends


def _attention_rate(
    device: Device,
    precision: str,
    attentions: Sequence[Attention],
    restricted: Callable[[], AbstractContextManager[object]],
) -> Figure:
    with restricted():
        attention, seconds = climb(attentions, partial(_attention, device, precision), device.synchronize)
    return measured(attention.operations / seconds / 1e12, f"{attention}, {precision}")


def _attention(device: Device, precision: str, attention: Attention) -> Call:
    torch = device.torch
    size = (1, attention.tokens, attention.heads, HEAD_SIZE)
    options = {"device": device.name, "dtype": getattr(torch, precision)}
    # (1, heads, tokens, head) seen through (1, tokens, heads, head), which is how layers leave it.
    query, key, value = (torch.randn(*size, **options).transpose(1, 2) for _ in range(3))
    return partial(torch.nn.functional.scaled_dot_product_attention, query, key, value)
