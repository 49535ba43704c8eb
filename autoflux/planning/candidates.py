"""The ways a model could run on a machine, each with its memory and time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from autoflux.errors import ContradictoryWishes
from autoflux.hardware.values import DeviceKind, Hardware
from autoflux.models.values import Model, Precision
from autoflux.planning.arranging import Held, arrange, rates_for
from autoflux.planning.calibration import Setting
from autoflux.planning.findings import NO_FINDINGS, Findings
from autoflux.planning.footprint import Footprint
from autoflux.planning.sites import Site, sites
from autoflux.planning.speed import Rates, Way, block_seconds
from autoflux.planning.streaming import hoists, pinned_bytes
from autoflux.planning.terms import DEFAULT_ATTENTION, Offload, Quality
from autoflux.planning.timeline import Timeline, timeline
from autoflux.planning.values import Arrangement, Picture, Profile, Wishes
from autoflux.planning.ways import Option, options
from autoflux.units import told_apart

MAX_BATCH = 16
"""Pictures drawn at once at most; beyond it latency grows and nothing is gained."""

PICTURES = 100
"""Over how many pictures the time to start is spread, if the user does not say how many are to be drawn."""


WORTH_GRAPHS = 1.03
"""How many times as long blocks must take launched as replayed for graphs to be looked at: they cost memory and the
first two steps of a picture size, and predictions are no more exact than that."""

HOST_AHEAD = 2.0
"""How much less time a picture must be predicted to take on the processor than on an accelerator for it to be taken.
Predictions that never met a run have been up to that wrong for small models, and a machine's other work needs its
processor, not its accelerator."""


@dataclass(frozen=True)
class Candidate:
    """One way to run, judged."""

    site: Site
    offload: Offload
    way: Way
    picture: Picture
    arrangement: Arrangement
    rates: Rates
    footprint: Footprint
    timeline: Timeline
    max_batch: int
    pictures: int
    pinned_bytes: int
    pinnable_bytes: int
    quality: Quality
    """How far it goes: exact if nothing in it changes bits, or nothing but tiles where no whole decode fits."""

    @property
    def device(self) -> str:
        return self.site.device

    @property
    def kind(self) -> DeviceKind:
        return self.site.kind

    @property
    def profile(self) -> Profile:
        return self.site.profile

    @property
    def precision(self) -> Precision:
        """Of the transformer's blocks."""
        return self.way.storage

    @property
    def preference(self) -> int:
        """Place of its arithmetic in the profile's order; 0 is the best."""
        order = self.profile.precision
        return order.index(self.way.arithmetic) if self.way.arithmetic in order else 0

    def setting(self, backend: str) -> Setting:
        """What tells it from others, when that backend builds it."""
        return Setting(
            device=self.device,
            backend=backend,
            offload=self.offload,
            way=self.way,
            attention=self.rates.attention,
            unit=self.arrangement.unit,
        )

    @property
    def seconds_per_image(self) -> float:
        return self.timeline.image(self.picture)

    @property
    def option(self) -> Option:
        """How it holds the weights and computes with them."""
        return Option(self.offload, self.way)

    @property
    def cost(self) -> tuple[float, bool, int, int]:
        """What is to be least: seconds of a picture with its share of the start; then modulation in each step, whose
        weights a device reads in a hundredth of it, and memory."""
        seconds = self.seconds_per_image + self.timeline.start / self.pictures
        # Sums of the same seconds in another order differ by less.
        return round(seconds, 6), not hoists(self.arrangement), self.footprint.vram.peak, self.footprint.ram_bytes

    @property
    def missing_vram_bytes(self) -> int:
        """Device memory it needs beyond the limit; 0 or less when it fits."""
        limit = self.site.vram_limit_bytes
        return 0 if limit is None else self.footprint.vram.peak - limit

    @property
    def missing_bytes(self) -> int:
        """The largest of what is missing on the device, in RAM, and of what can be pinned."""
        ram = self.footprint.ram_bytes - self.site.ram_limit_bytes
        return max(self.missing_vram_bytes, ram, self.pinned_bytes - self.pinnable_bytes)

    @property
    def fits(self) -> bool:
        return self.missing_bytes <= 0

    @property
    def shortfall(self) -> str:
        """Need against have, in words; empty when it fits."""
        limit = self.site.vram_limit_bytes
        if limit is not None and self.missing_vram_bytes > 0:
            need = self.footprint.vram.peak
            needed, allowed = told_apart(need, limit)
            return f"needs {needed} of device memory and may use {allowed}"
        if self.footprint.ram_bytes > self.site.ram_limit_bytes:
            needed, allowed = told_apart(self.footprint.ram_bytes, self.site.ram_limit_bytes)
            return f"needs {needed} of RAM and may use {allowed}"
        if self.pinned_bytes > self.pinnable_bytes:
            needed, allowed = told_apart(self.pinned_bytes, self.pinnable_bytes)
            return f"needs {needed} of pinned RAM and may pin {allowed}"
        return ""


def candidates(
    hardware: Hardware,
    model: Model,
    profiles: Sequence[Profile],
    wishes: Wishes,
    picture: Picture,
    findings: Findings = NO_FINDINGS,
    *,
    every: bool = False,
) -> Iterator[Candidate]:
    """All ways that the wishes leave open, fitting or not, on the devices that can do what is wished. Never empty.

    Each is judged when it is asked for: to judge one takes longer than all before it.

    The calibration found is that of one backend. Of those that differ only in how fast blocks compute the fastest, or
    `every` one.

    Raises:
        DeviceUnavailable: the wished device is not there.
        ContradictoryWishes: two wishes exclude each other, or on every device.
        UnknownName: no profile or component of the wished name.
    """
    for site, ways in _possible(hardware, model, sites(hardware, profiles, wishes, findings), wishes):
        for option in _worth_judging(hardware, model, site, picture, wishes, ways, every=every):
            yield judge(hardware, model, site, option, picture, wishes)


def _possible(
    hardware: Hardware, model: Model, places: Sequence[Site], wishes: Wishes
) -> list[tuple[Site, list[Option]]]:
    """The devices that can do what is wished, with all their ways to do it."""
    found: list[tuple[Site, list[Option]]] = []
    refusals: list[ContradictoryWishes] = []
    for site in places:
        try:
            found.append((site, options(hardware, site, wishes, model)))
        except ContradictoryWishes as refusal:
            refusals.append(refusal)
    if not found:
        raise refusals[0]
    return found


def _worth_judging(
    hardware: Hardware,
    model: Model,
    site: Site,
    picture: Picture,
    wishes: Wishes,
    ways: Sequence[Option],
    *,
    every: bool,
) -> Iterator[Option]:
    """Of the ways that differ in nothing but how fast blocks compute, only the fastest, or `every` one; of equals the
    first. Graphs are left out where the device does not wait for launches.

    Weights that are packed can wait where others cannot. Ways that have proved themselves in runs stay, however they
    are predicted.
    """

    def seconds(option: Option) -> float:
        rates = rates_for(hardware, site, option, wishes)
        return sum(block_seconds(model, rates, site.profile.priors, picture, option.way).values())

    def size(option: Option) -> tuple[str, ...]:
        way = option.way
        packed = site.packs.find("transformer", way.storage, way.arithmetic) is not None
        narrow = str(way.storage.item_bytes)
        return option.offload, way.arithmetic, narrow, str(way.compiled), str(way.graphs), str(packed)

    def is_idle(option: Option) -> bool:
        launched = option._replace(way=option.way.replace(graphs=False))
        if not option.way.graphs or launched not in ways or _is_proven(site, option):
            return False
        return seconds(launched) <= WORTH_GRAPHS * seconds(option)

    left = [option for option in ways if not is_idle(option)]
    for kind in dict.fromkeys(map(size, left)):
        alike = [option for option in left if size(option) == kind]
        fastest = min(alike, key=seconds)
        yield from (option for option in alike if every or option == fastest or _is_proven(site, option))


def _is_proven(site: Site, option: Option) -> bool:
    proven = site.calibration.proven if site.calibration else ()
    return (site.device, *option) in {(setting.device, setting.offload, setting.way) for setting in proven}


def judge(
    hardware: Hardware,
    model: Model,
    site: Site,
    option: Option,
    picture: Picture,
    wishes: Wishes,
    arrangement: Arrangement | None = None,
) -> Candidate:
    """Arrange the weights as well as can be, or as in `arrangement`, and say what that takes. Raises as `arrange`."""
    held = arrange(hardware, model, site, option, picture, wishes, arrangement)
    return Candidate(
        site=site,
        offload=option.offload,
        way=option.way,
        picture=picture,
        arrangement=held.arrangement,
        rates=held.rates,
        footprint=site.need(model, held.arrangement, picture),
        timeline=timeline(
            model,
            held.arrangement,
            held.rates,
            site.profile.priors,
            picture,
            option.way,
            streamed_step=held.seconds_per_step,
        ),
        max_batch=_max_batch(model, site, held, picture),
        pictures=wishes.pictures or PICTURES,
        pinned_bytes=pinned_bytes(model, held.arrangement),
        pinnable_bytes=hardware.host.pinnable_bytes.value,
        quality=_quality(option, held, wishes),
    )


def _quality(option: Option, held: Held, wishes: Wishes) -> Quality:
    same_bits = not (option.way.is_narrow or option.way.compiled) and held.rates.attention == DEFAULT_ATTENTION
    whole = not held.arrangement.tile_decode or wishes.quality == Quality.EXACT
    return Quality.EXACT if same_bits and whole else Quality.BALANCED


def _max_batch(model: Model, site: Site, held: Held, picture: Picture) -> int:
    batches = range(picture.batch, MAX_BATCH + 1)
    fitting = (b for b in batches if site.holds(site.need(model, held.arrangement, picture.replace(batch=b))))
    return max(fitting, default=picture.batch)
