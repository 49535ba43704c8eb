"""How long a block of the transformer computes for, in each way there is to compute it. Pure arithmetic.

A block is matrix products, attention, and all the rest (norms, rotary positions, activations), which is bound by
device memory. Products go at the measured rate of their number format, attention at its own measured rate, and the rest
is what a timed block took beside both; without a timed block it is what the profile's `step_efficiency` leaves.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from autoflux.hardware.values import (
    FLUX_IMAGE_TOKENS,
    FLUX_TEXT_TOKENS,
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
from autoflux.planning.terms import DEFAULT_ATTENTION
from autoflux.planning.values import Correction, Picture, Priors
from autoflux.values import Value

FROM_PROFILE = "from the profile"
"""Note of a figure that neither the probe nor the user gave."""

KINDS: tuple[BlockKind, BlockKind] = ("double", "single")

NATIVE_OVERHEAD: Mapping[Precision, float] = {Precision.FLOAT8: 1.0, Precision.INT8: 1.45}
"""Time of an 8-bit product in a compiled layer over that of the product alone: making activations narrow, and for int8
scaling sums that arrive as four bytes each. One H200, 4608 x 3072 -> 12288: 0.25 ms in fp8 at 1259 TFLOP/s, 0.59 ms in
int8 at 850."""

EAGER_NARROWING = 0.38
"""What making activations narrow adds to the rest of a block that is not compiled, as a share of that rest. One H200,
1024x1024, replayed (benchmarks/eager_steps.py): a step takes 141 ms in bfloat16, of which products, attention and what
is beside blocks take 116, and 107 in fp8, of which these take 75: 0.28. Another took 107 to 114 (benchmarks/starts.py),
and four pictures of 512x512 120 ms on one and 132 on the other (benchmarks/planning.py): 0.23 to 0.6."""

COMPILED_NARROWING = 0.19
"""The same where blocks are compiled: most rows are fused with what comes before them, but read twice. There
(benchmarks/streaming.py) a step takes 129 ms in bfloat16 and 92 in fp8: 13 and 18 ms beside all that."""

NARROW_WAVE_SECONDS = 0.00014
"""What a block of few tokens loses because its 8-bit products end in a wave of tiles that does not fill the device; at
`TIMED_ROWS` the measured rate has it. Two H200, fp8, replayed: four pictures of 512x512 take 30 and 33 ms each, one 37
and 39 (benchmarks/planning.py)."""

TIMED_ROWS = FLUX_IMAGE_TOKENS + FLUX_TEXT_TOKENS
"""Rows of the products that a probe times."""

UNALIGNED_ROWS = 1.03
"""Time of products whose last tile of rows is not full over that of products of as many whole tiles. Two H200, blocks
that are not compiled and wait for no copy: a picture of 1344x768, of 35.5 tiles, takes 0.3 to 3.7 % longer than one of
1024x1024, of 36 (eight plans); four, of 142, 0.6 to 1.2 % less than four of 144 (seven; benchmarks/planning.py)."""

LAUNCHED_BESIDE = 2.0
"""Time of the host for a block as the library and the engine run it, over that of the bare one that a probe times. What
else a host does counts: one H200, minutes after it was probed, 1.3 to 2.3 (a step of 57 at 512x512 took 49 to 89 ms);
one H100 1.2."""

COMPILED_LAUNCHES = 0.5
"""The same for a compiled block, over that of an uncompiled one. There: a step 45 to 57 ms."""

NATIVE_LAUNCHES = 2.0
"""The same for a block that is not compiled and multiplies 8 bits, over that of a wide one: each layer makes its
activations narrow and gives scales along. One H200: steps that wait for nothing else take 0.16 s, in bfloat16 0.082."""

WIDENED_LAUNCHES = 2.0
"""The same where weights of 8 bits are made wide: three operations a layer instead of one. One H200: steps of 512x512
whose copies take 0.127 s take 0.172, and in bfloat16, without copies, 0.082 (benchmarks/planning.py)."""

GRAPH_SECONDS = 0.0001
"""Of the host for a block that is replayed from a CUDA graph, whatever is in it (benchmarks/eager_steps.py)."""

GRAPH_HANDOFF = 0.0003
"""What a step takes longer for each block that is replayed and streamed, where it waits for no copy: one H200, fp8, 38
of 57 streamed at 1024x1024 (benchmarks/eager_steps.py), 12 at 512x512 (benchmarks/planning.py)."""

REST_UNIT = 3072 * (FLUX_IMAGE_TOKENS + FLUX_TEXT_TOKENS)
"""Numbers in the tokens of a block of FLUX.1 at 1024x1024, for which `Rates.rest_seconds` is."""


class Way(Value, frozen=True, kw_only=True):
    """How blocks compute: activations in `arithmetic`, weights held in `storage` and, if `native`, multiplied so."""

    arithmetic: Precision
    storage: Precision
    native: bool = False
    compiled: bool = False
    graphs: bool = False
    """Whether blocks are replayed from CUDA graphs."""

    @property
    def is_narrow(self) -> bool:
        return self.storage.item_bytes == 1


class Rates(Value, frozen=True, kw_only=True):
    """What the timeline reckons with: the probe's figures, or the profile's where the probe has none."""

    matmul_tflops: Figure
    narrow_tflops: Figure | None = None
    """Of products of one byte a number; None if they are not computed so."""
    attention_tflops: Figure
    attention: str = DEFAULT_ATTENTION
    """What computes attention: `default` or `cudnn`."""
    rest_seconds: dict[BlockKind, float] = msgspec.field(default_factory=dict)
    """What a block takes beside products and attention, uncompiled, at 1024x1024; empty if none was timed."""
    launch_seconds: dict[BlockKind, float] = msgspec.field(default_factory=dict)
    """What the host takes to launch a bare block, uncompiled; empty if it was not measured."""
    link_gb_per_s: Figure
    disk_gb_per_s: Figure
    host_copy_gb_per_s: Figure | None = None
    host_tflops: Figure
    correction: Correction = Correction()
    """What runs of the model say to all this."""


def choose_rates(
    device: Accelerator | Host, way: Way, priors: Priors, attention: str | None, **others: Figure
) -> Rates:
    """A measured rate beats the profile's. `attention` is what is to compute it, None for the fastest.

    `others` are the fields of `Rates` that do not depend on the way.
    """
    matmul = device.matmul_tflops.get(way.arithmetic.value) or assumed(priors.matmul_tflops)
    kinds = device.attention_tflops if isinstance(device, Accelerator) else {}
    chosen = attention or max(kinds, key=lambda name: (kinds[name].value, name), default=DEFAULT_ATTENTION)
    return Rates(
        matmul_tflops=matmul,
        narrow_tflops=device.matmul_tflops.get(way.storage.value) if way.native else None,
        attention_tflops=kinds.get(chosen) or assumed(matmul.value * priors.attention_share),
        attention=chosen,
        rest_seconds=_rest_seconds(device, matmul, kinds.get(DEFAULT_ATTENTION)),
        launch_seconds=_launch_seconds(device),
        correction=Correction(),  # who asks knows what has run
        **others,
    )


def _rest_seconds(device: Accelerator | Host, matmul: Figure, attention: Figure | None) -> dict[BlockKind, float]:
    """Of each timed block, what its products and its attention do not explain."""
    if not isinstance(device, Accelerator) or attention is None:
        return {}
    rest: dict[BlockKind, float] = {}
    for kind, timing in device.blocks.items():
        tokens = timing.image_tokens + timing.text_tokens
        attending = attention_operations(timing.hidden_size, tokens)
        products = (timing.operations - attending) / (matmul.value * 1e12)
        beside = timing.seconds.value - products - attending / (attention.value * 1e12)
        rest[kind] = max(0.0, beside) * REST_UNIT / (timing.hidden_size * tokens)
    return rest


def _launch_seconds(device: Accelerator | Host) -> dict[BlockKind, float]:
    blocks = device.blocks if isinstance(device, Accelerator) else {}
    return {kind: timing.launch_seconds.value for kind, timing in blocks.items() if timing.launch_seconds}


def block_seconds(model: Model, rates: Rates, priors: Priors, picture: Picture, way: Way) -> dict[BlockKind, float]:
    """What a double and a single block compute for, all pictures of the batch together."""
    architecture, batch = model.architecture, picture.batch
    hidden = architecture.hidden_size
    tokens = picture.text_tokens + image_tokens(architecture, picture.width, picture.height)
    attending = batch * attention_operations(hidden, tokens)
    multiplying = (batch * block_operations(hidden, tokens) - attending) * _filling(batch * tokens, priors)
    wide = multiplying / (rates.matmul_tflops.value * 1e12)
    attention = attending / (rates.attention_tflops.value * 1e12)
    products = _product_seconds(multiplying, wide, rates, priors, way, hidden)
    if way.native:
        products += NARROW_WAVE_SECONDS * max(0.0, 1 - batch * tokens / TIMED_ROWS)
    seconds = {}
    for kind in KINDS:
        rest = (wide + attention) * (1 / priors.step_efficiency - 1)
        if kind in rates.rest_seconds:
            rest = rates.rest_seconds[kind] * batch * tokens * hidden / REST_UNIT
        # The device computes one block while the host prepares the next, so the slower of the two counts.
        reckoned = max(products + attention + rest * _rest_factor(priors, way), _launching(kind, rates, priors, way))
        seconds[kind] = reckoned * rates.correction.blocks
    return seconds


def all_blocks_seconds(model: Model, rates: Rates, priors: Priors, picture: Picture, way: Way) -> float:
    """What all blocks of a step compute for."""
    seconds, architecture = block_seconds(model, rates, priors, picture, way), model.architecture
    return architecture.double_blocks * seconds["double"] + architecture.single_blocks * seconds["single"]


def _filling(rows: int, priors: Priors) -> float:
    """What a product takes over what its operations do: the last tile of rows takes as long as the others, and more."""
    computed = -(-rows // priors.product_rows) * priors.product_rows
    return computed / rows * (UNALIGNED_ROWS if computed > rows else 1.0)


def _product_seconds(multiplying: float, wide: float, rates: Rates, priors: Priors, way: Way, hidden: int) -> float:
    if not way.is_narrow:
        return wide
    if way.native and rates.narrow_tflops:
        return NATIVE_OVERHEAD[way.storage] * multiplying / (rates.narrow_tflops.value * 1e12)
    # A block has 12 h^2 weights, 24 h^2 if it is a double one: each of those does half of its tokens.
    return wide + 12 * hidden**2 / (priors.widen_gb_per_s * 1e9)


def _launching(kind: BlockKind, rates: Rates, priors: Priors, way: Way) -> float:
    """What the host takes for a block."""
    if way.graphs:
        return GRAPH_SECONDS
    bare = rates.launch_seconds.get(kind)
    whole = bare * LAUNCHED_BESIDE if bare is not None else priors.block_seconds
    if way.compiled:
        return whole * COMPILED_LAUNCHES
    if way.native:
        return whole * NATIVE_LAUNCHES
    return whole * WIDENED_LAUNCHES if way.is_narrow else whole


def _rest_factor(priors: Priors, way: Way) -> float:
    if way.compiled:
        return priors.compiled_rest + COMPILED_NARROWING * way.native
    return 1.0 + EAGER_NARROWING * way.native


def assumed(value: float) -> Figure:
    """A figure of the profile's."""
    return Figure(value=value, source=Source.ASSUMED, note=FROM_PROFILE)
