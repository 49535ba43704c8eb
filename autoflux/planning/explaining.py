"""What each choice of a plan is worth: the next best to it, and what a plan with that would take. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from autoflux.hardware.values import Hardware
from autoflux.models.values import Model
from autoflux.planning.arranging import OTHERS, placed
from autoflux.planning.backends import ChosenBackend
from autoflux.planning.candidates import Candidate, judge
from autoflux.planning.reasons import decoding, weights, yes
from autoflux.planning.terms import Offload, Origin, Placement, Quality, TransferUnit
from autoflux.planning.values import Arrangement, Choice, Instead, Wishes
from autoflux.planning.ways import Option
from autoflux.units import GB, format_bytes

Rival = tuple[str, Candidate]
"""Another value of a choice, and the best way to run with it."""

JOINED_BYTES = GB
"""Blocks that are copied together, where that is the alternative."""

PLACES = {
    Placement.DEVICE: "on the device",
    Placement.STREAMED: "streamed",
    Placement.HOST: "computed by the processor",
}


def explained(
    hardware: Hardware,
    model: Model,
    wishes: Wishes,
    best: Candidate,
    others: Sequence[Candidate],
    made: Iterable[Choice],
    backend: ChosenBackend,
) -> tuple[Choice, ...]:
    """The choices with the next best to each, as that backend builds it.

    What the user wished has none, nor has what has no other value.
    """
    rivals = _Rivals(hardware, model, wishes, best, others)
    return tuple(
        choice if choice.origin == Origin.WISH else choice.replace(instead=_next_best(rivals.of(choice.topic), backend))
        for choice in made
    )


def _next_best(rivals: Iterable[Rival], backend: ChosenBackend) -> Instead | None:
    """The fastest that fits, or else what lacks least."""
    found = min(rivals, key=lambda rival: (max(0, rival[1].missing_bytes), rival[1].cost), default=None)
    if found is None:
        return None
    value, candidate = found
    return Instead(
        value=value,
        seconds_per_step=candidate.timeline.step,
        seconds_per_image=candidate.seconds_per_image,
        seconds_to_start=candidate.timeline.start + backend.start_seconds,
        peak_vram_bytes=candidate.footprint.vram.peak,
        peak_ram_bytes=candidate.footprint.ram_bytes,
        lacks=candidate.shortfall,
    )


@dataclass(frozen=True)
class _Rivals:
    """Other ways to run that differ from the best in one choice."""

    hardware: Hardware
    model: Model
    wishes: Wishes
    best: Candidate
    others: Sequence[Candidate]

    def of(self, topic: str) -> Iterable[Rival]:
        """With another value for that choice."""
        ways: Mapping[str, Callable[[], Iterable[Rival]]] = {
            "device": self._devices,
            "precision": self._precisions,
            "weights": self._weights,
            "offload": self._offloads,
            "compiling": self._compiling,
            "CUDA graphs": self._graphs,
            "attention": self._attentions,
            "block size": self._block_sizes,
            "decode": self._decodings,
        }
        if topic in ways:
            return ways[topic]()
        named = topic in [component.name for component in self.model.components]
        return self._places(topic) if named else ()

    @property
    def _here(self) -> list[Candidate]:
        return [c for c in self.others if c.device == self.best.device]

    @property
    def _alike(self) -> list[Candidate]:
        """On the same device with the same strategy."""
        return [c for c in self._here if c.offload == self.best.offload]

    def _devices(self) -> Iterator[Rival]:
        return ((c.device, c) for c in self.others if c.device != self.best.device)

    def _precisions(self) -> Iterator[Rival]:
        arithmetic = self.best.way.arithmetic
        return ((c.way.arithmetic.value, c) for c in self._here if c.way.arithmetic != arithmetic)

    def _weights(self) -> Iterator[Rival]:
        return ((weights(c), c) for c in self._alike if weights(c) != weights(self.best))

    def _offloads(self) -> Iterator[Rival]:
        return ((c.offload.value, c) for c in self._here if c.offload != self.best.offload)

    def _compiling(self) -> Iterator[Rival]:
        other = self.best.way.replace(compiled=not self.best.way.compiled)
        return ((yes(c.way.compiled), c) for c in self._alike if c.way.replace(graphs=other.graphs) == other)

    def _graphs(self) -> Iterator[Rival]:
        best = self.best
        if best.arrangement.unit != TransferUnit.LAYER:
            other = Option(best.offload, best.way.replace(graphs=not best.way.graphs))
            judged = judge(self.hardware, self.model, best.site, other, best.picture, self.wishes)
            yield yes(other.way.graphs), judged

    def _attentions(self) -> Iterator[Rival]:
        accelerator = self.best.site.accelerator
        for name in accelerator.attention_tflops if accelerator else ():
            if name != self.best.rates.attention:
                yield name, self._judged(self.wishes.replace(attention=name))

    def _block_sizes(self) -> Iterator[Rival]:
        way, plain = self.best.way, self.wishes.replace(unit=None, block_bytes=None)
        unit = self.best.arrangement.unit
        if unit == TransferUnit.LAYER:
            yield "a block", self._judged(plain.replace(unit=TransferUnit.BLOCK))
            return
        yield f"blocks up to {format_bytes(JOINED_BYTES)}", self._judged(plain.replace(block_bytes=JOINED_BYTES))
        if not (way.is_narrow or way.compiled or way.graphs):
            yield "a layer", self._judged(plain.replace(unit=TransferUnit.LAYER))

    def _decodings(self) -> Iterator[Rival]:
        held = self.best.arrangement
        exact = self.wishes.quality == Quality.EXACT
        for tile, park in product((False, True), repeat=2):
            other = held.replace(tile_decode=tile, park_for_decode=park)
            if other != held and not (tile and exact):
                yield decoding(other), self._judged(self.wishes, other)

    def _places(self, name: str) -> Iterable[Rival]:
        held = self.best.arrangement
        if self.best.offload != Offload.STREAM:
            return ()
        others = [place for place in OTHERS.get(name, ()) if place != held.component(name).placement]
        near = [(PLACES[place], self._judged(self.wishes, placed(held, name, place))) for place in others]
        if any(candidate.fits for _, candidate in near):
            return near
        # With all else as it is none fits. That does not say that none would, which takes longer to find out.
        return [*near, *((PLACES[place], c) for place in others for c in self._planned_anew(name, place))]

    def _planned_anew(self, name: str, placement: Placement) -> Iterator[Candidate]:
        """As if that place had been wished, with all else arranged for it: all ways that may fit."""
        if placement == Placement.HOST:
            wishes = self.wishes.replace(cpu=(*self.wishes.cpu, name))
        elif placement == Placement.DEVICE:
            wishes = self.wishes.replace(keep=(*self.wishes.keep, name))
        else:
            return  # that is no wish that one can have
        # A wish only constrains: what does not fit without it does not fit with it.
        for one in (c for c in (self.best, *self._alike) if c.fits):
            yield judge(self.hardware, self.model, one.site, one.option, one.picture, wishes)

    def _judged(self, wishes: Wishes, arrangement: Arrangement | None = None) -> Candidate:
        best = self.best
        return judge(self.hardware, self.model, best.site, best.option, best.picture, wishes, arrangement)
