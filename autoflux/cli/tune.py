"""`autoflux tune`: the best few plans, run for real."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import click
from rich.table import Table

from autoflux.api import Prepared, find_model, packs_of, plans_for, prepare
from autoflux.cli.options import PictureSize, model_option, no_pack_option
from autoflux.cli.output import json_option, stderr, stdout, succeed, warn
from autoflux.cli.tables import table as _table
from autoflux.cli.wishes import wishes_options
from autoflux.errors import TuningFailed
from autoflux.hardware.values import Hardware
from autoflux.models.request import Order, Request, make_requests
from autoflux.models.values import Model
from autoflux.planning.calibration import Calibration, Setting
from autoflux.planning.findings import Findings
from autoflux.planning.fitting import Measured
from autoflux.planning.tuning import Trial, fastest, learned
from autoflux.planning.values import Plan, Wishes
from autoflux.plugin_manager import Plugins
from autoflux.runtime.calibration_store import CalibrationStore, is_off
from autoflux.serving.trial import run_trial
from autoflux.units import counted, format_bytes, format_seconds

PROMPT = "a lighthouse on a rock above the sea, at dusk, in the rain"
"""What is drawn; what it shows makes no difference to the time it takes."""

PLANS, STEPS = 4, 5


@click.command("tune")
@model_option
@no_pack_option
@click.option("--plans", "count", type=click.IntRange(1, 32), default=PLANS, show_default=True, help="Plans to run.")
@click.option(
    "--steps",
    type=click.IntRange(1, 100),
    default=STEPS,
    show_default=True,
    help="Steps to measure of each, after one that does not count.",
)
@click.option("--size", type=PictureSize(), help="Size of the picture to tune for, such as 1024 or 1344x768.")
@wishes_options
@json_option
@click.pass_obj
def command(
    plugins: Plugins,
    *,
    model: str,
    base: str | None,
    count: int,
    steps: int,
    size: tuple[int, int] | None,
    wishes: Wishes,
    as_json: bool,
) -> None:
    """Run the best few plans for some steps each, and keep the fastest that holds its memory.

    What is measured is remembered for this machine and model: later plans are predicted by it. No pictures are kept.
    """
    width, height = size or (None, None)
    wishes = wishes.replace(width=width, height=height)
    with stderr.status("taking stock") as status:
        found = find_model(model, plugins, base)
        requests = _requests(found, wishes, steps)
        prepared = prepare(model, wishes, plugins, base=base, on_stage=status.update)
        tuning = Tuning.of(prepared, requests, wishes.pictures)
        findings = Findings(packs=packs_of(found), calibration=tuning.known)
        plans = plans_for(found, wishes, plugins, prepared.hardware, findings, count=count)
    if is_off():
        warn("AUTOFLUX_CALIBRATION is off: nothing of what is measured will be kept")
    try:
        tuning.run(plans)
    except KeyboardInterrupt:
        _interrupted(tuning)
        raise
    if not any(trial.measured for trial in tuning.trials):
        raise _failed(tuning.trials)
    if as_json:
        succeed(_data(tuning))
    else:
        _show(tuning)


def _requests(model: Model, wishes: Wishes, steps: int) -> tuple[Request, ...]:
    """As many pictures as are to be drawn at once, of one step more than is measured."""
    order = Order(
        prompt=PROMPT, seed=0, steps=steps + 1, width=wishes.width, height=wishes.height, count=wishes.batch or 1
    )
    return make_requests(model, order)


@dataclass
class Tuning:
    """Trials of a model's plans on this machine, and what is known from them. Kept after each, so that nothing is lost
    when it is interrupted."""

    model: Model
    hardware: Hardware
    requests: tuple[Request, ...]
    pictures: int | None
    known: Calibration | None
    store: CalibrationStore = field(default_factory=CalibrationStore)
    trials: list[Trial] = field(default_factory=list)

    @classmethod
    def of(cls, prepared: Prepared, requests: tuple[Request, ...], pictures: int | None) -> Tuning:
        """With what earlier runs have measured; the plan's warnings have said so if that cannot be used."""
        known, warning = CalibrationStore().load(prepared.hardware, prepared.model)
        if warning:
            warn(warning)
        return cls(prepared.model, prepared.hardware, requests, pictures, known)

    @property
    def best(self) -> Trial | None:
        """The fastest so far of those that held their memory."""
        return fastest(self.trials, self.pictures)

    def run(self, plans: Sequence[Plan]) -> None:
        """Run them one after the other."""
        for number, plan in enumerate(plans, 1):
            words = f"plan {number} of {len(plans)}: {Setting.of(plan).words}"
            self.trials.append(self._run(plan, words))
            stderr.print(f"{words}: {_outcome(self.trials[-1])}", style="dim", soft_wrap=True)
            self._keep()

    def _run(self, plan: Plan, words: str) -> Trial:
        with stderr.status(words) as status:
            return run_trial(plan, self.model, self.requests, on_stage=lambda stage: status.update(f"{words}: {stage}"))

    def _keep(self) -> None:
        """Everything measured so far, on top of what was known before."""
        now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        calibration = learned(
            self.trials, self.model, self.known, hardware=self.hardware, made_at=now, pictures=self.pictures
        )
        if calibration is not None and (warning := self.store.save(calibration, self.model)):
            warn(warning)


def _outcome(trial: Trial) -> str:
    if trial.measured is None:
        return f"failed: {trial.error.message}" if trial.error else "failed"
    return trial.overrun or f"{format_seconds(trial.measured.typical_step)} a step"


def _failed(trials: Iterable[Trial]) -> TuningFailed:
    errors = [trial.error for trial in trials if trial.error]
    reasons = "; ".join(dict.fromkeys(error.message for error in errors))
    hint = next((error.hint for error in errors if error.hint), None)
    return TuningFailed(f"none of the plans could be run: {reasons}", hint=hint)


def _interrupted(tuning: Tuning) -> None:
    done = sum(1 for trial in tuning.trials if trial.measured)
    if done and not is_off():
        stderr.print(f"what {counted(done, 'plan')} took is kept", style="dim")


def _show(tuning: Tuning) -> None:
    for table in (_settings(tuning), _trials(tuning)):
        stdout.print(table)
        stdout.print()
    if tuning.best is None:
        warn("no plan held its memory, so none is kept; lower --vram or --ram, and tune again")
        return
    stdout.print(f"the fastest: {Setting.of(tuning.best.plan).words}", soft_wrap=True)


def _settings(tuning: Tuning) -> Table:
    table = _table("", "plan", title="Plans that ran")
    for number, trial in enumerate(tuning.trials, 1):
        table.add_row(str(number), Setting.of(trial.plan).words)
    return table


def _trials(tuning: Tuning) -> Table:
    table = _table("", "a step", "predicted", "a picture", "memory", "predicted", "", title="What they took")
    for number, trial in enumerate(tuning.trials, 1):
        note = trial.error.message if trial.error else trial.overrun
        table.add_row(str(number), *_columns(trial), "fastest" if trial is tuning.best else note)
    return table


def _columns(trial: Trial) -> tuple[str, str, str, str, str]:
    """Step, picture, and memory beside what was predicted: the device's, or RAM on the CPU."""
    step = trial.plan.predicted.seconds_per_step
    predicted, measured = _memory(trial.plan, trial.measured)
    if trial.measured is None or trial.seconds_per_image is None:
        return "-", format_seconds(step), "-", "-", format_bytes(predicted)
    off = trial.measured.typical_step / step - 1
    return (
        f"{format_seconds(trial.measured.typical_step)} ({off:+.0%})",
        format_seconds(step),
        format_seconds(trial.seconds_per_image),
        "-" if measured is None else format_bytes(measured),
        format_bytes(predicted),
    )


def _memory(plan: Plan, measured: Measured | None) -> tuple[int, int | None]:
    if plan.vram_limit_bytes is None:
        return plan.predicted.peak_ram_bytes, measured.peak_ram_bytes if measured else None
    peaks = measured.peak_vram_bytes if measured else None
    return plan.predicted.peak_vram_bytes.peak, peaks.peak if peaks else None


def _data(tuning: Tuning) -> dict[str, object]:
    best = tuning.best
    return {
        "fingerprint": tuning.hardware.fingerprint,
        "trials": [_trial_data(trial) | {"fastest": trial is best} for trial in tuning.trials],
        "plan": best.plan.to_data() if best else None,
        "kept": None if is_off() else str(tuning.store.path(tuning.hardware.fingerprint, tuning.model)),
    }


def _trial_data(trial: Trial) -> dict[str, object]:
    predicted, measured = trial.plan.predicted, trial.measured
    return {
        "setting": Setting.of(trial.plan).to_data(),
        "predicted": predicted.to_data(),
        "measured": measured.to_data() if measured else None,
        "seconds_per_step": measured.typical_step if measured else None,
        "seconds_per_image": trial.seconds_per_image,
        "overrun": trial.overrun or None,
        "error": trial.error,
    }
