"""Which library builds the pipeline, and what the plan says of it."""

from __future__ import annotations

import pytest

from autoflux.errors import UnknownName, UnsupportedModel
from autoflux.planning.backends import BackendFacts
from autoflux.planning.findings import Findings
from autoflux.planning.planner import make_plan
from autoflux.planning.values import Plan, Wishes
from tests.conftest import card
from tests.planning.test_planner import FLUX, PROFILES

BOTH = ("first", "second")


def plan(machine, *facts: BackendFacts, backends=BOTH, **wishes) -> Plan:
    return make_plan(machine(card(48)), FLUX, PROFILES, Wishes(**wishes), backends, Findings(facts=facts))


def reason(made: Plan) -> str:
    return next(choice.reason for choice in made.choices if choice.topic == "backend")


def test_the_quickest_start_is_taken_and_its_seconds_are_predicted(machine):
    made = plan(machine, BackendFacts(name="first", start_seconds=9.0), BackendFacts(name="second", start_seconds=2.0))
    assert made.backend == "second"
    assert "first starts 7" in reason(made)
    assert "a step takes as long with each" in reason(made)
    alone = plan(machine, backends=("second",))
    assert made.predicted.seconds_to_start == pytest.approx(alone.predicted.seconds_to_start + 2.0)
    assert made.predicted.seconds_per_step == alone.predicted.seconds_per_step


def test_of_equals_the_first_is_taken(machine):
    assert plan(machine).backend == "first"
    assert plan(machine, backends=("second", "first")).backend == "second"
    assert reason(plan(machine, backends=("second",))) == "the only one that is installed"


def test_one_that_cannot_run_the_model_is_left_out_and_the_reason_says_why(machine):
    made = plan(machine, BackendFacts(name="first", refuses="it reads no such files"))
    assert made.backend == "second"
    assert reason(made) == "first cannot: it reads no such files"


def test_a_wish_is_kept_whatever_is_predicted(machine):
    made = plan(machine, BackendFacts(name="first", refuses="no", start_seconds=9.0), backend="first")
    assert (made.backend, reason(made)) == ("first", "you asked for it")
    with pytest.raises(UnknownName, match="third"):
        plan(machine, backend="third")


def test_what_nobody_can_run_is_refused_by_name(machine):
    with pytest.raises(UnsupportedModel, match="'first': it reads no such files"):
        plan(machine, BackendFacts(name="first", refuses="it reads no such files"), backends=("first",))


def test_facts_of_a_backend_that_is_not_installed_mean_nothing(machine):
    made = plan(machine, BackendFacts(name="third"))
    assert "third" not in reason(made)
