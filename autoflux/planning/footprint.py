"""How much memory a way of running takes, by phase, before anything is loaded. Pure arithmetic."""

from __future__ import annotations

from autoflux.hardware.values import DeviceKind
from autoflux.models.values import Model
from autoflux.planning.activations import encode_activations, working_bytes
from autoflux.planning.native import on_device_bytes, ram_bytes
from autoflux.planning.streaming import arena_bytes, copied_modulation, stage_bytes, staying_bytes, streamed_bytes
from autoflux.planning.terms import Placement, Waiting
from autoflux.planning.values import Arrangement, ComponentPlan, PhaseBytes, Picture, Priors
from autoflux.planning.weights import component_bytes
from autoflux.values import Value

PHASE_OF = {"text_encoder": "encode", "text_encoder_2": "encode", "transformer": "denoise", "vae": "decode"}
"""In which phase each component runs."""

WIDE_BLOCKS = 2
"""That are in RAM while weights are narrowed: one is read, one is narrowed."""


class Footprint(Value, frozen=True, kw_only=True):
    """Bytes on the device by phase, and in RAM at the worst moment. On the CPU everything is RAM."""

    vram: PhaseBytes
    ram_bytes: int


def footprint(
    model: Model,
    arrangement: Arrangement,
    kind: DeviceKind,
    priors: Priors,
    picture: Picture,
    *,
    unified_memory: bool = False,
) -> Footprint:
    """What drawing a picture takes when the weights are arranged so.

    On a unified chip (`unified_memory`) weights lie in one place only, so they count as device memory and not as RAM.
    """
    weights = {c.name: component_bytes(model, c) for c in arrangement.components}
    arena = arena_bytes(model, arrangement)
    working = working_bytes(model, arrangement, priors, picture)
    phases = PhaseBytes(
        encode=_held(model, arrangement, weights, "encode") + arena + working.encode,
        denoise=_held(model, arrangement, weights, "denoise") + arena + working.denoise,
        decode=_held(model, arrangement, weights, "decode")
        + (arrangement.ring_bytes if arrangement.park_for_decode else arena)
        + working.decode,
    )
    process = priors.host_bytes + (priors.compiler_bytes if arrangement.compiled else 0)
    if kind == DeviceKind.CPU:
        nothing = PhaseBytes(encode=0, denoise=0, decode=0)
        return Footprint(vram=nothing, ram_bytes=process + phases.peak)
    on_device = PhaseBytes(
        encode=phases.encode + priors.context_bytes,
        denoise=phases.denoise + priors.context_bytes,
        decode=phases.decode + priors.context_bytes,
    )
    if unified_memory:
        return Footprint(vram=on_device + _on_host(model, arrangement, picture), ram_bytes=process)
    return Footprint(vram=on_device, ram_bytes=process + _in_ram(model, arrangement, picture))


def _on_host(model: Model, arrangement: Arrangement, picture: Picture) -> PhaseBytes:
    """What the processor takes of the one memory by phase, for the components that it computes."""
    left = [component for component in arrangement.components if component.placement == Placement.HOST]
    weights = sum(component_bytes(model, component) for component in left)
    encoding = _encoded_on_host(model, arrangement, picture)
    return PhaseBytes(encode=weights + encoding, denoise=weights, decode=weights)


def _encoded_on_host(model: Model, arrangement: Arrangement, picture: Picture) -> int:
    """Bytes that an encode takes if the processor computes it."""
    on_host = arrangement.component("text_encoder_2").placement == Placement.HOST
    return encode_activations(model, arrangement, picture) if on_host else 0


def _in_ram(model: Model, arrangement: Arrangement, picture: Picture) -> int:
    """At the worst moment: when all is loaded, and the processor encodes if it is to; or while a component is read in
    the width of its files, or when what is read straight to where it waits, as the last to be read, joins the others.
    """
    components = [arrangement.component(c.name) for c in model.in_loading_order]
    kept = {c.name: _kept_in_ram(model, arrangement, c) for c in components}
    stage = stage_bytes(model, arrangement, [c for c in arrangement.streamed if c.waiting != Waiting.PINNED])
    peak, loaded, last = sum(kept.values()) + stage + _encoded_on_host(model, arrangement, picture), 0, 0
    for component in components:
        peak = max(peak, loaded + _read_bytes(model, component))
        streamed = component.placement == Placement.STREAMED
        if streamed and component.packed_bytes:
            last += kept[component.name]
        elif streamed and component.is_narrow:  # whole, until blocks are where they stay
            loaded += component_bytes(model, component)
        else:
            loaded += kept[component.name]
    return max(peak, loaded + last) + ram_bytes(model, components)


def _kept_in_ram(model: Model, arrangement: Arrangement, planned: ComponentPlan) -> int:
    if planned.placement in (Placement.VISITING, Placement.HOST):
        return component_bytes(model, planned)
    if planned.placement != Placement.STREAMED or planned.waiting == Waiting.DISK:
        return 0
    if planned.name != "transformer":
        return component_bytes(model, planned)
    staying = staying_bytes(model, arrangement) if arrangement.park_for_decode else 0
    return streamed_bytes(model, arrangement) + copied_modulation(model, arrangement) + staying


def _read_bytes(model: Model, planned: ComponentPlan) -> int:
    """RAM for a component as it is read, before it moves to where it will be. Blocks are made narrow one by one, while
    the next is read."""
    on_disk = planned.placement == Placement.STREAMED and planned.waiting == Waiting.DISK
    if on_disk or planned.placement == Placement.NATIVE:  # whose own count includes it
        return 0
    if planned.packed_bytes:
        # Read to where it will be. The buffers through which a device gets its own are gone when the first picture
        # makes the process as large as it will be: on an H100 and an H200 it took no more with them
        # (benchmarks/planning.py).
        waits = planned.placement == Placement.STREAMED and not planned.resident
        return component_bytes(model, planned) if waits and planned.waiting == Waiting.PAGEABLE else 0
    component = model.component(planned.name)
    if planned.is_narrow:
        largest = max(block.parameters.total for block in component.blocks) * planned.arithmetic.item_bytes
        return component_bytes(model, planned) + WIDE_BLOCKS * largest
    return component.bytes_as(planned.arithmetic)


def _held(model: Model, arrangement: Arrangement, weights: dict[str, int], phase: str) -> int:
    ours = sum(
        weights[c.name]
        for c in arrangement.components
        if c.placement == Placement.DEVICE or (c.placement == Placement.VISITING and PHASE_OF[c.name] == phase)
    )
    return ours + on_device_bytes(model, arrangement, [name for name in PHASE_OF if PHASE_OF[name] == phase])
