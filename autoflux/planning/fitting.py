"""From what runs took to a calibration. Pure.

A step says one number, and what it was bound by says whose fault it is: where arithmetic decides, the times of blocks
are corrected until the simulated step is the measured one, where copies decide, the rate of copies is. Several runs are
taken together, so that a plan that computes all the time tells the blocks' part in one that mostly copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median
from typing import NamedTuple, TypeAlias, TypeVar

from autoflux.hardware.values import Hardware
from autoflux.models.values import Model
from autoflux.planning.activations import activations, hoisted_bytes
from autoflux.planning.calibration import BlockTimes, Calibration, CopyRates, FixedCosts, Working, way_of
from autoflux.planning.replay import step_seconds, weighted_mean
from autoflux.planning.speed import Way
from autoflux.planning.terms import Offload, Waiting
from autoflux.planning.values import Correction, PhaseBytes, Picture, Plan
from autoflux.values import Value

ROUNDS = 20
"""Times that all factors are moved; each round leaves a small part of the errors."""

LIMIT = 64.0
"""No factor is corrected beyond that, either way."""

NUDGE = 1.02
"""By how much a factor is changed to see what depends on it."""

DAMPING = 1e-4
"""Holds a factor that hardly any step depends on near where it was."""

LEAST_SLOPE = 0.1
"""A step depends on a factor if it gets longer by a tenth of what the factor does."""

RESERVE = 1.03
"""What is counted on beside the largest activations that were measured: the next run's may be larger."""

LEAST_ACTIVATIONS, MOST_ACTIVATIONS = 0.5, 4.0
"""Bounds of one correction of activations: what lies beyond has another cause, such as memory that others took."""

_T = TypeVar("_T")


class Measured(Value, frozen=True, kw_only=True):
    """What one batch of pictures took, part by part."""

    width: int
    height: int
    batch: int = 1
    begin_seconds: float
    """Encoding the prompts and preparing."""
    step_seconds: tuple[float, ...]
    """Each step of the whole batch, in order."""
    finish_seconds: float
    """Decoding."""
    encoded: bool = True
    """Whether text encoders ran; they do not for a remembered prompt."""
    start_seconds: float | None = None
    """From the start of the process until it was ready; known of its first pictures only."""
    peak_vram_bytes: PhaseBytes | None = None
    """Everything the process had on the device; None where that cannot be asked."""
    peak_ram_bytes: int | None = None
    unsettled: int = 1
    """Steps at the beginning that are unlike the others: the first brings weights and compiles, and where graphs are
    replayed the second is recorded."""
    processor_share: float | None = None
    """Of the processors, what this process had or could have had meanwhile; None where that cannot be known."""

    @property
    def settled(self) -> tuple[float, ...]:
        """The steps but for those at the beginning; of too few the last."""
        return self.step_seconds[self.unsettled :] or self.step_seconds[-1:]

    @property
    def typical_step(self) -> float:
        """Seconds of a step; the median, because other programs disturb single ones."""
        return median(self.settled)

    @property
    def first_excess(self) -> float:
        """What the steps at the beginning took beyond typical ones."""
        first = self.step_seconds[: self.unsettled]
        return max(0.0, sum(first) - len(first) * self.typical_step)

    def seconds_per_image(self, plan: Plan) -> float:
        """A picture of as many steps as the plan is for, drawn in such batches."""
        only_once = plan.compiled or (plan.graphs and not plan.park_for_decode)
        first = 0.0 if only_once else self.first_excess
        steps = plan.predicted.picture.steps * self.typical_step
        return (self.begin_seconds + first + steps + self.finish_seconds) / self.batch

    def picture(self, plan: Plan) -> Picture:
        """What was drawn."""
        return plan.predicted.picture.replace(width=self.width, height=self.height, batch=self.batch)


class Run(Value, frozen=True, kw_only=True):
    """A plan and what it took."""

    plan: Plan
    measured: Measured

    @property
    def blocks_key(self) -> _BlocksKey:
        plan = self.plan
        return _BlocksKey(plan.device, plan.backend, way_of(plan), plan.attention)

    @property
    def copies_key(self) -> _CopiesKey:
        return _CopiesKey(self.plan.device, self.plan.waiting)

    @property
    def correction(self) -> Correction:
        """What the plan's prediction holds already."""
        return self.plan.calibrated.correction if self.plan.calibrated else Correction()


class _BlocksKey(NamedTuple):
    device: str
    backend: str
    way: Way
    attention: str


class _CopiesKey(NamedTuple):
    device: str
    waiting: Waiting


_Key: TypeAlias = "_BlocksKey | _CopiesKey"
_Factors: TypeAlias = "dict[_Key, float]"


def calibrate(
    model: Model, runs: Sequence[Run], known: Calibration | None, *, hardware: Hardware, made_at: str
) -> Calibration:
    """What is known now that these runs were measured. What they say of a way replaces what was known of it.

    All runs are of `model` on that machine, and `known` is relative to its probe.
    """
    base = known or Calibration(
        fingerprint=hardware.fingerprint,
        probed_at=hardware.probed_at,
        model=model.name,
        model_revision=model.revision,
        model_bytes=model.disk_bytes,
        made_at=made_at,
    )
    ours = [run for run in runs if run.plan.offload != Offload.NATIVE and run.measured.typical_step > 0]
    fits = _fitted(model, ours)
    blocks = tuple(BlockTimes(**k._asdict(), **f._asdict()) for k, f in fits.items() if isinstance(k, _BlocksKey))
    copies = tuple(CopyRates(**k._asdict(), **f._asdict()) for k, f in fits.items() if isinstance(k, _CopiesKey))
    return base.replace(
        made_at=made_at,
        blocks=_merged(base.blocks, blocks, lambda b: (b.device, b.backend, b.way, b.attention)),
        copies=_merged(base.copies, copies, lambda c: (c.device, c.waiting)),
        fixed=_merged(base.fixed, tuple(_fixed(runs)), lambda f: (f.device, f.backend, f.offload)),
        working=_merged(base.working, tuple(_working(model, runs)), lambda w: (w.device, w.backend)),
    )


def _merged(old: tuple[_T, ...], new: tuple[_T, ...], key: Callable[[_T], object]) -> tuple[_T, ...]:
    replaced = {key(item) for item in new}
    return (*(item for item in old if key(item) not in replaced), *new)


class _Fit(NamedTuple):
    factor: float
    steps: int


def _fitted(model: Model, runs: Sequence[Run]) -> dict[_Key, _Fit]:
    """The factors with which simulated steps come closest to those measured, in logarithms, by least squares.

    One factor after the other is moved to where the errors of all runs are least (Gauss-Newton by coordinates), first
    that on which the steps depend most. What no step depends on cannot be known and is left out.
    """
    factors = _first_guess(runs)
    for _ in range(ROUNDS):
        slopes = {key: [_slope(model, run, factors, key) for run in runs] for key in factors}
        for key in sorted(factors, key=lambda key: -_square(slopes[key])):
            factors[key] = _moved(model, runs, factors, key)
    fits = {key: _Fit(factor, _told(model, runs, factors, key)) for key, factor in factors.items()}
    return {key: fit for key, fit in fits.items() if fit.steps}


def _moved(model: Model, runs: Sequence[Run], factors: _Factors, key: _Key) -> float:
    """The factor where the errors of all runs are least, if the others stay."""
    slopes = [_slope(model, run, factors, key) for run in runs]
    errors = [math.log(run.measured.typical_step / _step(model, run, factors)) for run in runs]
    pull = sum(slope * error for slope, error in zip(slopes, errors, strict=True))
    move = pull / (_square(slopes) + DAMPING)
    return _clamped(factors[key] * math.exp(min(max(move, -1.0), 1.0)))


def _square(slopes: Iterable[float]) -> float:
    return sum(slope**2 for slope in slopes)


def _told(model: Model, runs: Sequence[Run], factors: _Factors, key: _Key) -> int:
    """How many measured steps depend on a factor."""
    return sum(len(run.measured.settled) for run in runs if abs(_slope(model, run, factors, key)) >= LEAST_SLOPE)


def _first_guess(runs: Iterable[Run]) -> _Factors:
    guess: _Factors = {}
    for run in runs:
        guess[run.blocks_key] = run.correction.blocks
        guess[run.copies_key] = run.correction.copies.get(run.copies_key.waiting, 1.0)
    return guess


def _slope(model: Model, run: Run, factors: _Factors, key: _Key) -> float:
    """By how many percent a step gets longer when a factor gets larger by one."""
    if key not in (run.blocks_key, run.copies_key):
        return 0.0
    more = _step(model, run, factors | {key: factors[key] * NUDGE})
    return math.log(more / _step(model, run, factors)) / math.log(NUDGE)


def _step(model: Model, run: Run, factors: _Factors) -> float:
    had = run.correction
    blocks = factors[run.blocks_key] / had.blocks
    copies = factors[run.copies_key] / had.copies.get(run.copies_key.waiting, 1.0)
    return step_seconds(run.plan, model, run.measured.picture(run.plan), blocks=blocks, copies=copies)


def _fixed(runs: Iterable[Run]) -> Iterator[FixedCosts]:
    """What a picture and a start took beside steps; of starts the longest, as files in RAM make later ones quick."""
    by_key: dict[tuple[str, str, Offload], list[Run]] = {}
    for run in runs:
        by_key.setdefault((run.plan.device, run.plan.backend, run.plan.offload), []).append(run)
    for (device, backend, offload), alike in by_key.items():
        around = [(_clamped(factor), 1) for run in alike if (factor := _around(run))]
        starts = [_clamped(factor) for run in alike if (factor := _start(run))]
        if around or starts:
            yield FixedCosts(
                device=device,
                backend=backend,
                offload=offload,
                around=weighted_mean(around) if around else None,
                start=max(starts, default=None),
            )


def _around(run: Run) -> float | None:
    """Encoding, decoding and visits, over what was predicted for the same picture."""
    measured, predicted = run.measured, run.plan.predicted
    if not measured.encoded or measured.picture(run.plan) != predicted.picture:
        return None
    steps = predicted.picture.steps / predicted.picture.batch
    expected = predicted.seconds_per_image - steps * predicted.seconds_per_step
    took = measured.seconds_per_image(run.plan) - steps * measured.typical_step
    return run.correction.around * took / expected if expected > 0 and took > 0 else None


def _start(run: Run) -> float | None:
    """Until it was ready, with the time of compiling, over what was predicted."""
    took, expected = run.measured.start_seconds, run.plan.predicted.seconds_to_start
    if took is None or expected <= 0:
        return None
    compiling = run.measured.first_excess if run.plan.compiled else 0.0
    return run.correction.start * (took + compiling) / expected


def _working(model: Model, runs: Iterable[Run]) -> Iterator[Working]:
    """Activations that explain the measured peaks: of several runs the largest."""
    by_key: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for run in runs:
        if constants := _constants(model, run):
            by_key.setdefault((run.plan.device, run.plan.backend), []).append(constants)
    for (device, backend), found in by_key.items():
        yield Working(
            device=device,
            backend=backend,
            denoise_activations=max(denoise for denoise, _ in found),
            decode_activations=max(decode for _, decode in found),
        )


def _constants(model: Model, run: Run) -> tuple[float, float] | None:
    """Of denoising and of decoding."""
    plan, peaks = run.plan, run.measured.peak_vram_bytes
    if peaks is None or run.measured.picture(plan) != plan.predicted.picture or plan.offload == Offload.NATIVE:
        return None
    priors, planned = plan.priors, plan.predicted.peak_vram_bytes
    drawn = plan.predicted.picture.replace(steps=len(run.measured.step_seconds))  # may be fewer than are planned for
    counted = activations(model, plan.arrangement, priors, plan.predicted.picture)
    held = [hoisted_bytes(model, plan.arrangement, picture) for picture in (plan.predicted.picture, drawn)]
    return (
        _constant(priors.denoise_activations, counted.denoise, peaks.denoise - planned.denoise + held[0] - held[1]),
        _constant(priors.decode_activations, counted.decode, peaks.decode - planned.decode),
    )


def _constant(had: float, counted_bytes: int, more_bytes: int) -> float:
    """The constant with which the planned peak would have been the measured one, and the reserve."""
    factor = RESERVE * (counted_bytes + more_bytes) / max(1, counted_bytes)
    return had * min(max(factor, LEAST_ACTIVATIONS), MOST_ACTIVATIONS)


def _clamped(value: float) -> float:
    return min(max(value, 1 / LIMIT), LIMIT)
