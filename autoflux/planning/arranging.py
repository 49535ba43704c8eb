"""Where the weights go in one way of running: the fastest arrangement that fits, or the one that lacks least."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from autoflux.errors import ContradictoryWishes, UnknownName
from autoflux.hardware.values import Figure, Hardware
from autoflux.models.values import Model
from autoflux.planning.activations import working_bytes
from autoflux.planning.native import passing_bytes
from autoflux.planning.sites import Site
from autoflux.planning.speed import Rates, Way, all_blocks_seconds, assumed, block_seconds, choose_rates
from autoflux.planning.streaming import Room, block_bytes_of, hoists, modulation_bytes, pinned_bytes, stream_layout
from autoflux.planning.terms import TRANSFORMER, Offload, Placement, Quality, TransferUnit, Waiting
from autoflux.planning.timeline import copy_gb_per_s, timeline
from autoflux.planning.values import Arrangement, ComponentPlan, Picture, Wishes
from autoflux.planning.ways import Option, wished_attention

PLACEMENTS = {
    Offload.NONE: Placement.DEVICE,
    Offload.COMPONENT: Placement.VISITING,
    Offload.STREAM: Placement.STREAMED,
    Offload.NATIVE: Placement.NATIVE,
}

WAITINGS = (
    (Waiting.PINNED, Waiting.PINNED),
    (Waiting.PINNED, Waiting.DISK),
    (Waiting.PAGEABLE, Waiting.PAGEABLE),
    (Waiting.PAGEABLE, Waiting.DISK),
    (Waiting.DISK, Waiting.DISK),
)
"""Where the transformer waits and where the others do."""

OTHERS: dict[str, tuple[Placement, ...]] = {
    "vae": (Placement.STREAMED, Placement.DEVICE),
    "text_encoder": (Placement.STREAMED, Placement.DEVICE),
    "text_encoder_2": (Placement.STREAMED, Placement.DEVICE, Placement.HOST),
}
"""Where components may be beside a streamed transformer, in the order that is tried. To leave CLIP or the decoder to
the processor is for the user to wish: the one would save a hundredth of a second, the other takes minutes."""

HOST_TFLOPS = 0.1
"""Assumed of a processor that was not measured: two cores with AVX2, as in the profile 'cpu'."""


@dataclass(frozen=True)
class Held:
    """Where the weights are, and what follows from that."""

    arrangement: Arrangement
    rates: Rates
    seconds_per_step: float | None = None

    @property
    def decoding(self) -> tuple[bool, bool]:
        """How pictures are decoded: in tiles or whole, with what stays parked or there."""
        return self.arrangement.tile_decode, self.arrangement.park_for_decode


@dataclass(frozen=True)
class _Task:
    """What is to be arranged."""

    hardware: Hardware
    model: Model
    site: Site
    way: Way
    picture: Picture
    wishes: Wishes
    rates: Rates

    def fits(self, held: Held) -> bool:
        return self.missing_bytes(held) <= 0

    def missing_bytes(self, held: Held) -> int:
        """What it needs beyond the ceilings, of device memory, of RAM, or of what can be pinned."""
        site = self.site
        need = site.need(self.model, held.arrangement, self.picture)
        vram = 0 if site.vram_limit_bytes is None else need.vram.peak - site.vram_limit_bytes
        pinned = pinned_bytes(self.model, held.arrangement) - self.hardware.host.pinnable_bytes.value
        return max(vram, need.ram_bytes - site.ram_limit_bytes, pinned)

    def preference(self, held: Held) -> tuple[float, bool, bool]:
        """What is to be least: seconds of a picture; of equals whole pictures are decoded rather than tiles, and with
        everything in its place."""
        return self.seconds(held), held.arrangement.tile_decode, held.arrangement.park_for_decode

    def seconds(self, held: Held) -> float:
        """Of a picture."""
        times = timeline(
            self.model,
            held.arrangement,
            held.rates,
            self.site.profile.priors,
            self.picture,
            self.way,
            streamed_step=held.seconds_per_step,
        )
        return times.image(self.picture)


def arrange(
    hardware: Hardware,
    model: Model,
    site: Site,
    option: Option,
    picture: Picture,
    wishes: Wishes,
    arrangement: Arrangement | None = None,
) -> Held:
    """The fastest arrangement that fits; if none does, the one that lacks least.

    With an `arrangement` of streamed weights it is that one, with the ring and the blocks that stay chosen for it.

    Raises:
        UnknownName: a wish names a component that the model has not.
        ContradictoryWishes: one asks for the transformer on the processor, or for what only streaming does.
    """
    _check_names(model, wishes)
    rates = rates_for(hardware, site, option, wishes)
    task = _Task(hardware, model, site, option.way, picture, wishes, rates)
    if arrangement is not None:
        return _streamed(task, arrangement)
    components = tuple(_planned(task, option, c.name) for c in model.components)
    plain = Arrangement(components=components, compiled=option.way.compiled, graphs=option.way.graphs)
    if option.offload == Offload.NATIVE:
        return _native(task, plain)
    if option.offload != Offload.STREAM:
        return Held(plain, rates)
    tried: list[Held] = []
    for unit in _units(task):
        tried.append(_in_units(task, plain.replace(unit=unit, block_bytes=wishes.block_bytes or 0)))
        if task.fits(tried[-1]) and all_stay(model, tried[-1].arrangement):
            break
    return min(tried, key=lambda held: (max(0, task.missing_bytes(held)), task.preference(held)))


def _units(task: _Task) -> Sequence[TransferUnit]:
    """What one copy may move. Only of whole blocks in their own format is there another way to bring their layers."""
    wishes, way = task.wishes, task.way
    if wishes.unit:
        return (wishes.unit,)
    whole = wishes.block_bytes or TRANSFORMER in wishes.keep or way.is_narrow or way.compiled or way.graphs
    return (TransferUnit.BLOCK,) if whole else (TransferUnit.BLOCK, TransferUnit.LAYER)


def _in_units(task: _Task, plain: Arrangement) -> Held:
    """The fastest arrangement that fits and moves such units; if none does, the one that lacks least."""
    found = _streaming(task, plain)
    for easier in _easier(plain):
        if task.fits(found[0]):
            break
        found = min(found, _streaming(task, easier), key=lambda tried: task.missing_bytes(tried[0]))
    if not task.fits(found[0]):
        return found[0]
    return min((_with_others_elsewhere(task, held) for held in found), key=task.preference)


def _easier(plain: Arrangement) -> Iterator[Arrangement]:
    """What takes less room on the device, encoding left to the processor; and what takes less RAM, others there."""
    free = [name for name in OTHERS if plain.component(name).placement == Placement.STREAMED]
    if "text_encoder_2" in free:
        yield placed(plain, "text_encoder_2", Placement.HOST)
    for name in free:
        plain = placed(plain, name, Placement.DEVICE)
        yield plain


def placed(
    arrangement: Arrangement, name: str, placement: Placement, streamed: Waiting = Waiting.PINNED
) -> Arrangement:
    """With that component elsewhere; `streamed` is where it waits if it streams."""
    waiting = streamed if placement == Placement.STREAMED else Waiting.PINNED
    components = (
        c.replace(placement=placement, waiting=waiting) if c.name == name else c for c in arrangement.components
    )
    return arrangement.replace(components=tuple(components))


def _check_names(model: Model, wishes: Wishes) -> None:
    names = [component.name for component in model.components]
    for name in (*wishes.keep, *wishes.cpu):
        if name not in names:
            raise UnknownName("component", name, names)
    if TRANSFORMER in wishes.cpu:
        raise ContradictoryWishes(
            "the transformer computes on the device and cannot be left to the processor alone",
            hint="use --device cpu for everything",
        )
    if TRANSFORMER in wishes.keep and wishes.offload in (Offload.COMPONENT, Offload.NATIVE):
        raise ContradictoryWishes(
            f"--keep transformer and --offload {wishes.offload} exclude each other",
            hint="drop one; as many of its blocks stay as fit",
        )
    if both := set(wishes.keep) & set(wishes.cpu):
        raise ContradictoryWishes(f"{min(both)!r} is to be kept on the device and left to the processor")


def rates_for(hardware: Hardware, site: Site, option: Option, wishes: Wishes) -> Rates:
    """What is measured of a site, for one way of running, and what runs say to it."""
    priors, accelerator, host = site.profile.priors, site.accelerator, hardware.host
    pinned = option.offload == Offload.STREAM
    link = accelerator.link.to_device_gb_per_s(pinned=pinned) if accelerator and accelerator.link else None
    # Of others the fastest: processors widen what they cannot multiply.
    fastest = max(host.matmul_tflops.values(), key=lambda rate: rate.value, default=assumed(HOST_TFLOPS))
    others: dict[str, Figure] = {
        "link_gb_per_s": link or assumed(priors.link_gb_per_s),
        "disk_gb_per_s": hardware.disk.read_gb_per_s or assumed(priors.disk_gb_per_s),
        "host_tflops": host.matmul_tflops.get(option.way.arithmetic.value) or fastest,
    }
    if host.copy_gb_per_s:
        others["host_copy_gb_per_s"] = host.copy_gb_per_s
    rates = choose_rates(accelerator or host, option.way, priors, wished_attention(wishes), **others)
    if site.calibration is None:
        return rates
    correction = site.calibration.correction(site.device, option.offload, option.way, rates.attention)
    return rates.replace(correction=correction)


def _planned(task: _Task, option: Option, name: str) -> ComponentPlan:
    placement = PLACEMENTS[option.offload]
    # Blocks that stay are those of a streamed transformer.
    if name in task.wishes.keep and not (name == TRANSFORMER and option.offload == Offload.STREAM):
        placement = Placement.DEVICE
    if name in task.wishes.cpu and task.site.accelerator:
        placement = Placement.HOST
    narrow = name == TRANSFORMER and task.way.is_narrow
    planned = ComponentPlan(
        name=name,
        storage=task.way.storage if narrow else task.way.arithmetic,
        arithmetic=task.way.arithmetic,
        native=narrow and task.way.native,
        placement=placement,
    )
    pack = task.site.packs.used_for(planned)
    return planned.replace(packed_bytes=pack.nbytes) if pack else planned


def _native(task: _Task, plain: Arrangement) -> Held:
    """As if the library copied all weights in each step, from memory that is not pinned, before it computes."""
    model, priors = task.model, task.site.profile.priors
    working = working_bytes(model, plain, priors, task.picture).peak
    room = (task.site.vram_limit_bytes or 0) - priors.context_bytes - working - passing_bytes(model, plain.components)
    copied = model.component(TRANSFORMER).bytes_as(task.way.storage) / (task.rates.link_gb_per_s.value * 1e9)
    computed = all_blocks_seconds(model, task.rates, priors, task.picture, task.way)
    return Held(plain.replace(ring_bytes=max(0, room)), task.rates, copied + computed)


def _streaming(task: _Task, plain: Arrangement) -> list[Held]:
    """What fits: of each way to decode the fastest, over all places to wait; or else the one that lacks least.

    The first places to wait that fit are the fastest, but for the second, and but for decodes in tiles: whole ones may
    have room where others wait.
    """
    lacking: list[Held] = []
    fitting: list[Held] = []
    for waiting in _waitings(task):
        tried = [_streamed(task, arrangement) for arrangement in _decodings(task, _waiting(plain, *waiting))]
        fits = [held for held in tried if task.fits(held)]
        fitting += fits
        lacking += tried
        if waiting != WAITINGS[1] and any(not held.arrangement.tile_decode for held in fits):
            break
    if not fitting:
        return [min(lacking, key=task.missing_bytes)]
    fitting.sort(key=task.preference)
    return list({held.decoding: held for held in reversed(fitting)}.values())


def _waitings(task: _Task) -> Sequence[tuple[Waiting, Waiting]]:
    # What is made narrow as it is loaded cannot stay in its files, but for those of a pack.
    way = task.way
    stays = not way.is_narrow or task.site.packs.find(TRANSFORMER, way.storage, way.arithmetic)
    return [pair for pair in WAITINGS if stays or pair[0] != Waiting.DISK]


def _waiting(plain: Arrangement, transformer: Waiting, others: Waiting) -> Arrangement:
    components = (
        c.replace(waiting=transformer if c.name == TRANSFORMER else others) if c.placement == Placement.STREAMED else c
        for c in plain.components
    )
    return plain.replace(components=tuple(components))


def _decodings(task: _Task, plain: Arrangement) -> Iterator[Arrangement]:
    """Whole or in tiles, with what stays there meanwhile or parked."""
    exact = task.wishes.quality == Quality.EXACT
    for tile, park in product((False, True), repeat=2):
        arrangement = plain.replace(tile_decode=tile, park_for_decode=park)
        if tile and exact and _decodes_whole(task, plain):
            continue  # tiles meet in faint seams
        yield arrangement


def _decodes_whole(task: _Task, plain: Arrangement) -> bool:
    return task.fits(_streamed(task, plain.replace(park_for_decode=True)))


def _streamed(task: _Task, arrangement: Arrangement) -> Held:
    model, site, priors = task.model, task.site, task.site.profile.priors
    working = working_bytes(model, arrangement, priors, task.picture)
    staying = sum(
        model.component(c.name).bytes_as(c.storage) for c in arrangement.components if c.placement == Placement.DEVICE
    )
    room = (site.vram_limit_bytes or 0) - priors.context_bytes - staying
    # What is parked while a picture is decoded leaves its room to the decoder.
    beside = max(working.encode, working.denoise) if arrangement.park_for_decode else working.peak
    waiting = arrangement.component(TRANSFORMER).waiting
    layout = stream_layout(
        model,
        arrangement,
        Room(room - beside, room - working.decode),
        picture=task.picture,
        seconds=block_seconds(model, task.rates, priors, task.picture, task.way),
        pause=priors.pause_seconds,
        bytes_per_second=copy_gb_per_s(waiting, task.rates) * 1e9,
        all_stay=TRANSFORMER in task.wishes.keep,
    )
    placed = tuple(c.replace(resident=layout.resident) if c.name == TRANSFORMER else c for c in arrangement.components)
    made = arrangement.replace(components=placed, ring_bytes=layout.ring_bytes)
    return Held(made, task.rates, layout.seconds_per_step)


def _with_others_elsewhere(task: _Task, found: Held) -> Held:
    """Keep what streams once a picture on the device, or leave it to the processor, if a picture gets faster for it.

    Of the modulation and the other components, whichever comes first may take the room of the rest.
    """
    last = _with_modulation_there(task, _with_components_elsewhere(task, found))
    first = _with_modulation_there(task, found)
    if first is found:
        return last
    return min(last, _with_components_elsewhere(task, first), key=task.preference)


def _with_modulation_there(task: _Task, found: Held) -> Held:
    blocks = sum(block_bytes_of(task.model, found.arrangement.component(TRANSFORMER)))
    whole = blocks + modulation_bytes(task.model, found.arrangement)
    if not hoists(found.arrangement) or whole > (task.site.vram_limit_bytes or 0):
        return found
    held = _streamed(task, found.arrangement.replace(keep_modulation=True))
    return held if _is_sound(task, held) and task.seconds(held) < task.seconds(found) else found


def _is_sound(task: _Task, held: Held) -> bool:
    """Whether it fits, and no block is streamed in each step to make room for what is copied once a picture."""
    return task.fits(held) and (not held.arrangement.keep_modulation or all_stay(task.model, held.arrangement))


def _with_components_elsewhere(task: _Task, found: Held) -> Held:
    """Move one after the other as long as that helps: where one is best depends on where the others are."""
    waits = {c.name: c.waiting for c in found.arrangement.streamed if c.name in OTHERS}
    best, seconds, tried = found, task.seconds(found), {_places(found.arrangement)}
    moves = [(name, placement) for name in waits for placement in OTHERS[name]]
    improved = True
    while improved:
        improved = False
        for name, placement in moves:
            arrangement = placed(best.arrangement, name, placement, waits[name])
            if (places := _places(arrangement)) in tried:
                continue
            tried.add(places)
            held = _streamed(task, arrangement)
            if _is_sound(task, held) and task.seconds(held) < seconds:
                best, seconds, improved = held, task.seconds(held), True
    return best


def _places(arrangement: Arrangement) -> tuple[Placement, ...]:
    return tuple(c.placement for c in arrangement.components)


def all_stay(model: Model, arrangement: Arrangement) -> bool:
    """Whether no block of the transformer is streamed in a step."""
    planned = arrangement.component(TRANSFORMER)
    return len(planned.resident) == len(block_bytes_of(model, planned))
