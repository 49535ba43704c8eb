"""Which of the plans that were run is the best. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from autoflux.errors import ErrorReport
from autoflux.hardware.values import Hardware
from autoflux.models.values import Model
from autoflux.planning.calibration import Calibration, Setting, Tuned
from autoflux.planning.candidates import PICTURES
from autoflux.planning.fitting import Measured, Run, calibrate
from autoflux.planning.values import Plan
from autoflux.units import format_bytes
from autoflux.values import Value

FEWEST = 2
"""Plans that must have run to the end for the fastest of them to be called tuned."""


class Trial(Value, frozen=True, kw_only=True):
    """A plan that was run: what it took, or why it failed."""

    plan: Plan
    measured: Measured | None = None
    error: ErrorReport | None = None

    @property
    def seconds_per_image(self) -> float | None:
        """A picture of the size and steps that the plan is for."""
        return self.measured.seconds_per_image(self.plan) if self.measured else None

    @property
    def overrun(self) -> str:
        """Need against ceiling of the memory that it did not keep to; empty if it did."""
        plan, measured = self.plan, self.measured
        peaks = measured.peak_vram_bytes if measured else None
        if peaks and plan.vram_limit_bytes is not None and peaks.peak > plan.vram_limit_bytes:
            return f"took {format_bytes(peaks.peak)} of device memory, may {format_bytes(plan.vram_limit_bytes)}"
        ram = measured.peak_ram_bytes if measured else None
        if ram is not None and ram > plan.ram_limit_bytes:
            return f"took {format_bytes(ram)} of RAM, may {format_bytes(plan.ram_limit_bytes)}"
        return ""

    def cost(self, pictures: int) -> float:
        """Seconds of a picture, with its share of compiling if so many are drawn. Only of one that ran."""
        assert self.measured is not None  # noqa: S101 — who asks has seen to it
        compiling = self.measured.first_excess if self.plan.compiled else 0.0
        return self.measured.seconds_per_image(self.plan) + compiling / pictures


def fastest(trials: Sequence[Trial], pictures: int | None = None) -> Trial | None:
    """Of those that ran and kept to their ceilings; the earlier of equals. None if there is none."""
    ran = [trial for trial in trials if trial.measured and not trial.overrun]
    return min(ran, key=lambda trial: trial.cost(pictures or PICTURES), default=None)


def learned(
    trials: Sequence[Trial],
    model: Model,
    known: Calibration | None,
    *,
    hardware: Hardware,
    made_at: str,
    pictures: int | None = None,
) -> Calibration | None:
    """What is known after these trials, all on that machine; None if none of them ran."""
    runs = [Run(plan=trial.plan, measured=trial.measured) for trial in trials if trial.measured]
    if not runs:
        return known
    calibration = calibrate(model, runs, known, hardware=hardware, made_at=made_at)
    best = fastest(trials, pictures)
    if best is None or best.measured is None or len(runs) < FEWEST:
        return calibration
    tuned = Tuned(
        setting=Setting.of(best.plan),
        made_at=made_at,
        seconds_per_step=best.measured.typical_step,
        plans=len(runs),
    )
    # What was once slower may be the fastest now: what was just measured counts.
    slower = tuple(s for s in calibration.slower if s.setting != tuned.setting)
    return calibration.replace(tuned=tuned, slower=slower)
