"""The ways a model could run on a machine, each with its memory and time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from autoflux.errors import ContradictoryWishes, DeviceUnavailable, UnknownName
from autoflux.hardware.values import Accelerator, DeviceKind, Hardware
from autoflux.models.values import Model, Precision
from autoflux.planning.footprint import Footprint, activations, footprint
from autoflux.planning.native import passing_bytes
from autoflux.planning.profiles import select_profile
from autoflux.planning.streaming import pinned_bytes, stream_layout
from autoflux.planning.timeline import Rates, Timeline, block_seconds, choose_rates, timeline
from autoflux.planning.values import Arrangement, ComponentPlan, Offload, Picture, Placement, Profile, Waiting, Wishes
from autoflux.units import format_bytes

MAX_BATCH = 16
"""Pictures drawn at once at most; beyond it latency grows and nothing is gained."""

TILES_MUST_GAIN = 1.05
"""How much longer a picture may take whole than decoded in tiles, before tiles are taken although whole would fit."""


@dataclass(frozen=True)
class Candidate:
    """One way to run, judged."""

    device: str
    kind: DeviceKind
    unified_memory: bool
    offload: Offload
    precision: Precision
    profile: Profile
    picture: Picture
    arrangement: Arrangement
    rates: Rates
    footprint: Footprint
    timeline: Timeline
    max_batch: int
    vram_limit_bytes: int | None
    ram_limit_bytes: int

    @property
    def preference(self) -> int:
        """Place of its precision in the profile's order; 0 is the best."""
        order = self.profile.precision
        return order.index(self.precision) if self.precision in order else 0

    @property
    def seconds_per_image(self) -> float:
        return self.timeline.image(self.picture)

    @property
    def missing_vram_bytes(self) -> int:
        """Device memory it needs beyond the limit; 0 or less when it fits."""
        return 0 if self.vram_limit_bytes is None else self.footprint.vram.peak - self.vram_limit_bytes

    @property
    def missing_bytes(self) -> int:
        """The larger of what is missing on the device and in RAM."""
        return max(self.missing_vram_bytes, self.footprint.ram_bytes - self.ram_limit_bytes)

    @property
    def fits(self) -> bool:
        return self.missing_bytes <= 0

    @property
    def shortfall(self) -> str:
        """Need against have, in words; empty when it fits."""
        if self.vram_limit_bytes is not None and self.missing_vram_bytes > 0:
            need, have = self.footprint.vram.peak, self.vram_limit_bytes
            return f"needs {format_bytes(need)} of device memory and may use {format_bytes(have)}"
        if self.footprint.ram_bytes > self.ram_limit_bytes:
            need, have = self.footprint.ram_bytes, self.ram_limit_bytes
            return f"needs {format_bytes(need)} of RAM and may use {format_bytes(have)}"
        return ""


def candidates(
    hardware: Hardware, model: Model, profiles: Sequence[Profile], wishes: Wishes, picture: Picture
) -> list[Candidate]:
    """All ways that the wishes leave open, fitting or not. Never empty.

    Raises:
        DeviceUnavailable: the wished device is not there.
        ContradictoryWishes: two wishes exclude each other.
        UnknownName: no profile of the wished name.
    """
    devices = _of_the_profile(_devices(hardware, wishes), profiles, wishes)
    sites = [_site(hardware, profiles, wishes, accelerator) for accelerator in devices]
    return [
        _candidate(hardware, model, site, precision, picture, offload)
        for site in sites
        for precision in _precisions(site, wishes)
        for offload in _offloads(site, wishes, model)
    ]


@dataclass(frozen=True)
class _Site:
    """A device with its profile and ceilings; `accelerator` is None for the CPU."""

    accelerator: Accelerator | None
    profile: Profile
    vram_limit_bytes: int | None
    ram_limit_bytes: int

    @property
    def kind(self) -> DeviceKind:
        return self.accelerator.kind if self.accelerator else DeviceKind.CPU

    @property
    def one_memory(self) -> bool:
        """Whether the device computes in the host's RAM."""
        return self.accelerator is None or self.accelerator.unified_memory

    def holds(self, need: Footprint) -> bool:
        fits_device = self.vram_limit_bytes is None or need.vram.peak <= self.vram_limit_bytes
        return fits_device and need.ram_bytes <= self.ram_limit_bytes


def _devices(hardware: Hardware, wishes: Wishes) -> list[Accelerator | None]:
    if wishes.device is None:
        return [*hardware.accelerators, None]
    kind_name, _, index = wishes.device.partition(":")
    if kind_name not in set(DeviceKind) or not (index.isdecimal() or not index):
        raise UnknownName("device", wishes.device, [*DeviceKind])
    kind = DeviceKind(kind_name)
    if kind == DeviceKind.CPU:
        return [None]
    accelerator = hardware.accelerator(kind, int(index or 0))
    if accelerator is None:
        raise _unavailable(hardware, wishes.device)
    return [accelerator]


def _site(hardware: Hardware, profiles: Sequence[Profile], wishes: Wishes, accelerator: Accelerator | None) -> _Site:
    profile = _profile(profiles, wishes, accelerator)
    vram_limit = None
    if accelerator:
        usable = accelerator.usable_bytes.value - profile.priors.reserve_bytes
        vram_limit = max(0, min(usable, wishes.vram_bytes or usable))
    available = max(0, hardware.host.available_bytes.value - profile.priors.ram_reserve_bytes)
    return _Site(accelerator, profile, vram_limit, min(available, wishes.ram_bytes or available))


def _of_the_profile(
    devices: list[Accelerator | None], profiles: Sequence[Profile], wishes: Wishes
) -> list[Accelerator | None]:
    """Those of the kind that the wished profile is for; all when none was wished."""
    if wishes.profile is None:
        return devices
    named = {p.name: p for p in profiles}
    if wishes.profile not in named:
        raise UnknownName("profile", wishes.profile, named, hint="`autoflux plugins` lists the profiles")
    kind = named[wishes.profile].match.kind
    matching = [a for a in devices if (a.kind if a else DeviceKind.CPU) == kind]
    if not matching:
        raise ContradictoryWishes(
            f"the profile {wishes.profile!r} is for {kind.value!r}, and no such device is to be used here",
            hint="drop --profile, or plan for another --device",
        )
    return matching


def _unavailable(hardware: Hardware, wished: str) -> DeviceUnavailable:
    present = [a.device for a in hardware.accelerators] + ["cpu"]
    why = next((f" ({p.message})" for p in hardware.problems if p.subject in ("cuda", "nvml", wished)), "")
    return DeviceUnavailable(
        f"the device {wished!r} is not on this machine; there is {', '.join(present)}{why}",
        hint="`autoflux doctor` says why a card is not seen; drop --device to let autoflux choose",
    )


def _profile(profiles: Sequence[Profile], wishes: Wishes, accelerator: Accelerator | None) -> Profile:
    if wishes.profile is None:
        if accelerator is None:
            return select_profile(profiles, DeviceKind.CPU)
        return select_profile(profiles, accelerator.kind, accelerator.capability, accelerator.name)
    return next(p for p in profiles if p.name == wishes.profile)


def _precisions(site: _Site, wishes: Wishes) -> Sequence[Precision]:
    return site.profile.precision if wishes.precision is None else (wishes.precision,)


def _offloads(site: _Site, wishes: Wishes, model: Model) -> Sequence[Offload]:
    if site.one_memory and wishes.offload not in (None, Offload.NONE):
        raise ContradictoryWishes(
            f"offload {wishes.offload.value!r} makes no sense on {site.kind.value!r}, whose memory is the host's own",
            hint="drop --offload or choose another --device",
        )
    if wishes.offload is not None:
        return (wishes.offload,)
    if site.one_memory:
        return (Offload.NONE,)
    streamable = bool(model.component("transformer").blocks)
    ours = (Offload.NONE, Offload.COMPONENT, Offload.STREAM)
    return ours if streamable else ours[:2]


def _candidate(
    hardware: Hardware, model: Model, site: _Site, precision: Precision, picture: Picture, offload: Offload
) -> Candidate:
    accelerator, priors = site.accelerator, site.profile.priors
    measured = accelerator.matmul_tflops if accelerator else hardware.host.matmul_tflops
    link = accelerator.link if accelerator else None
    rates = choose_rates(hardware, measured, link, precision, priors, pinned=offload == Offload.STREAM)
    held = _held(hardware, model, site, rates, precision, picture, offload)
    batches = {batch: _need(model, site, held, picture.replace(batch=batch)) for batch in range(1, MAX_BATCH + 1)}
    return Candidate(
        device=accelerator.device if accelerator else "cpu",
        kind=site.kind,
        unified_memory=bool(accelerator and accelerator.unified_memory),
        offload=offload,
        precision=precision,
        profile=site.profile,
        picture=picture,
        arrangement=held.arrangement,
        rates=held.rates,
        footprint=batches[1],
        timeline=timeline(model, held.arrangement, held.rates, priors, picture, streamed_step=held.seconds_per_step),
        max_batch=max((batch for batch, need in batches.items() if site.holds(need)), default=1),
        vram_limit_bytes=site.vram_limit_bytes,
        ram_limit_bytes=site.ram_limit_bytes,
    )


@dataclass(frozen=True)
class _Held:
    """Where the weights are, and what follows from that."""

    arrangement: Arrangement
    rates: Rates
    seconds_per_step: float | None = None


_PLACEMENTS = {
    Offload.NONE: Placement.DEVICE,
    Offload.COMPONENT: Placement.VISITING,
    Offload.STREAM: Placement.STREAMED,
    Offload.NATIVE: Placement.NATIVE,
}


def _held(
    hardware: Hardware,
    model: Model,
    site: _Site,
    rates: Rates,
    precision: Precision,
    picture: Picture,
    offload: Offload,
) -> _Held:
    components = tuple(
        ComponentPlan(name=c.name, storage=precision, arithmetic=precision, placement=_PLACEMENTS[offload])
        for c in model.components
    )
    if offload == Offload.NATIVE:
        return _native(model, site, rates, components, picture)
    if offload != Offload.STREAM:
        return _Held(Arrangement(components=components), rates)
    tried = [
        _streamed(model, site, _waiting_rates(hardware, rates, waiting), arrangement, picture)
        for waiting in Waiting
        for arrangement in _ways(components, waiting)
    ]
    fitting = [held for held in tried if _fits(hardware, model, site, held, picture)]
    if not fitting:
        return tried[0]
    return min(fitting, key=lambda held: _seconds_per_image(model, site, held, picture) * _handicap(held))


def _native(model: Model, site: _Site, rates: Rates, components: tuple[ComponentPlan, ...], picture: Picture) -> _Held:
    """As if the library copied all weights in each step, from memory that is not pinned, before it computes."""
    priors, transformer = site.profile.priors, model.component("transformer")
    working = activations(model, components, priors, picture, tile_decode=False).peak
    room = (site.vram_limit_bytes or 0) - priors.context_bytes - working - passing_bytes(model, components)
    copied = transformer.bytes_as(components[0].storage) / (rates.link_gb_per_s.value * 1e9)
    blocks = model.architecture.double_blocks + model.architecture.single_blocks
    seconds = copied + blocks * block_seconds(model, rates, priors, picture)
    return _Held(Arrangement(components=components, ring_bytes=max(0, room)), rates, seconds)


def _ways(components: tuple[ComponentPlan, ...], waiting: Waiting) -> Iterator[Arrangement]:
    plain = Arrangement(components=components, waiting=waiting)
    for tile in (False, True):
        for park in (False, True):
            yield plain.replace(tile_decode=tile, park_for_decode=park)


def _handicap(held: _Held) -> float:
    """Tiles meet in faint seams, so they have to be worth it."""
    return TILES_MUST_GAIN if held.arrangement.tile_decode else 1.0


def _fits(hardware: Hardware, model: Model, site: _Site, held: _Held, picture: Picture) -> bool:
    pinned = pinned_bytes(model, held.arrangement)
    return pinned <= hardware.host.pinnable_bytes.value and site.holds(_need(model, site, held, picture))


def _seconds_per_image(model: Model, site: _Site, held: _Held, picture: Picture) -> float:
    priors = site.profile.priors
    times = timeline(model, held.arrangement, held.rates, priors, picture, streamed_step=held.seconds_per_step)
    return times.image(picture)


def _waiting_rates(hardware: Hardware, rates: Rates, waiting: Waiting) -> Rates:
    """Copies run at the slowest part of their way, as reading ahead and copying go on at once."""
    slower = {
        Waiting.PINNED: None,
        Waiting.PAGEABLE: hardware.host.copy_gb_per_s,
        Waiting.DISK: rates.disk_gb_per_s,
    }[waiting]
    if slower is None or slower.value >= rates.link_gb_per_s.value:
        return rates
    return rates.replace(link_gb_per_s=slower)


def _need(model: Model, site: _Site, held: _Held, picture: Picture) -> Footprint:
    return footprint(model, held.arrangement, site.kind, site.profile.priors, picture, unified_memory=site.one_memory)


def _streamed(model: Model, site: _Site, rates: Rates, arrangement: Arrangement, picture: Picture) -> _Held:
    priors = site.profile.priors
    components = arrangement.components
    working = activations(model, components, priors, picture, tile_decode=arrangement.tile_decode)
    room = (site.vram_limit_bytes or 0) - priors.context_bytes
    # What is parked while a picture is decoded leaves its room to the decoder.
    beside = max(working.encode, working.denoise) if arrangement.park_for_decode else working.peak
    layout = stream_layout(
        model,
        components[0].storage,
        budget_bytes=room - beside,
        ring_limit_bytes=room - working.decode,
        block_seconds=block_seconds(model, rates, priors, picture),
        bytes_per_second=rates.link_gb_per_s.value * 1e9,
    )
    placed = tuple(c.replace(resident=layout.resident) if c.name == "transformer" else c for c in components)
    return _Held(arrangement.replace(components=placed, ring_bytes=layout.ring_bytes), rates, layout.seconds_per_step)
