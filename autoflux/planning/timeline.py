"""How long a way of running takes, from measured rates. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autoflux.hardware.values import Figure, Hardware, Link, Source
from autoflux.models.flops import decode_flop, encode_flop, image_tokens, step_flop
from autoflux.models.values import Model, Precision
from autoflux.planning.footprint import PHASE_OF
from autoflux.planning.values import ComponentPlan, Picture, Placement, Priors
from autoflux.values import Value


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
    hardware: Hardware, measured: Mapping[str, Figure], link: Link | None, precision: Precision, priors: Priors
) -> Rates:
    """A measured rate beats the profile's."""
    matmul = measured.get(precision.value)
    copies = link.to_device_gb_per_s(pinned=False) if link else None
    return Rates(
        matmul_tflops=matmul or _assumed(priors.matmul_tflops),
        link_gb_per_s=copies or _assumed(priors.link_gb_per_s),
        disk_gb_per_s=hardware.disk.read_gb_per_s or _assumed(priors.disk_gb_per_s),
    )


def timeline(
    model: Model, components: Sequence[ComponentPlan], rates: Rates, priors: Priors, picture: Picture
) -> Timeline:
    """What each part takes when the components are held as planned."""
    architecture = model.architecture
    flop_per_s = rates.matmul_tflops.value * 1e12
    tokens = picture.text_tokens + image_tokens(architecture, picture.width, picture.height)
    blocks = architecture.double_blocks + architecture.single_blocks
    arithmetic = picture.batch * step_flop(architecture, tokens) / (flop_per_s * priors.step_efficiency)
    decode = decode_flop(architecture, picture.width, picture.height)
    visiting = {c.name: model.component(c.name).bytes_as(c.storage) for c in components if _visits(c)}
    link = rates.link_gb_per_s.value * 1e9
    text = sum(size for name, size in visiting.items() if PHASE_OF[name] == "encode")
    return Timeline(
        encode=encode_flop(architecture, picture.text_tokens) / (flop_per_s * priors.step_efficiency) + text / link,
        # The device computes one block while the host prepares the next, so the slower of the two counts.
        step=max(arithmetic, blocks * priors.block_seconds),
        decode=decode / (flop_per_s * priors.vae_efficiency),
        visits=(sum(visiting.values()) - text) / link,
        start=priors.start_seconds + model.disk_bytes / (rates.disk_gb_per_s.value * 1e9),
    )


def _visits(component: ComponentPlan) -> bool:
    return component.placement == Placement.VISITING


def _assumed(value: float) -> Figure:
    return Figure(value=value, source=Source.ASSUMED, note="from the profile")
