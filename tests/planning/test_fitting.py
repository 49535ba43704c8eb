"""From measured times to a calibration: what is put in as values comes out as factors, and predictions come true."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoflux.hardware.changes import Changes, changed
from autoflux.hardware.known import known_machine
from autoflux.hardware.values import Hardware
from autoflux.models.values import Precision
from autoflux.planning.activations import activations, hoisted_bytes
from autoflux.planning.calibration import Calibration
from autoflux.planning.findings import Findings
from autoflux.planning.fitting import LIMIT, RESERVE, Measured, Run, calibrate
from autoflux.planning.planner import make_plan
from autoflux.planning.replay import step_seconds
from autoflux.planning.terms import Offload, TransferUnit, Waiting
from autoflux.planning.values import PhaseBytes, Plan, Wishes
from autoflux.testing import fake_hardware
from tests.conftest import GB
from tests.planning.test_planner import PROFILES
from tests.planning.test_ways import SMALL

MACHINE = changed(known_machine("rtx-3060-12gb"), Changes(link_gb_per_s=6.0))


def plan(calibration: Calibration | None = None, *, machine: Hardware = MACHINE, **wishes) -> Plan:
    wished = Wishes(
        **{"device": "cuda", "offload": Offload.STREAM, "quant": Precision.BFLOAT16, "compiled": False, **wishes}
    )
    return make_plan(machine, SMALL, PROFILES, wished, ("diffusers",), Findings(calibration=calibration))


ALL_STAY, STREAMED = plan(), plan(vram_bytes=int(2.5 * GB), unit=TransferUnit.BLOCK)
COPYING = plan(machine=changed(MACHINE, Changes(link_gb_per_s=2.0)), vram_bytes=int(2.4 * GB))


def measured(step: float, made: Plan = ALL_STAY, steps: int = 5, **changes) -> Measured:
    """A run whose steps took so long, but for the first, which took a second more."""
    picture = made.predicted.picture
    facts = {
        "width": picture.width,
        "height": picture.height,
        "begin_seconds": 1.0,
        "step_seconds": (step + 1.0, *(step,) * (steps - 1)),
        "finish_seconds": 0.5,
    }
    return Measured(**facts | changes)


HERE = fake_hardware().replace(fingerprint="f")


def fitted(*runs: Run, known: Calibration | None = None) -> Calibration:
    return calibrate(SMALL, runs, known, hardware=HERE, made_at="2026-11-24T10:00:00")


def ran(made: Plan, **factors: float) -> Run:
    """As if blocks and copies had had those factors."""
    return Run(plan=made, measured=measured(step_seconds(made, SMALL, **factors), made))


def test_what_the_first_steps_take_is_not_typical():
    recorded = measured(0.3, step_seconds=(0.8, 0.6, 0.3, 0.3), unsettled=2)
    assert recorded.typical_step == 0.3
    assert recorded.first_excess == pytest.approx(0.8)
    assert measured(0.3, step_seconds=(0.8, 0.6), unsettled=2).typical_step == 0.6
    kept, anew = (ALL_STAY.replace(graphs=True, park_for_decode=parked) for parked in (False, True))
    assert recorded.seconds_per_image(anew) - recorded.seconds_per_image(kept) == pytest.approx(0.8)


def test_memory_that_graphs_keep_is_not_taken_for_the_decoder_s():
    plain = ALL_STAY.replace(graphs=False)
    kept = plain.replace(graphs=True)
    computed = activations(SMALL, plain.arrangement, plain.priors, plain.predicted.picture)
    assert activations(SMALL, kept.arrangement, kept.priors, kept.predicted.picture) == computed
    for made in (plain, kept):
        planned = made.predicted.peak_vram_bytes
        peaks = planned.replace(decode=planned.decode + computed.decode // 10)
        (working,) = fitted(Run(plan=made, measured=measured(0.3, made, peak_vram_bytes=peaks))).working
        assert working.decode_activations == pytest.approx(RESERVE * 1.1 * made.priors.decode_activations, rel=1e-3)


@pytest.mark.parametrize("steps", [3, 28])
def test_modulation_of_steps_that_were_not_drawn_is_not_taken_for_less_activations(steps):
    """Tuning draws fewer steps than are planned for."""
    planned, picture = STREAMED.predicted.peak_vram_bytes, STREAMED.predicted.picture
    all_steps, drawn = (
        hoisted_bytes(SMALL, STREAMED.arrangement, picture.replace(steps=count)) for count in (picture.steps, steps)
    )
    assert (drawn < all_steps) == (steps < 28)
    peaks = planned.replace(denoise=planned.denoise - all_steps + drawn)
    (working,) = fitted(Run(plan=STREAMED, measured=measured(0.3, STREAMED, steps, peak_vram_bytes=peaks))).working
    assert working.denoise_activations == pytest.approx(RESERVE * STREAMED.priors.denoise_activations, rel=1e-3)


def test_the_plans_of_these_tests_are_bound_by_different_things():
    def shares(made: Plan) -> tuple[float, float]:
        """How much of a step is saved when blocks or copies take half as long."""
        whole = made.predicted.seconds_per_step
        return 1 - step_seconds(made, SMALL, blocks=0.5) / whole, 1 - step_seconds(made, SMALL, copies=2.0) / whole

    in_blocks = 1 - ALL_STAY.priors.pause_seconds / ALL_STAY.predicted.seconds_per_step
    assert shares(ALL_STAY) == (pytest.approx(0.5 * in_blocks), 0.0)
    assert 0.9 < in_blocks < 1
    assert shares(STREAMED)[0] > shares(STREAMED)[1] > 0.01
    assert shares(COPYING)[1] > shares(COPYING)[0] > 0.01


def test_one_run_corrects_what_it_was_bound_by():
    known = fitted(ran(ALL_STAY, blocks=1.4))
    (times,) = known.blocks
    assert (times.factor, times.steps, known.copies) == (pytest.approx(1.4, rel=1e-3), 4, ())
    assert (known.model_bytes, known.model_revision, known.fingerprint) == (SMALL.disk_bytes, SMALL.revision, "f")
    assert known.probed_at == HERE.probed_at


@pytest.mark.parametrize(("made", "factors"), [(STREAMED, {"blocks": 1.1}), (COPYING, {"copies": 0.9})])
def test_one_step_is_blamed_on_what_it_depends_on_most(made, factors):
    known = fitted(ran(made, **factors))
    found = [next((item.factor for item in items), 1.0) for items in (known.blocks, known.copies)]
    assert found == pytest.approx([factors.get("blocks", 1.0), factors.get("copies", 1.0)], rel=0.02)


@settings(max_examples=30, deadline=None)
@given(blocks=st.floats(0.4, 2.5), copies=st.floats(0.3, 1.6))
def test_after_fitting_several_runs_each_is_predicted_as_it_was(blocks, copies):
    plans = (ALL_STAY, STREAMED, COPYING)
    runs = [ran(made, blocks=blocks, copies=copies) for made in plans]
    known = fitted(*runs)
    assert known.blocks[0].factor == pytest.approx(blocks, rel=0.01)
    correction = known.correction("cuda:0", Offload.STREAM, runs[0].blocks_key.way, ALL_STAY.attention)
    for run in runs:
        again = step_seconds(
            run.plan, SMALL, blocks=correction.blocks, copies=correction.copies.get(Waiting.PINNED, 1.0)
        )
        assert again == pytest.approx(run.measured.typical_step, rel=0.02)


@settings(max_examples=60, deadline=None)
@given(step=st.floats(1e-4, 1e4), which=st.sampled_from([ALL_STAY, STREAMED, COPYING]))
def test_whatever_a_step_took_the_factors_stay_in_bounds_and_can_be_kept(step, which):
    known = fitted(Run(plan=which, measured=measured(step, which)))
    factors = [item.factor for item in (*known.blocks, *known.copies)]
    assert factors
    assert all(1 / LIMIT <= factor <= LIMIT for factor in factors)
    assert Calibration.from_json(known.to_json()) == known


def test_a_plan_made_with_a_calibration_is_fitted_to_the_same_one():
    first = fitted(ran(ALL_STAY, blocks=1.4))
    made = plan(first)
    assert made.predicted.seconds_per_step == pytest.approx(step_seconds(ALL_STAY, SMALL, blocks=1.4), rel=1e-3)
    again = fitted(Run(plan=made, measured=measured(made.predicted.seconds_per_step, made)), known=first)
    assert again.blocks[0].factor == pytest.approx(1.4, rel=1e-3)
    slower = fitted(Run(plan=made, measured=measured(step_seconds(made, SMALL, blocks=2.0), made)), known=first)
    assert slower.blocks[0].factor == pytest.approx(2.8, rel=1e-3)


def test_what_is_known_of_other_ways_is_kept():
    first = fitted(ran(ALL_STAY, blocks=1.4))
    compiled = plan(compiled=True)
    second = fitted(ran(compiled, blocks=0.9), known=first)
    assert {times.way.compiled: round(times.factor, 2) for times in second.blocks} == {False: 1.4, True: 0.9}
    assert second.steps == 8


def test_another_size_or_batch_says_the_same_of_the_blocks():
    picture = ALL_STAY.predicted.picture.replace(width=768, height=768, batch=2)
    took = step_seconds(ALL_STAY, SMALL, picture, blocks=1.3)
    run = Run(plan=ALL_STAY, measured=measured(took, width=768, height=768, batch=2))
    assert fitted(run).blocks[0].factor == pytest.approx(1.3, rel=1e-3)
    assert fitted(run).fixed == ()


def test_what_a_picture_takes_beside_its_steps_is_fitted_for_the_size_that_was_planned():
    steps = ALL_STAY.predicted.picture.steps
    expected = ALL_STAY.predicted.seconds_per_image - steps * ALL_STAY.predicted.seconds_per_step
    (fixed,) = fitted(Run(plan=ALL_STAY, measured=measured(0.3, start_seconds=20.0))).fixed
    assert fixed.around == pytest.approx((1.0 + 1.0 + 0.5) / expected)
    assert fixed.start == pytest.approx(20.0 / ALL_STAY.predicted.seconds_to_start)
    assert fitted(Run(plan=ALL_STAY, measured=measured(0.3, encoded=False))).fixed == ()


def test_the_first_step_of_a_compiled_plan_belongs_to_the_start():
    compiled = plan(compiled=True)
    run = Run(plan=compiled, measured=measured(0.3, compiled, start_seconds=20.0))
    (fixed,) = fitted(run).fixed
    assert fixed.start == pytest.approx(21.0 / compiled.predicted.seconds_to_start)
    assert run.measured.seconds_per_image(compiled) == pytest.approx(1.5 + 0.3 * compiled.predicted.picture.steps)


def test_activations_explain_the_measured_peak_with_a_reserve():
    peaks = ALL_STAY.predicted.peak_vram_bytes
    more = peaks.replace(denoise=peaks.denoise + GB // 10, decode=peaks.decode - GB // 2)
    known = fitted(Run(plan=ALL_STAY, measured=measured(0.3, peak_vram_bytes=more)))
    made = plan(known)
    assert made.priors.denoise_activations > ALL_STAY.priors.denoise_activations
    assert made.priors.decode_activations < ALL_STAY.priors.decode_activations
    wild = PhaseBytes(encode=0, denoise=10**15, decode=0)
    (working,) = fitted(Run(plan=ALL_STAY, measured=measured(0.3, peak_vram_bytes=wild))).working
    assert working.denoise_activations == 4 * ALL_STAY.priors.denoise_activations
    same = fitted(Run(plan=ALL_STAY, measured=measured(0.3, steps=28, peak_vram_bytes=peaks))).working[0]
    assert same.denoise_activations == pytest.approx(RESERVE * ALL_STAY.priors.denoise_activations)


def test_a_librarys_own_offload_says_nothing_of_blocks():
    native = plan(offload=Offload.NATIVE, quant=None)
    known = fitted(Run(plan=native, measured=measured(5.0, native)))
    assert (known.blocks, known.copies) == ((), ())
    assert plan(known, offload=Offload.NATIVE, quant=None).predicted.seconds_per_step == pytest.approx(
        native.predicted.seconds_per_step
    )
