"""Which of several plans that were run is kept."""

from __future__ import annotations

import pytest

from autoflux.errors import ErrorReport
from autoflux.planning.calibration import Setting, Slower
from autoflux.planning.fitting import Measured
from autoflux.planning.tuning import Trial, fastest, learned
from autoflux.planning.values import PhaseBytes, Plan
from autoflux.testing import fake_hardware, fake_model, fake_plan

MODEL = fake_model()
FAILED = ErrorReport(code="out_of_memory", message="the device ran out of memory")


def named(backend: str, **changes: object) -> Plan:
    return fake_plan().replace(backend=backend, **changes)


def trial(backend: str, step: float, *, first: float | None = None, plan: Plan | None = None, **changes) -> Trial:
    facts = {"width": 128, "height": 128, "begin_seconds": 0.1, "finish_seconds": 0.1}
    steps = (step if first is None else first, step, step)
    measured = Measured(**facts | {"step_seconds": steps} | changes)
    return Trial(plan=plan or named(backend), measured=measured)


def test_a_picture_is_reckoned_from_its_parts_and_one_disturbed_step_does_not_count():
    ran = trial("a", 1.0, step_seconds=(3.0, 1.0, 1.0, 50.0, 1.0))
    assert ran.measured.typical_step == 1.0
    assert ran.seconds_per_image == pytest.approx(0.1 + 2.0 + 4 * 1.0 + 0.1)
    assert trial("a", 1.0, step_seconds=(3.0,)).measured.typical_step == 3.0


def test_the_fastest_is_that_whose_picture_is_done_first_not_whose_step_is():
    slow_decoder = trial("a", 1.0, finish_seconds=9.0)
    assert fastest([slow_decoder, trial("b", 2.0)]).plan.backend == "b"
    assert fastest([trial("a", 1.0), trial("b", 1.0)]).plan.backend == "a"
    assert fastest([]) is None


def test_compiling_counts_for_few_pictures_and_not_for_many():
    compiled = trial("a", 1.0, first=61.0, plan=named("a", compiled=True))
    eager = trial("b", 1.2)
    assert fastest([compiled, eager], pictures=1000).plan.backend == "a"
    assert fastest([compiled, eager], pictures=2).plan.backend == "b"


def test_what_failed_or_took_more_than_its_ceiling_is_not_kept():
    capped = named("greedy", vram_limit_bytes=1000)
    greedy = trial("greedy", 0.1, plan=capped, peak_vram_bytes=PhaseBytes(encode=1, denoise=1001, decode=1))
    hungry = trial("hungry", 0.1, plan=named("hungry", ram_limit_bytes=1000), peak_ram_bytes=1001)
    failed = Trial(plan=named("failed"), error=FAILED)
    assert "device memory" in greedy.overrun
    assert "RAM" in hungry.overrun
    assert fastest([greedy, hungry, failed, trial("modest", 5.0)]).plan.backend == "modest"
    assert fastest([greedy, hungry, failed]) is None


def test_what_was_learned_names_the_fastest_and_holds_what_all_took():
    known = learned(
        [trial("a", 2.0), trial("b", 1.0), Trial(plan=named("c"), error=FAILED)],
        MODEL,
        None,
        hardware=fake_hardware(),
        made_at="now",
    )
    assert (known.tuned.setting.backend, known.tuned.plans, known.tuned.seconds_per_step) == ("b", 2, 1.0)
    assert {times.backend for times in known.blocks} == {"a", "b"}
    assert (known.fingerprint, known.made_at) == ("fake", "now")


def test_one_plan_alone_is_measured_but_not_called_the_fastest():
    known = learned(
        [trial("a", 2.0), Trial(plan=named("c"), error=FAILED)], MODEL, None, hardware=fake_hardware(), made_at="now"
    )
    assert known.tuned is None
    assert known.steps == 2
    assert (
        learned([Trial(plan=named("c"), error=FAILED)], MODEL, known, hardware=fake_hardware(), made_at="later")
        is known
    )
    assert learned([], MODEL, None, hardware=fake_hardware(), made_at="now") is None


def test_an_earlier_verdict_against_the_fastest_is_dropped():
    first = learned([trial("a", 2.0), trial("b", 1.0)], MODEL, None, hardware=fake_hardware(), made_at="now")
    of_a, of_b = Setting.of(named("a")), Setting.of(named("b"))
    known = first.replace(slower=(Slower(setting=of_b, than=of_a), Slower(setting=of_a, than=of_b)))
    again = learned([trial("a", 2.0), trial("b", 1.0)], MODEL, known, hardware=fake_hardware(), made_at="later")
    assert again.slower == (Slower(setting=of_a, than=of_b),)
