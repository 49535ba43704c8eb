"""How long a way of running takes, from measured rates. Pure arithmetic."""

from __future__ import annotations

from autoflux.models.flops import decode_flop, encode_flop
from autoflux.models.values import Model
from autoflux.planning.footprint import PHASE_OF
from autoflux.planning.packs import read_bytes
from autoflux.planning.speed import Rates, Way, all_blocks_seconds
from autoflux.planning.streaming import block_bytes_of, copied_modulation, staying_bytes
from autoflux.planning.terms import Placement, Waiting
from autoflux.planning.values import Arrangement, ComponentPlan, Picture, Priors
from autoflux.values import Value

TILED_DECODE = 1.78
"""How much more is computed in tiles: they overlap by a quarter along each side, (1 / 0.75)^2 (diffusers 0.42)."""


class Timeline(Value, frozen=True, kw_only=True):
    """Seconds by part of drawing one batch of pictures."""

    encode: float
    step: float
    decode: float
    visits: float
    """Once a batch: copies of whole components to the device, and recording graphs that do not stay."""
    start: float

    def image(self, picture: Picture) -> float:
        """Seconds for one picture of the batch."""
        batch = self.visits + picture.steps * self.step
        return batch / picture.batch + self.encode + self.decode


def timeline(
    model: Model,
    arrangement: Arrangement,
    rates: Rates,
    priors: Priors,
    picture: Picture,
    way: Way,
    *,
    streamed_step: float | None = None,
) -> Timeline:
    """What each part takes when the weights are arranged so; `streamed_step` is what a schedule gives a step."""
    copies = {c.name: _copy_seconds(model, arrangement, c, rates) for c in arrangement.components}
    text = sum(seconds for name, seconds in copies.items() if PHASE_OF[name] == "encode")
    brought_back = _bring_back_seconds(model, arrangement, rates) if arrangement.park_for_decode else 0.0
    step = streamed_step
    if step is None:
        step = priors.pause_seconds + all_blocks_seconds(model, rates, priors, picture, way)
    recording = 0.0
    if arrangement.graphs and arrangement.park_for_decode:
        # They do not stay over a decode, and for each batch a step is launched, and one is recorded.
        launched = all_blocks_seconds(model, rates, priors, picture, way.replace(graphs=False))
        recording = 2 * max(0.0, priors.pause_seconds + launched - step)
    reading = read_bytes(model, arrangement) / (rates.disk_gb_per_s.value * 1e9)
    narrowing = _narrowing_seconds(model, arrangement, rates)
    start = priors.start_seconds + reading + narrowing + priors.compile_seconds * way.compiled
    ran = rates.correction
    return Timeline(
        encode=ran.around * (_encode_seconds(model, arrangement, rates, priors, picture) + text),
        step=step,
        decode=ran.around * _decode_seconds(model, arrangement, rates, priors, picture),
        visits=ran.around * (sum(copies.values()) - text + brought_back + recording),
        start=ran.start * start,
    )


def _bring_back_seconds(model: Model, arrangement: Arrangement, rates: Rates) -> float:
    """What left the device for the decode comes back from where the other blocks wait."""
    waiting = arrangement.component("transformer").waiting
    return staying_bytes(model, arrangement) / (copy_gb_per_s(waiting, rates) * 1e9)


def _narrowing_seconds(model: Model, arrangement: Arrangement, rates: Rates) -> float:
    """Making 8 bits of the blocks as they are read: they go to the device wide, in plain copies, and come back narrow.

    On one H200 that takes 4 to 6 s for FLUX.1-dev's 17.2 GB and 8.6 GB (benchmarks/streaming.py, setup).
    """
    planned, copying = arrangement.component("transformer"), rates.host_copy_gb_per_s
    if copying is None or not planned.is_narrow or planned.placement == Placement.NATIVE or planned.packed_bytes:
        return 0.0
    wide, narrow = (sum(block_bytes_of(model, p)) for p in (planned.replace(storage=planned.arithmetic), planned))
    return (wide + narrow) / (copying.value * 1e9)


def _encode_seconds(model: Model, arrangement: Arrangement, rates: Rates, priors: Priors, picture: Picture) -> float:
    flop = encode_flop(model.architecture, picture.text_tokens)
    on_host = arrangement.component("text_encoder_2").placement == Placement.HOST
    rate = rates.host_tflops if on_host else rates.matmul_tflops
    return flop / (rate.value * 1e12 * priors.step_efficiency)


def _decode_seconds(model: Model, arrangement: Arrangement, rates: Rates, priors: Priors, picture: Picture) -> float:
    flop = decode_flop(model.architecture, picture.width, picture.height)
    if arrangement.tile_decode:
        flop *= TILED_DECODE
    on_host = arrangement.component("vae").placement == Placement.HOST
    rate = rates.host_tflops if on_host else rates.matmul_tflops
    return flop / (rate.value * 1e12 * priors.vae_efficiency)


def copy_gb_per_s(waiting: Waiting, rates: Rates) -> float:
    """Copies to the device run at the slowest part of their way, as reading ahead and copying go on at once.

    However runs correct it, a slower place to wait stays the slower one: the search rests on that.
    """
    link, ran = rates.link_gb_per_s.value, rates.correction.copies
    parts = {Waiting.DISK: rates.disk_gb_per_s, Waiting.PAGEABLE: rates.host_copy_gb_per_s}
    slowest = min(link, part.value) if (part := parts.get(waiting)) else link
    return min(link * ran.get(Waiting.PINNED, 1.0), slowest * ran.get(waiting, 1.0))


def _copy_seconds(model: Model, arrangement: Arrangement, component: ComponentPlan, rates: Rates) -> float:
    """Copies to the device once a batch of pictures; a streamed step's copies are part of the step."""
    if component.placement in (Placement.DEVICE, Placement.HOST):
        return 0.0
    if component.placement == Placement.NATIVE and component.name == "transformer":
        return 0.0
    waiting = component.waiting if component.placement == Placement.STREAMED else Waiting.PINNED
    nbytes = model.component(component.name).bytes_as(component.storage)
    if component.placement == Placement.STREAMED and component.name == "transformer":
        nbytes = copied_modulation(model, arrangement)
    return nbytes / (copy_gb_per_s(waiting, rates) * 1e9)
