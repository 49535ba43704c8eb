"""What runs have measured, and what later plans make of it. All times are values; nothing is run."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoflux.errors import DamagedFile, DoesNotFit
from autoflux.hardware.known import known_machine
from autoflux.hardware.values import Hardware
from autoflux.models.values import Precision
from autoflux.planning.calibration import (
    BlockTimes,
    Calibration,
    CopyRates,
    FixedCosts,
    Setting,
    Slower,
    Tuned,
    Working,
)
from autoflux.planning.findings import Findings
from autoflux.planning.planner import make_plan, make_plans
from autoflux.planning.replay import image_seconds, step_seconds
from autoflux.planning.speed import Way
from autoflux.planning.terms import Offload, Origin, TransferUnit, Waiting
from autoflux.planning.values import Plan, Wishes
from tests.planning.test_planner import FLUX as WITHOUT_BLOCKS
from tests.planning.test_planner import PROFILES
from tests.planning.test_ways import MACHINES, SMALL, made_up

NOTHING = Calibration(
    fingerprint="test",
    probed_at="then",
    model="flux",
    model_revision="1",
    model_bytes=1,
    made_at="2026-11-24T10:00:00+00:00",
)
WIDE = Way(arithmetic=Precision.BFLOAT16, storage=Precision.BFLOAT16)
STREAMED = {"offload": Offload.STREAM, "quant": Precision.BFLOAT16, "compiled": False}
"""Wishes that leave one way to compute."""


def plan(calibration: Calibration | None = None, machine: Hardware | None = None, backends=("diffusers",), **wishes):
    wished = Wishes(**{"device": "cuda", "attention": "default", **wishes})
    return make_plan(
        machine or known_machine("rtx-3060-12gb"), SMALL, PROFILES, wished, backends, Findings(calibration=calibration)
    )


def ran(factor: float, steps: int = 10, device: str = "cuda:0", backend: str = "diffusers", **way) -> BlockTimes:
    """In bfloat16 and the default attention, but for what is said of the way."""
    return BlockTimes(device=device, backend=backend, way=WIDE.replace(**way), factor=factor, steps=steps)


def choice(made: Plan, topic: str):
    return next((c for c in made.choices if c.topic == topic), None)


def test_without_runs_nothing_is_said_of_them():
    made = plan(**STREAMED)
    assert made.calibrated is None
    assert not [c for c in made.choices if c.origin == Origin.CALIBRATED]
    assert plan(NOTHING, **STREAMED).predicted == made.predicted


def test_a_measured_way_takes_as_long_as_it_did_and_the_plan_says_so():
    before = plan(**STREAMED)
    made = plan(NOTHING.replace(blocks=(ran(1.5, steps=24),)), **STREAMED, device=None)
    assert made.predicted.block_seconds["double"] == pytest.approx(1.5 * before.predicted.block_seconds["double"])
    assert made.predicted.seconds_per_step > before.predicted.seconds_per_step
    said = choice(made, "prediction")
    assert said.origin == choice(made, "device").origin == Origin.CALIBRATED
    assert "calibrated on 2026-11-24 from 24 steps" in said.reason
    assert "1.5 times as long" in said.reason
    assert (made.calibrated.steps, made.calibrated.correction.blocks) == (24, 1.5)
    assert Plan.from_json(made.to_json()) == made


def test_a_way_that_did_not_run_shares_half_of_the_error():
    made = plan(NOTHING.replace(blocks=(ran(4.0, compiled=True),)), **STREAMED)
    assert made.calibrated.correction.blocks == pytest.approx(2.0)
    assert "has not run" in choice(made, "prediction").reason
    assert plan(NOTHING.replace(blocks=(ran(4.0, device="cuda:1"),)), **STREAMED).calibrated is None
    assert plan(NOTHING.replace(blocks=(ran(4.0, backend="other"),)), **STREAMED).calibrated is None


def test_copies_run_at_the_rate_that_was_measured_and_slower_places_stay_slower():
    before = plan(vram_bytes=3 * 10**9, **STREAMED)
    assert before.predicted.streamed_bytes > 0
    pinned = CopyRates(device="cuda:0", waiting=Waiting.PINNED, factor=0.5, steps=3)
    made = plan(NOTHING.replace(copies=(pinned,)), vram_bytes=3 * 10**9, **STREAMED)
    assert made.predicted.copy_gb_per_s == pytest.approx(before.predicted.copy_gb_per_s / 2)
    optimistic = pinned.replace(waiting=Waiting.PAGEABLE, factor=50.0)
    pageable = NOTHING.replace(copies=(pinned, optimistic))
    from_ram = plan(pageable, machine=with_little_pinned(), vram_bytes=3 * 10**9, **STREAMED)
    assert from_ram.waiting == Waiting.PAGEABLE
    assert from_ram.predicted.copy_gb_per_s <= made.predicted.copy_gb_per_s * 1.0001


def with_little_pinned() -> Hardware:
    machine = known_machine("rtx-3060-12gb")
    pinnable = machine.host.pinnable_bytes.replace(value=2 * 10**9)
    return machine.replace(host=machine.host.replace(pinnable_bytes=pinnable))


def test_fixed_costs_and_activations_take_the_place_of_what_is_assumed():
    before = plan(**STREAMED)
    fixed = FixedCosts(device="cuda:0", backend="diffusers", offload=Offload.STREAM, around=3.0, start=2.0)
    working = Working(device="cuda:0", backend="diffusers", denoise_activations=50.0)
    made = plan(NOTHING.replace(fixed=(fixed,), working=(working,)), **STREAMED)
    assert made.priors == before.priors.replace(denoise_activations=50.0)
    assert made.predicted.seconds_to_start == pytest.approx(2 * before.predicted.seconds_to_start)
    more = [
        p.predicted.seconds_per_image - p.predicted.picture.steps * p.predicted.seconds_per_step for p in (before, made)
    ]
    assert more[1] == pytest.approx(3 * more[0])


def test_the_tuned_setting_is_followed_while_it_is_nearly_the_fastest():
    plans = make_plans(
        known_machine("rtx-3060-12gb"), SMALL, PROFILES, Wishes(device="cuda"), ("diffusers", "diffsynth"), count=20
    )
    second = plans[1]
    tuned = Tuned(setting=Setting.of(second), made_at="2026-11-20T00:00:00", seconds_per_step=0.25, plans=4)
    known = NOTHING.replace(tuned=tuned)
    made = make_plan(
        known_machine("rtx-3060-12gb"),
        SMALL,
        PROFILES,
        Wishes(device="cuda"),
        ("diffusers", "diffsynth"),
        Findings(calibration=known),
    )
    assert Setting.of(made) == Setting.of(second) != Setting.of(plans[0])
    assert choice(made, "setting").reason == "the fastest of 4 that were run here on 2026-11-20: 250 ms a step"
    assert choice(made, "setting").origin == Origin.CALIBRATED


def test_a_tuned_setting_never_overrides_a_wish_nor_holds_when_it_is_far_slower():
    slow = Setting.of(plan(offload=Offload.STREAM, unit=TransferUnit.LAYER, quant=Precision.BFLOAT16))
    known = NOTHING.replace(tuned=Tuned(setting=slow, made_at="2026", seconds_per_step=1.0, plans=2))
    assert Setting.of(plan(known)) == Setting.of(plan())
    best = Setting.of(plan())
    known = NOTHING.replace(tuned=Tuned(setting=best, made_at="2026", seconds_per_step=1.0, plans=2))
    made = plan(known, **STREAMED)
    assert made.component("transformer").storage == Precision.BFLOAT16
    assert choice(made, "setting") is None


def test_what_was_slower_is_not_taken_again_where_what_was_faster_fits():
    best, second = make_plans(
        known_machine("rtx-3060-12gb"), SMALL, PROFILES, Wishes(device="cuda", attention="default"), ("d",), count=2
    )
    known = NOTHING.replace(slower=(Slower(setting=Setting.of(best), than=Setting.of(second)),))
    made = plan(known, backends=("d",))
    assert Setting.of(made) != Setting.of(best)
    assert "slower when it ran here" in " ".join(r.reason for r in made.rejected)
    same = NOTHING.replace(slower=(Slower(setting=Setting.of(best), than=Setting.of(best)),))
    assert Setting.of(plan(same, backends=("d",))) == Setting.of(best)
    both = known.replace(slower=(*known.slower, Slower(setting=Setting.of(second), than=Setting.of(best))))
    assert plan(both, backends=("d",)).predicted.seconds_per_image > 0


def test_the_plans_worth_running_differ_begin_with_the_best_and_try_other_backends():
    machine, wishes = known_machine("rtx-3060-12gb"), Wishes(device="cuda")
    plans = make_plans(machine, SMALL, PROFILES, wishes, ("diffusers", "diffsynth"), count=6)
    settings_ = [Setting.of(made) for made in plans]
    assert len(set(settings_)) == len(plans) > 2
    assert settings_[0] == Setting.of(make_plan(machine, SMALL, PROFILES, wishes, ("diffusers", "diffsynth")))
    assert [s.backend for s in settings_] == ["diffusers", "diffsynth", *["diffusers"] * (len(plans) - 2)]
    least = min(made.predicted.seconds_per_image for made in plans)
    assert all(made.predicted.seconds_per_image <= 2 * least for made in plans)
    wished = make_plans(
        machine, SMALL, PROFILES, wishes.replace(backend="diffsynth"), ("diffusers", "diffsynth"), count=3
    )
    assert {made.backend for made in wished} == {"diffsynth"}


def test_what_was_launched_says_as_much_of_what_is_replayed():
    known = NOTHING.replace(blocks=(ran(1.5),))
    (times,) = known.blocks
    for graphs, factor in ((False, 1.5), (True, 1.5)):
        way = times.way.replace(graphs=graphs)
        assert known.correction(times.device, Offload.STREAM, way, times.attention).blocks == factor
    assert not plan(known, **STREAMED).graphs, "it is not launching that takes long"


def test_what_ran_slowly_is_run_again_and_does_not_hide_what_never_ran():
    machine, wishes = known_machine("rtx-3060-12gb"), Wishes(device="cuda", attention="default", **STREAMED)
    known = NOTHING.replace(blocks=(ran(5.0),))
    plans = make_plans(
        machine, SMALL, PROFILES, wishes, ("diffusers", "diffsynth"), Findings(calibration=known), count=4
    )
    assert [made.backend for made in plans] == ["diffusers", "diffsynth"]
    assert plans[0].calibrated.correction.blocks == 5.0


@pytest.mark.parametrize(
    ("name", "wishes"),
    [
        ("rtx-3060-12gb", {"vram_bytes": 3 * 10**9, **STREAMED}),
        ("rtx-3060-12gb", {"vram_bytes": 3 * 10**9, **STREAMED, "block_bytes": 10**9}),
        ("rtx-3060-12gb", {"vram_bytes": 3 * 10**9, **STREAMED, "unit": TransferUnit.LAYER}),
        ("h200-141gb", {"offload": Offload.STREAM}),
        ("h200-141gb", {"offload": Offload.NONE}),
        ("h200-141gb", {"offload": Offload.NATIVE}),
    ],
)
def test_a_plan_replayed_takes_what_it_was_predicted_to(name, wishes):
    made = plan(machine=known_machine(name), **wishes)
    assert step_seconds(made, SMALL) == pytest.approx(made.predicted.seconds_per_step, rel=1e-6)
    assert image_seconds(made, made.predicted.seconds_per_step) == made.predicted.seconds_per_image
    assert step_seconds(made, SMALL, blocks=2.0) >= step_seconds(made, SMALL)
    four = made.predicted.picture.replace(batch=4)
    assert step_seconds(made, SMALL) <= step_seconds(made, SMALL, four) <= 4.0001 * step_seconds(made, SMALL)


def test_a_model_that_is_not_made_of_blocks_is_replayed_too():
    made = make_plan(
        known_machine("h200-141gb"), WITHOUT_BLOCKS, PROFILES, Wishes(offload=Offload.NONE), ("diffusers",)
    )
    step, pause = made.predicted.seconds_per_step, made.priors.pause_seconds
    assert step_seconds(made, WITHOUT_BLOCKS, blocks=2.0) == pytest.approx(pause + 2 * (step - pause))


FACTORS = st.floats(0.02, 60.0)


@settings(max_examples=50, deadline=None)
@given(factors=st.lists(FACTORS, max_size=4), copies=st.dictionaries(st.sampled_from(Waiting), FACTORS))
def test_a_calibration_is_the_same_after_json(factors, copies):
    known = NOTHING.replace(
        blocks=tuple(ran(factor, device=f"cuda:{i}") for i, factor in enumerate(factors)),
        copies=tuple(CopyRates(device="cuda:0", waiting=w, factor=f, steps=1) for w, f in copies.items()),
    )
    assert Calibration.from_json(known.to_json()) == known
    correction = known.correction("cuda:0", Offload.STREAM, WIDE, "default")
    assert 0.01 < correction.blocks < 100
    assert correction.copies == copies


@pytest.mark.parametrize("factor", ["0", "-1", "1e9", '"fast"', "null"])
def test_factors_that_cannot_be_are_refused(factor):
    text = NOTHING.replace(blocks=(ran(7.25),)).to_json().replace("7.25", factor)
    with pytest.raises(DamagedFile, match="blocks"):
        Calibration.from_json(text, origin="it")


@settings(max_examples=40, deadline=None)
@given(
    machine=MACHINES,
    better=st.sampled_from(["vram", "ram", "link"]),
    times=st.floats(1.0, 3.0),
    copies=st.dictionaries(st.sampled_from(Waiting), st.floats(0.3, 2.0)),
    blocks=st.floats(0.3, 2.0),
)
def test_more_memory_or_a_faster_link_gives_no_slower_plan_whatever_was_measured(
    machine, better, times, copies, blocks
):
    rates = tuple(CopyRates(device="cuda:0", waiting=w, factor=f, steps=1) for w, f in copies.items())
    known = NOTHING.replace(blocks=(ran(blocks),), copies=rates)

    def seconds(**changes: float) -> float:
        made = plan(known, made_up(**machine | changes), offload=Offload.STREAM, compiled=False)
        return made.predicted.seconds_per_image

    try:
        before = seconds()
    except DoesNotFit:
        return
    assert seconds(**{better: machine[better] * times}) <= before * 1.002
