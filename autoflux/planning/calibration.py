"""What runs on this machine took, against what was predicted, and what later predictions make of it. Pure."""

from __future__ import annotations

from typing import Self

from autoflux.models.values import Precision
from autoflux.planning.speed import Way
from autoflux.planning.terms import DEFAULT_ATTENTION, Offload, TransferUnit, Waiting
from autoflux.planning.values import Correction, Count, Factor, Plan, Positive, Priors
from autoflux.units import format_seconds
from autoflux.values import Value

CALIBRATION_SCHEMA = 5
"""Version of `Calibration`'s JSON. Raised when a field changes its name, unit or meaning.

2: activations are beside what the allocator and the modulation take, and as they are where nothing is compiled.
3: blocks are timed beside what copies take from them, and with what compiling and 8 bits take since.
4: steps are timed as they follow each other, and launches of blocks that are made wide count for more.
5: says which probe it is relative to.
"""

SHARED = 0.5
"""How much of the error of the ways that were measured is taken to be that of a way that was not, in logarithms: what
misleads the reckoning (clocks, other programs) is partly common to all ways and partly each one's own."""

NEARLY = 1.15
"""How much longer a picture may be predicted to take with the tuned setting than with the best: predictions are that
exact, and the tuned one was the fastest when it ran."""

_HELD = {
    Offload.NONE: "all weights there",
    Offload.COMPONENT: "one component there at a time",
    Offload.STREAM: "streamed",
    Offload.NATIVE: "brought by the backend",
}


class Setting(Value, frozen=True, kw_only=True):
    """What tells one way to run from another, beside which blocks stay and how large the ring is."""

    device: str
    backend: str
    offload: Offload
    way: Way
    attention: str = DEFAULT_ATTENTION
    unit: TransferUnit = TransferUnit.BLOCK

    @classmethod
    def of(cls, plan: Plan) -> Self:
        """That of a plan."""
        return cls(
            device=plan.device,
            backend=plan.backend,
            offload=plan.offload,
            way=way_of(plan),
            attention=plan.attention,
            unit=plan.unit,
        )

    @property
    def words(self) -> str:
        """For people: what is where, and in what format."""
        held = self.way.storage.value
        if self.way.is_narrow:
            held += ", multiplied so" if self.way.native else f", widened to {self.way.arithmetic.value}"
        attention = "" if self.attention == DEFAULT_ATTENTION else f", {self.attention} attention"
        compiled = ", compiled" if self.way.compiled else ""
        graphs = ", from CUDA graphs" if self.way.graphs else ""
        return f"{self.backend} on {self.device}, {_HELD[self.offload]}, {held}{compiled}{graphs}{attention}"


class BlockTimes(Value, frozen=True, kw_only=True):
    """What blocks computed for in one way, over what rates and priors alone say."""

    device: str
    backend: str
    way: Way
    attention: str = DEFAULT_ATTENTION
    factor: Factor
    steps: Count
    """How many were measured."""


class CopyRates(Value, frozen=True, kw_only=True):
    """The rate at which weights arrived that wait there, over that of the slowest part of their way: the efficiency."""

    device: str
    waiting: Waiting
    factor: Factor
    steps: Count


class FixedCosts(Value, frozen=True, kw_only=True):
    """What is not part of a step, over what was predicted: `around` the steps of a picture, and to `start`."""

    device: str
    backend: str
    offload: Offload
    around: Factor | None = None
    start: Factor | None = None


class Working(Value, frozen=True, kw_only=True):
    """Memory beside weights, in the units of the priors of the same names; None where it was not measured."""

    device: str
    backend: str
    denoise_activations: Positive | None = None
    decode_activations: Positive | None = None


class Tuned(Value, frozen=True, kw_only=True):
    """The setting that was the fastest of those that were run here one after the other."""

    setting: Setting
    made_at: str
    seconds_per_step: Positive
    plans: Count
    """How many were run to the end."""


class Slower(Value, frozen=True, kw_only=True):
    """A setting that was predicted to be faster than another and, run, was slower. Both are one where only the
    blocks that stay differed."""

    setting: Setting
    than: Setting


class Calibration(Value, frozen=True, kw_only=True):
    """What is known of one model on one machine from running it. Everything is relative to the probe's rates and the
    profile's priors, so that it holds for other sizes of pictures and other ceilings of memory."""

    schema: int = CALIBRATION_SCHEMA
    fingerprint: str
    """Of the machine."""
    probed_at: str
    """When the probe measured what factors are relative to."""
    model: str
    model_revision: str
    model_bytes: int
    made_at: str
    """When it was last added to, ISO 8601."""
    blocks: tuple[BlockTimes, ...] = ()
    copies: tuple[CopyRates, ...] = ()
    fixed: tuple[FixedCosts, ...] = ()
    working: tuple[Working, ...] = ()
    tuned: Tuned | None = None
    slower: tuple[Slower, ...] = ()

    @property
    def steps(self) -> int:
        """How many measured steps it rests on."""
        return sum(times.steps for times in self.blocks)

    @property
    def proven(self) -> tuple[Setting, ...]:
        """Settings that were faster than others when they ran."""
        return (*((self.tuned.setting,) if self.tuned else ()), *(slower.than for slower in self.slower))

    def was_slower(self, setting: Setting) -> bool:
        """Whether it turned out slower than another."""
        return any(s.setting == setting != s.than for s in self.slower)

    def after_a_probe(self, probed_at: str) -> Calibration:
        """What still holds when the machine was measured once more: no factors on rates that are others now."""
        return self.replace(probed_at=probed_at, blocks=(), copies=(), fixed=())

    def of_backend(self, backend: str) -> Calibration:
        """Only what holds for one backend."""
        return self.replace(
            blocks=tuple(b for b in self.blocks if b.backend == backend),
            fixed=tuple(f for f in self.fixed if f.backend == backend),
            working=tuple(w for w in self.working if w.backend == backend),
        )

    def correction(self, device: str, offload: Offload, way: Way, attention: str) -> Correction:
        """By what to multiply what is reckoned for a way of running; for one backend."""
        fixed = next((f for f in self.fixed if (f.device, f.offload) == (device, offload)), None)
        # What a library copies in its own way says nothing of blocks, nor they of it.
        own = offload == Offload.NATIVE
        return Correction(
            blocks=1.0 if own else self._block_factor(device, way, attention),
            copies={} if own else {c.waiting: c.factor for c in self.copies if c.device == device},
            around=(fixed and fixed.around) or 1.0,
            start=(fixed and fixed.start) or 1.0,
        )

    def is_measured(self, device: str, way: Way, attention: str) -> bool:
        """Whether blocks were run in that way."""
        return any((b.device, b.way, b.attention) == (device, way, attention) for b in self.blocks)

    def priors(self, priors: Priors, device: str) -> Priors:
        """The profile's, with what was measured in the place of what is assumed."""
        found = next((w for w in self.working if w.device == device), None)
        names = ("denoise_activations", "decode_activations")
        measured = {name: getattr(found, name) for name in names if found and getattr(found, name) is not None}
        return priors.replace(**measured)

    def _block_factor(self, device: str, way: Way, attention: str) -> float:
        here = [b for b in self.blocks if b.device == device]
        # The device does the same for a block that is replayed as for one that is launched.
        for alike in (way, way.replace(graphs=not way.graphs)):
            for times in here:
                if (times.way, times.attention) == (alike, attention):
                    return times.factor
        product = 1.0
        for times in here:
            product *= times.factor ** (SHARED / len(here))
        return product

    def tuned_words(self) -> str:
        """What `tune` found, for people."""
        assert self.tuned is not None  # noqa: S101 — asked for only where there is one
        tuned = self.tuned
        return (
            f"the fastest of {tuned.plans} that were run here on {tuned.made_at[:10]}: "
            f"{format_seconds(tuned.seconds_per_step)} a step"
        )


def way_of(plan: Plan) -> Way:
    """How the blocks of a plan compute."""
    transformer = plan.component("transformer")
    return Way(
        arithmetic=Precision(transformer.arithmetic),
        storage=Precision(transformer.storage),
        native=transformer.native,
        compiled=plan.compiled,
        graphs=plan.graphs,
    )
