"""Holding a running plan to its prediction: measure its first pictures, and if they are not as predicted, learn from
them, plan again, and change to a better plan, or back from one that was not better."""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Callable
from typing import Protocol

from autoflux.errors import ErrorReport, describe
from autoflux.hardware.values import Hardware
from autoflux.models.values import Model
from autoflux.planning.calibration import Calibration, Setting
from autoflux.planning.fitting import Measured, calibrate
from autoflux.planning.judging import Before, Verdict, Watch, is_worth_a_change, remembered
from autoflux.planning.values import Plan
from autoflux.units import format_seconds
from autoflux.values import Value


class Planner(Protocol):
    """Plans again on a machine, and keeps what was learned there."""

    def known(self, hardware: Hardware) -> Calibration | None:
        """What earlier runs of the model have measured."""

    def plan(self, hardware: Hardware, calibration: Calibration) -> Plan:
        """The best plan with that. Raises AutofluxError when there is none."""

    def keep(self, calibration: Calibration) -> None:
        """Remember it for the next time; it is no error if that cannot be done."""


class Decision(Value, frozen=True, kw_only=True):
    """What came of comparing: something to say, and perhaps a plan to change to."""

    note: str
    plan: Plan | None = None


class Adaptation:
    """Follows the plan that a worker runs. Its methods are quick; what takes time is done in a thread, which ends by
    calling `decided`. A service changes plans once at most, and back: it is there to draw, not to search."""

    def __init__(self, model: Model, planner: Planner | None, decided: Callable[[Decision], None]) -> None:
        """Without a planner nothing is measured."""
        self._model = model
        self._planner = planner
        self._decided = decided
        self._lessons: _Lessons | None = None
        self._watch: Watch | None = None
        self._next: Watch | None = None

    def follow(self, hardware: Hardware, plan: Plan) -> None:
        """Begin with this plan."""
        if self._planner is not None:
            self._lessons, self._watch = _Lessons(self._model, self._planner, hardware), Watch(plan=plan)

    @property
    def measuring(self) -> bool:
        """Whether the next job is to be measured."""
        return self._watch is not None

    def took(self, measured: Measured) -> None:
        """A batch was drawn with the plan that is followed."""
        if self._watch is None or self._lessons is None:
            return
        watch, lessons = self._watch.seen(measured, self._model), self._lessons
        verdict = watch.verdict(self._model)
        self._watch = watch if verdict is Verdict.WAIT else None
        if verdict is Verdict.OFF:
            self._in_a_thread(lambda: self._plan_again(lessons, watch))
        elif verdict is not Verdict.WAIT and (before := watch.before):
            self._in_a_thread(lambda: lessons.of_trial(watch, before, slower=verdict is Verdict.SLOWER))

    def changed(self) -> None:
        """The worker has been told to run the plan that was decided on."""
        self._watch, self._next = self._next, None

    def gave_up(self, reason: ErrorReport) -> Decision | None:
        """The worker could not run its plan: the decision to go back if that was on trial, None if it was not."""
        watch, lessons = self._watch, self._lessons
        if watch is None or watch.before is None or lessons is None:
            return None
        self._watch, before = None, watch.before
        self._in_a_thread(lambda: lessons.remember(watch.plan, before.plan, lessons.learned(watch)))
        words = Setting.of(before.plan).words
        return Decision(
            note=f"the new plan could not be run ({reason.message}); going back to {words}", plan=before.plan
        )

    def _plan_again(self, lessons: _Lessons, watch: Watch) -> Decision:
        decision = lessons.of_first_pictures(watch)
        if decision.plan is not None:
            before = Before(plan=watch.plan, seconds_per_image=watch.seconds_per_image(self._model))
            self._next = Watch(plan=decision.plan, before=before)
        return decision

    def _in_a_thread(self, work: Callable[[], Decision | None]) -> None:
        def run() -> None:
            try:
                decision = work()
            except Exception as error:  # noqa: BLE001 — whatever goes wrong here, the plan that runs goes on
                decision = Decision(note=f"the plan stays: {describe(error).message}")
            if decision is not None:
                self._decided(decision)

        threading.Thread(target=run, name="autoflux-adapt", daemon=True).start()


class _Lessons:
    """What measured plans teach, and what follows from it. May take a second."""

    def __init__(self, model: Model, planner: Planner, hardware: Hardware) -> None:
        self._model = model
        self._planner = planner
        self._hardware = hardware

    def of_first_pictures(self, watch: Watch) -> Decision:
        """The plan is not as predicted: learn, plan again, and say whether to change."""
        calibration = self.learned(watch)
        self._planner.keep(calibration)
        new = self._planner.plan(self._hardware, calibration)
        off = f"a step takes {watch.deviation(self._model):.2f} times as long as predicted, calibrated"
        if not is_worth_a_change(watch, new, self._model, calibration):
            return Decision(note=f"{off}; the plan stays, no other is predicted to be faster")
        now, then = format_seconds(watch.seconds_per_image(self._model)), new.predicted.seconds_per_image
        words = f"{Setting.of(new).words}, predicted {format_seconds(then)} a picture instead of {now}"
        return Decision(note=f"{off}; changing to {words}", plan=new)

    def of_trial(self, watch: Watch, before: Before, *, slower: bool) -> Decision:
        """The new plan was measured: it stays, or is left for the one before."""
        calibration = self.learned(watch)
        now, then = watch.seconds_per_image(self._model), before.seconds_per_image
        took = f"{format_seconds(now)} a picture instead of {format_seconds(then)}"
        if not slower:
            self._planner.keep(calibration)
            return Decision(note=f"the new plan stays: {took}")
        self.remember(watch.plan, before.plan, calibration)
        words = Setting.of(before.plan).words
        return Decision(note=f"the new plan is slower: {took}; going back to {words}", plan=before.plan)

    def remember(self, worse: Plan, better: Plan, calibration: Calibration) -> None:
        """That one plan was worse than another, with what is known beside that."""
        entry = remembered(worse, better)
        others = tuple(slower for slower in calibration.slower if slower != entry)
        self._planner.keep(calibration.replace(slower=(*others, entry)))

    def learned(self, watch: Watch) -> Calibration:
        """What is known now that the watched plan was measured."""
        known = self._planner.known(self._hardware)
        now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        return calibrate(self._model, watch.runs, known, hardware=self._hardware, made_at=now)
