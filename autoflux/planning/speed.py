"""How long a block of the transformer computes for, in each way there is to compute it. Pure arithmetic.

A block is matrix products, attention, and all the rest (norms, rotary positions, activations), which is bound by
device memory. Products go at the measured rate of their number format, attention at its own measured rate, and the rest
is what a timed block took beside both; without a timed block it is what the profile's `step_efficiency` leaves.
"""

from __future__ import annotations

from collections.abc import Mapping

from autoflux.hardware.values import (
    Accelerator,
    BlockKind,
    Figure,
    Host,
    Source,
    attention_operations,
    block_operations,
)
from autoflux.models.flops import image_tokens
from autoflux.models.values import Model, Precision
from autoflux.planning.values import Picture, Priors
from autoflux.values import Value

FROM_PROFILE = "from the profile"

NATIVE_OVERHEAD: Mapping[Precision, float] = {Precision.FLOAT8: 1.0, Precision.INT8: 1.45}
"""Time of an 8-bit product in a layer over that of the product alone: making activations narrow, and for int8 scaling
sums that arrive as four bytes each. One H200, compiled, 4608 x 3072 -> 12288: 0.25 ms in fp8 at 1259 TFLOP/s, 0.59 ms in
int8 at 850."""

EAGER_NARROWING = 0.75
"""What making activations narrow adds to the rest of a block when it is not compiled, as a share of that rest. One H200:
125 us a layer against 24 us compiled, FLUX.1-dev, 1024x1024."""

DEVICES_OWN_ATTENTION = "default"


class Way(Value, frozen=True, kw_only=True):
    """How blocks compute: activations in `arithmetic`, weights held in `storage` and, if `native`, multiplied so."""

    arithmetic: Precision
    storage: Precision
    native: bool = False
    compiled: bool = False

    @property
    def is_narrow(self) -> bool:
        return self.storage.item_bytes == 1


class Rates(Value, frozen=True, kw_only=True):
    """What the timeline reckons with: the probe's figures, or the profile's where the probe has none."""

    matmul_tflops: Figure
    narrow_tflops: Figure | None
    """Of products of one byte a number; None if they are not computed so."""
    attention_tflops: Figure
    attention: str
    """What computes attention fastest: `default` or `cudnn`."""
    rest_seconds: dict[BlockKind, float]
    """What a block takes beside products and attention at 1024x1024 with 512 text tokens, uncompiled; may be empty."""
    link_gb_per_s: Figure
    disk_gb_per_s: Figure
    host_copy_gb_per_s: Figure | None = None


def choose_rates(
    device: Accelerator | Host, way: Way, priors: Priors, *, link: Figure | None, disk: Figure | None, copy: Figure | None
) -> Rates:
    """A measured rate beats the profile's."""
    measured = device.matmul_tflops
    matmul = measured.get(way.arithmetic.value) or assumed(priors.matmul_tflops)
    kinds = device.attention_tflops if isinstance(device, Accelerator) else {}
    attention = max(kinds, key=lambda name: (kinds[name].value, name == DEVICES_OWN_ATTENTION), default=None)
    return Rates(
        matmul_tflops=matmul,
        narrow_tflops=measured.get(way.storage.value) if way.native else None,
        attention_tflops=kinds[attention] if attention else assumed(matmul.value * priors.attention_share),
        attention=attention or DEVICES_OWN_ATTENTION,
        rest_seconds=_rest_seconds(device, matmul, kinds.get(DEVICES_OWN_ATTENTION)),
        link_gb_per_s=link or assumed(priors.link_gb_per_s),
        disk_gb_per_s=disk or assumed(priors.disk_gb_per_s),
        host_copy_gb_per_s=copy,
    )


def _rest_seconds(device: Accelerator | Host, matmul: Figure, attention: Figure | None) -> dict[BlockKind, float]:
    """Of each timed block, what its products and its attention do not explain."""
    if not isinstance(device, Accelerator) or attention is None:
        return {}
    rest: dict[BlockKind, float] = {}
    for kind, timing in device.blocks.items():
        attending = attention_operations(timing.hidden_size, timing.image_tokens + timing.text_tokens)
        products = (timing.operations - attending) / (matmul.value * 1e12)
        beside = timing.seconds.value - products - attending / (attention.value * 1e12)
        scale = FLUX_REST_UNIT / (timing.hidden_size * (timing.image_tokens + timing.text_tokens))
        rest[kind] = max(0.0, beside) * scale
    return rest


FLUX_REST_UNIT = 3072 * (4096 + 512)
"""Numbers in the tokens of a block of FLUX.1 at 1024x1024: what `Rates.rest_seconds` is for."""


def block_seconds(
    model: Model, rates: Rates, priors: Priors, picture: Picture, way: Way
) -> dict[BlockKind, float]:
    """What a double and a single block compute for, all pictures of the batch together."""
    architecture = model.architecture
    tokens = picture.text_tokens + image_tokens(architecture, picture.width, picture.height)
    hidden, batch = architecture.hidden_size, picture.batch
    attending = batch * attention_operations(hidden, tokens)
    multiplying = batch * block_operations(hidden, tokens) - attending
    products = multiplying / (rates.matmul_tflops.value * 1e12)
    attention = attending / (rates.attention_tflops.value * 1e12)
    narrow = _products(multiplying, rates, priors, way, products, hidden)
    least = priors.block_seconds * (priors.compiled_rest if way.compiled else 1.0)
    kinds: tuple[BlockKind, ...] = ("double", "single")
    seconds = {}
    for kind in kinds:
        if kind in rates.rest_seconds:
            rest = rates.rest_seconds[kind] * batch * tokens * hidden / FLUX_REST_UNIT
        else:
            rest = (products + attention) * (1 / priors.step_efficiency - 1)
        # The device computes one block while the host prepares the next, so the slower of the two counts.
        seconds[kind] = max(narrow + attention + rest * _rest_factor(priors, way), least)
    return seconds


def _products(multiplying: float, rates: Rates, priors: Priors, way: Way, wide: float, hidden: int) -> float:
    if not way.is_narrow:
        return wide
    if way.native and rates.narrow_tflops:
        return NATIVE_OVERHEAD[way.storage] * multiplying / (rates.narrow_tflops.value * 1e12)
    # Widened at each use: a byte is read and two are written and read again.
    return wide + 12 * hidden**2 / (priors.widen_gb_per_s * 1e9)


def _rest_factor(priors: Priors, way: Way) -> float:
    if way.compiled:
        return priors.compiled_rest
    return 1.0 + EAGER_NARROWING * way.native


def assumed(value: float) -> Figure:
    """A figure of the profile's."""
    return Figure(value=value, source=Source.ASSUMED, note=FROM_PROFILE)
