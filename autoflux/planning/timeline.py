"""How long a way of running takes, from measured rates. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping

from autoflux.hardware.values import Figure, Hardware, Link, Source
from autoflux.models.flops import decode_flop, encode_flop, image_tokens, step_flop
from autoflux.models.values import Model, Precision
from autoflux.planning.footprint import PHASE_OF
from autoflux.planning.streaming import modulation_bytes, staying_bytes
from autoflux.planning.values import Arrangement, ComponentPlan, Picture, Placement, Priors
from autoflux.values import Value

TILED_DECODE = 1.78
"""How much more is computed in tiles: they overlap by a quarter along each side, (1 / 0.75)^2 (diffusers 0.42)."""

FROM_PROFILE = "from the profile"
"""Note of a figure that neither the probe nor the user gave."""


class Rates(Value, frozen=True, kw_only=True):
    """What the timeline reckons with: the probe's figures, or the profile's where the probe has none."""

    matmul_tflops: Figure
    link_gb_per_s: Figure
    disk_gb_per_s: Figure


class Timeline(Value, frozen=True, kw_only=True):
    """Seconds by part of drawing one batch of pictures."""

    encode: float
    step: float
    decode: float
    visits: float
    """Copies of whole components to the device, once a batch."""
    start: float

    def image(self, picture: Picture) -> float:
        """Seconds for one picture of the batch."""
        batch = self.visits + picture.steps * self.step
        return batch / picture.batch + self.encode + self.decode


def choose_rates(
    hardware: Hardware,
    measured: Mapping[str, Figure],
    link: Link | None,
    precision: Precision,
    priors: Priors,
    *,
    pinned: bool,
) -> Rates:
    """A measured rate beats the profile's. `pinned` is whether weights wait in pinned memory."""
    matmul = measured.get(precision.value)
    copies = link.to_device_gb_per_s(pinned=pinned) if link else None
    return Rates(
        matmul_tflops=matmul or _assumed(priors.matmul_tflops),
        link_gb_per_s=copies or _assumed(priors.link_gb_per_s),
        disk_gb_per_s=hardware.disk.read_gb_per_s or _assumed(priors.disk_gb_per_s),
    )


def block_seconds(model: Model, rates: Rates, priors: Priors, picture: Picture) -> float:
    """What one block of the transformer computes for, whether double or single."""
    architecture = model.architecture
    tokens = picture.text_tokens + image_tokens(architecture, picture.width, picture.height)
    blocks = architecture.double_blocks + architecture.single_blocks
    flop = picture.batch * step_flop(architecture, tokens)
    # The device computes one block while the host prepares the next, so the slower of the two counts.
    return max(flop / (rates.matmul_tflops.value * 1e12 * priors.step_efficiency) / blocks, priors.block_seconds)


def timeline(
    model: Model,
    arrangement: Arrangement,
    rates: Rates,
    priors: Priors,
    picture: Picture,
    *,
    streamed_step: float | None = None,
) -> Timeline:
    """What each part takes when the weights are arranged so; `streamed_step` is what a schedule gives a step."""
    architecture = model.architecture
    flop_per_s = rates.matmul_tflops.value * 1e12
    decode = decode_flop(architecture, picture.width, picture.height)
    link = rates.link_gb_per_s.value * 1e9
    copies = {c.name: _copied_bytes(model, c) / link for c in arrangement.components}
    text = sum(seconds for name, seconds in copies.items() if PHASE_OF[name] == "encode")
    blocks = architecture.double_blocks + architecture.single_blocks
    if arrangement.tile_decode:
        decode *= TILED_DECODE
    brought_back = staying_bytes(model, arrangement) / link if arrangement.park_for_decode else 0.0
    return Timeline(
        encode=encode_flop(architecture, picture.text_tokens) / (flop_per_s * priors.step_efficiency) + text,
        step=streamed_step or blocks * block_seconds(model, rates, priors, picture),
        decode=decode / (flop_per_s * priors.vae_efficiency),
        visits=sum(copies.values()) - text + brought_back,
        start=priors.start_seconds + model.disk_bytes / (rates.disk_gb_per_s.value * 1e9),
    )


def _copied_bytes(model: Model, component: ComponentPlan) -> int:
    """What is copied to the device once a batch of pictures; a streamed step's copies are part of the step."""
    if component.placement == Placement.DEVICE:
        return 0
    if component.placement == Placement.STREAMED and component.name == "transformer":
        return modulation_bytes(model, component.storage)
    if component.placement == Placement.NATIVE and component.name == "transformer":
        return 0
    return model.component(component.name).bytes_as(component.storage)


def _assumed(value: float) -> Figure:
    return Figure(value=value, source=Source.ASSUMED, note=FROM_PROFILE)
