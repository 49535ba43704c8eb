"""Whether a plan that is being run keeps what it promised, and whether another is worth a change. Pure."""

from __future__ import annotations

import math
from enum import StrEnum

from autoflux.hardware.load import MOST_DISTURBED, is_disturbed
from autoflux.models.values import Model
from autoflux.planning.calibration import Calibration, Setting, Slower
from autoflux.planning.fitting import Measured, Run
from autoflux.planning.replay import image_seconds, step_seconds, tokens, weighted_mean
from autoflux.planning.values import Picture, Plan
from autoflux.values import Value

OFF = 0.15
"""How far a step may be from its prediction, as a share of it, without anything being done."""

ENOUGH_STEPS = 8
"""Steps that are compared: single ones are disturbed by other programs."""

GAIN = 0.05
"""By what share a picture must be predicted to get faster for a change of plans, which takes a new start."""

MOST_TOKENS = 2.0
"""Pictures with more than so many times the tokens that were planned for, or fewer, are not compared: the prediction
is scaled to their size, and that is only so exact."""


class Verdict(StrEnum):
    """What the first pictures say of a plan."""

    WAIT = "wait"
    """Too few to say."""
    HOLDS = "holds"
    """It is as it was predicted, or as fast as the plan before it."""
    OFF = "off"
    """It is not as it was predicted: fit, and plan again."""
    SLOWER = "slower"
    """It is slower than the plan before it: go back."""


class Before(Value, frozen=True, kw_only=True):
    """The plan that ran before, and what it took for a picture, measured."""

    plan: Plan
    seconds_per_image: float


class Watch(Value, frozen=True, kw_only=True):
    """A plan that runs, and what was measured of it so far. `before` is what it took the place of, if anything."""

    plan: Plan
    measured: tuple[Measured, ...] = ()
    before: Before | None = None
    disturbed: int = 0
    """Batches that were left out because other programs computed meanwhile."""

    def seen(self, measured: Measured, model: Model) -> Watch:
        """With one batch more, if it can be compared."""
        if not is_comparable(self.plan, model, measured):
            return self
        if is_disturbed(measured.processor_share) and self.disturbed < MOST_DISTURBED:
            return self.replace(disturbed=self.disturbed + 1)
        return self.replace(measured=(*self.measured, measured))

    @property
    def steps(self) -> int:
        """How many steps can be compared."""
        return sum(len(measured.settled) for measured in self.measured)

    @property
    def runs(self) -> list[Run]:
        """For fitting."""
        return [Run(plan=self.plan, measured=measured) for measured in self.measured]

    def deviation(self, model: Model) -> float:
        """A measured step over a predicted one; of several batches the geometric mean, by steps."""
        return weighted_mean(
            [(_deviation(self.plan, model, measured), len(measured.settled)) for measured in self.measured]
        )

    def seconds_per_image(self, model: Model) -> float:
        """A picture as the plan is for, with steps as they were measured."""
        return image_seconds(self.plan, self.plan.predicted.seconds_per_step * self.deviation(model))

    def verdict(self, model: Model) -> Verdict:
        """What there is to do."""
        if self.steps < ENOUGH_STEPS:
            return Verdict.WAIT
        if self.before is not None:
            slower = self.seconds_per_image(model) > self.before.seconds_per_image
            return Verdict.SLOWER if slower else Verdict.HOLDS
        return Verdict.HOLDS if abs(self.deviation(model) - 1) <= OFF else Verdict.OFF


def is_comparable(plan: Plan, model: Model, measured: Measured) -> bool:
    """Whether what a batch took says something of the plan: it had more than one step, and near the planned size."""
    if len(measured.step_seconds) < 2 or measured.typical_step <= 0:
        return False
    ratio = tokens(plan, model, measured.picture(plan)) / tokens(plan, model)
    return 1 / MOST_TOKENS <= ratio <= MOST_TOKENS


def is_worth_a_change(watch: Watch, new: Plan, model: Model, known: Calibration) -> bool:
    """Whether to run `new`, which was planned with what the watched plan taught, in the place of that one."""
    old = watch.plan
    if (Setting.of(new), new.arrangement) == (Setting.of(old), old.arrangement) or remembered(new, old) in known.slower:
        return False
    return new.predicted.seconds_per_image < (1 - GAIN) * watch.seconds_per_image(model)


def remembered(slower: Plan, than: Plan) -> Slower:
    """What to remember when one plan, run in the place of the other, was slower or could not be run."""
    return Slower(setting=Setting.of(slower), than=Setting.of(than))


def _deviation(plan: Plan, model: Model, measured: Measured) -> float:
    picture: Picture = measured.picture(plan)
    return math.exp(math.log(measured.typical_step) - math.log(step_seconds(plan, model, picture)))
