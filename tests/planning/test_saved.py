"""Saved plans: read again, and refused where they do not hold."""

from __future__ import annotations

import json

import pytest

from autoflux.errors import DamagedFile, DoesNotFit, PlanUnusable
from autoflux.hardware.changes import Changes, changed
from autoflux.planning.planner import make_plan
from autoflux.planning.saved import check_plan, read_plan
from autoflux.planning.values import ComponentPlan, Wishes
from tests.conftest import GB, card
from tests.planning.test_planner import FLUX, PROFILES


@pytest.fixture
def hardware(machine):
    return machine(card(30))


@pytest.fixture
def plan(hardware):
    return make_plan(hardware, FLUX, PROFILES, Wishes(device="cuda"), ("diffusers",))


def envelope(data: object, **changes: object) -> str:
    return json.dumps({"schema": 1, "ok": True, "data": data, "error": None} | changes)


def test_a_plan_is_read_with_its_envelope_and_without(plan, hardware):
    for text in (plan.to_json(), envelope(plan.to_data())):
        assert read_plan(text, "'p.json'") == plan
    check_plan(plan, hardware, FLUX)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ('{"schema": 1', "not JSON"),
        ("[]", "as Plan"),
        ("null", "as Plan"),
        (b"\xff\xfe", "not JSON"),
        ('{"schema": 1}', "of version 1 and this autoflux reads version 2"),
        (envelope({"schema": 7}), "of version 7"),
        (envelope(None, ok=False, error={"code": "x", "message": "no card"}), "holds an error: no card"),
        (envelope(None, ok=False), "holds an error"),
        (envelope(None), "as Plan"),
    ],
)
def test_what_is_no_plan_is_refused_by_file(text, words):
    with pytest.raises(DamagedFile, match=words) as caught:
        read_plan(text, "'p.json'")
    assert caught.value.message.startswith("'p.json'")


def test_any_cut_of_a_plan_is_refused(plan):
    text = plan.to_json()
    for end in range(0, len(text) - 1, 97):
        with pytest.raises(DamagedFile):
            read_plan(text[:end], "'p.json'")


def test_a_plan_of_another_machine_is_refused(plan, hardware):
    with pytest.raises(PlanUnusable, match="other versions"):
        check_plan(plan, hardware.replace(fingerprint="other"), FLUX)
    foreign = plan.replace(machine="rtx-3060-12gb", fingerprint="that")
    with pytest.raises(PlanUnusable, match="'rtx-3060-12gb', and cannot be run on this one"):
        check_plan(foreign, hardware, FLUX)
    with pytest.raises(PlanUnusable):
        check_plan(plan, changed(hardware, Changes(vram_bytes=12 * GB)), FLUX)


def test_a_plan_of_another_model_is_refused(plan, hardware):
    with pytest.raises(PlanUnusable, match="one of its files changed"):
        check_plan(plan, hardware, FLUX.replace(revision="2"))
    without_vae = plan.replace(components=plan.components[:-1])
    with pytest.raises(PlanUnusable, match=r"consists of .*vae"):
        check_plan(without_vae, hardware, FLUX)


def test_a_plan_at_odds_with_itself_is_refused(plan, hardware):
    with pytest.raises(PlanUnusable, match="draws 0 pictures at once"):
        check_plan(plan.replace(max_batch=0), hardware, FLUX)
    parts: tuple[ComponentPlan, ...] = tuple(c.replace(resident=(99,)) for c in plan.components)
    with pytest.raises(PlanUnusable, match="keeps block 99"):
        check_plan(plan.replace(components=parts), hardware, FLUX)
    for device in ("cuda:1", "cuda:x", "tpu", ""):
        with pytest.raises(PlanUnusable, match="does not have"):
            check_plan(plan.replace(device=device), hardware, FLUX)


def test_a_plan_that_needs_more_than_is_free_now_is_refused(plan, hardware):
    (had,) = hardware.accelerators
    taken = had.replace(usable_bytes=had.usable_bytes.replace(value=10 * GB))
    with pytest.raises(DoesNotFit, match=r"memory on cuda:0 and 10\.0 GB are free"):
        check_plan(plan, hardware.replace(accelerators=(taken,)), FLUX)
    host = hardware.host.replace(available_bytes=hardware.host.available_bytes.replace(value=GB))
    with pytest.raises(DoesNotFit, match="of RAM"):
        check_plan(plan, hardware.replace(host=host), FLUX)
