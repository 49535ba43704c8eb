"""What the first pictures say of a plan, and when another one is worth a change. Times are values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoflux.hardware.load import LEAST_SHARE, MOST_DISTURBED
from autoflux.planning.calibration import Calibration
from autoflux.planning.fitting import Measured, calibrate
from autoflux.planning.judging import (
    ENOUGH_STEPS,
    GAIN,
    OFF,
    Before,
    Verdict,
    Watch,
    is_comparable,
    is_worth_a_change,
    remembered,
)
from autoflux.planning.values import Plan
from autoflux.testing import fake_hardware, fake_model, fake_plan

MODEL = fake_model()
KNOWN = Calibration(
    fingerprint="fake", probed_at="then", model="fake", model_revision="fake", model_bytes=1, made_at="now"
)


def predicted(step: float = 1.0, **changes: object) -> Plan:
    """A plan of 4 steps, with a second beside them."""
    made = fake_plan()
    return made.replace(
        predicted=made.predicted.replace(seconds_per_step=step, seconds_per_image=4 * step + 1.0), **changes
    )


def took(step: float, steps: int = ENOUGH_STEPS + 1, **changes: object) -> Measured:
    facts = {"width": 128, "height": 128, "begin_seconds": 0.5, "finish_seconds": 0.5}
    return Measured(**facts | {"step_seconds": (10 * step, *(step,) * (steps - 1))} | changes)


def watch(*measured: Measured, plan: Plan | None = None, before: Before | None = None) -> Watch:
    watched = Watch(plan=plan or predicted(), before=before)
    for one in measured:
        watched = watched.seen(one, MODEL)
    return watched


def test_few_steps_are_not_judged_however_wrong_they_are():
    assert watch().verdict(MODEL) == Verdict.WAIT
    early = watch(took(9.0, steps=4), took(9.0, steps=4))
    assert (early.steps, early.verdict(MODEL)) == (6, Verdict.WAIT)
    assert watch(*early.measured, took(9.0, steps=4)).verdict(MODEL) == Verdict.OFF


@given(ratio=st.floats(0.05, 20.0), batches=st.integers(1, 4))
def test_a_plan_holds_if_and_only_if_its_steps_are_near_the_prediction(ratio, batches):
    watched = watch(*[took(ratio)] * batches)
    assert watched.deviation(MODEL) == pytest.approx(ratio)
    verdict = watched.verdict(MODEL)
    if abs(abs(ratio - 1) - OFF) > 1e-6:
        assert verdict == (Verdict.HOLDS if abs(ratio - 1) <= OFF else Verdict.OFF)


@given(new=st.floats(0.1, 10.0), then=st.floats(1.1, 50.0))
def test_a_plan_on_trial_is_compared_with_the_one_before_and_not_with_its_prediction(new, then):
    on_trial = watch(took(new), before=Before(plan=predicted(), seconds_per_image=then))
    assert on_trial.verdict(MODEL) == (Verdict.SLOWER if 4 * new + 1.0 > then + 1e-9 else Verdict.HOLDS)


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("side", [96, 128, 160])
def test_other_sizes_and_batches_are_compared_with_what_they_should_take(side, batch):
    from autoflux.planning.replay import step_seconds

    picture = predicted().predicted.picture.replace(width=side, height=side, batch=batch)
    expected = step_seconds(predicted(), MODEL, picture)
    watched = watch(took(expected, width=side, height=side, batch=batch))
    assert watched.deviation(MODEL) == pytest.approx(1.0)
    assert watched.verdict(MODEL) == Verdict.HOLDS


def test_what_says_nothing_is_left_out():
    far = took(9.0, width=1024, height=1024)
    assert not is_comparable(predicted(), MODEL, far)
    assert not is_comparable(predicted(), MODEL, took(9.0, steps=1))
    assert not is_comparable(predicted(), MODEL, took(0.0))
    assert watch(far, took(9.0, steps=1)).measured == ()


@pytest.mark.parametrize(("share", "judged"), [(None, True), (1.0, True), (LEAST_SHARE, True), (0.5, False)])
def test_what_was_drawn_while_others_computed_is_left_out(share, judged):
    assert bool(watch(took(9.0, processor_share=share)).measured) == judged


def test_on_a_machine_that_is_always_busy_the_next_pictures_count():
    busy = took(9.0, processor_share=0.1)
    assert watch(*[busy] * MOST_DISTURBED).measured == ()
    assert watch(*[busy] * (MOST_DISTURBED + 2)).measured == (busy, busy)


OTHER = "another backend"


@given(measured=st.floats(0.2, 5.0), step=st.floats(0.2, 5.0))
def test_another_plan_is_worth_a_change_only_if_predicted_faster_than_this_one_was_measured(measured, step):
    watched, new = watch(took(measured)), predicted(step, backend=OTHER)
    gain = 1 - (4 * step + 1) / (4 * measured + 1)
    if abs(gain - GAIN) > 1e-6:
        assert is_worth_a_change(watched, new, MODEL, KNOWN) == (gain > GAIN)


def test_the_same_plan_is_no_change_and_what_was_slower_is_not_tried_again():
    watched, new = watch(took(9.0)), predicted(backend=OTHER)
    assert is_worth_a_change(watched, new, MODEL, KNOWN)
    assert not is_worth_a_change(watched, watched.plan, MODEL, KNOWN)
    assert not is_worth_a_change(watched, predicted(0.1), MODEL, KNOWN)
    known = KNOWN.replace(slower=(remembered(new, watched.plan),))
    assert not is_worth_a_change(watched, new, MODEL, known)
    moved = watched.plan.replace(ring_bytes=1)
    assert is_worth_a_change(watched, moved, MODEL, known)
    known = KNOWN.replace(slower=(remembered(moved, watched.plan),))
    assert not is_worth_a_change(watched, moved, MODEL, known)


def test_what_was_watched_can_be_fitted():
    watched = watch(took(2.0), took(2.0))
    known = calibrate(MODEL, watched.runs, None, hardware=fake_hardware(), made_at="now")
    assert known.blocks[0].factor == pytest.approx(2.0, rel=1e-3)
    assert known.steps == 2 * ENOUGH_STEPS
