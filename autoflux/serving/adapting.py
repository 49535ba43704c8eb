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
        self._hardware: Hardware | None = None
        self._watch: Watch | None = None
        self._next: Watch | None = None

    def follow(self, hardware: Hardware, plan: Plan) -> None:
        """Begin with this plan."""
        if self._planner is not None:
            self._hardware, self._watch = hardware, Watch(plan=plan)

    @property
    def measuring(self) -> bool:
        """Whether the next job is to be measured."""
        return self._watch is not None

    @property
    def on_trial(self) -> bool:
        """Whether a plan runs in the place of another, and may yet turn out worse."""
        return self._watch is not None and self._watch.before is not None

    def took(self, measured: Measured) -> None:
        """A batch was drawn with the plan that is followed."""
        if self._watch is None:
            return
        watch = self._watch = self._watch.seen(measured, self._model)
        verdict = watch.verdict(self._model)
        if verdict is Verdict.WAIT:
            return
        self._watch = None
        if verdict is Verdict.OFF:
            self._in_a_thread(lambda: self._plan_again(watch))
        elif watch.before is not None:
            self._in_a_thread(lambda: self._compare(watch, verdict))

    def changed(self) -> None:
        """The worker has been told to run the plan that was decided on."""
        self._watch, self._next = self._next, None

    def gave_up(self, reason: ErrorReport) -> Decision | None:
        """The plan on trial could not be run: the decision to go back; None if none was on trial."""
        watch, self._watch = self._watch, None
        if watch is None or watch.before is None:
            self._watch = watch
            return None
        self._in_a_thread(lambda: self._remember(watch, self._learned(watch)))
        words = Setting.of(watch.before.plan).words
        return Decision(
            note=f"the new plan could not be run ({reason.message}); going back to {words}", plan=watch.before.plan
        )

    def _in_a_thread(self, work: Callable[[], Decision | None]) -> None:
        def run() -> None:
            try:
                decision = work()
            except Exception as error:  # noqa: BLE001 — whatever goes wrong here, the plan that runs goes on
                decision = Decision(note=f"the plan stays: {describe(error).message}")
            if decision is not None:
                self._decided(decision)

        threading.Thread(target=run, name="autoflux-adapt", daemon=True).start()

    def _plan_again(self, watch: Watch) -> Decision:
        assert self._planner is not None  # noqa: S101 — else nothing is watched
        assert self._hardware is not None  # noqa: S101
        calibration = self._learned(watch)
        self._planner.keep(calibration)
        new = self._planner.plan(self._hardware, calibration)
        off = f"a step takes {watch.deviation(self._model):.2f} times as long as predicted, calibrated"
        if not is_worth_a_change(watch, new, self._model, calibration):
            return Decision(note=f"{off}; the plan stays, no other is predicted to be faster")
        now = watch.seconds_per_image(self._model)
        self._next = Watch(plan=new, before=Before(plan=watch.plan, seconds_per_image=now))
        predicted = format_seconds(new.predicted.seconds_per_image)
        words = f"{Setting.of(new).words}, predicted {predicted} a picture instead of {format_seconds(now)}"
        return Decision(note=f"{off}; changing to {words}", plan=new)

    def _compare(self, watch: Watch, verdict: Verdict) -> Decision:
        assert watch.before is not None  # noqa: S101 — only plans on trial are compared
        calibration = self._learned(watch)
        now, then = watch.seconds_per_image(self._model), watch.before.seconds_per_image
        took = f"{format_seconds(now)} a picture instead of {format_seconds(then)}"
        if verdict is Verdict.SLOWER:
            self._remember(watch, calibration)
            words = Setting.of(watch.before.plan).words
            return Decision(note=f"the new plan is slower: {took}; going back to {words}", plan=watch.before.plan)
        if self._planner is not None:
            self._planner.keep(calibration)
        return Decision(note=f"the new plan stays: {took}")

    def _remember(self, watch: Watch, calibration: Calibration) -> None:
        """That the plan on trial was worse than the one before."""
        if self._planner is None or watch.before is None:
            return
        entry = remembered(watch.plan, watch.before.plan)
        if entry not in calibration.slower:
            calibration = calibration.replace(slower=(*calibration.slower, entry))
        self._planner.keep(calibration)

    def _learned(self, watch: Watch) -> Calibration:
        """What is known now that the watched plan was measured."""
        assert self._planner is not None  # noqa: S101 — else nothing is watched
        assert self._hardware is not None  # noqa: S101
        now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        return calibrate(
            self._model,
            watch.runs,
            self._planner.known(self._hardware),
            fingerprint=self._hardware.fingerprint,
            made_at=now,
        )
