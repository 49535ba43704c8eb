"""A plan run once in a process of its own: what it took, and every way it can fail."""

from __future__ import annotations

import psutil
import pytest

from autoflux.models.request import Order, make_requests
from autoflux.planning.tuning import Trial
from autoflux.planning.values import Plan
from autoflux.serving.process import Deadlines
from autoflux.serving.trial import run_trial
from autoflux.testing import BEHAVIOUR_VARIABLE, BUG, CRASH, FAIL, HANG, Behaviour, fake_model, fake_plan


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    """Run the fake's plan and see to it that no process is left."""
    monkeypatch.setenv("AUTOFLUX_PLUGINS", "autoflux.testing")
    before = set(psutil.Process().children())

    def run(prompt: str = "a", plan: Plan | None = None, behaviour: Behaviour | None = None, **options) -> Trial:
        monkeypatch.setenv(BEHAVIOUR_VARIABLE, (behaviour or Behaviour()).to_json())
        requests = make_requests(fake_model(), Order(prompt=prompt, seed=0, steps=3, count=2))
        return run_trial(plan or fake_plan(), fake_model(), requests, **options)

    yield run
    left = set(psutil.Process().children()) - before
    assert not [child for child in left if "spawn_main" in " ".join(child.cmdline())]


def test_it_is_measured_part_by_part(run):
    stages = []
    trial = run(behaviour=Behaviour(step_seconds=0.01), on_stage=stages.append)
    measured = trial.measured
    assert (measured.batch, len(measured.step_seconds), measured.encoded) == (2, 3, True)
    assert measured.typical_step >= 0.01
    assert measured.start_seconds > 0
    assert trial.error is None
    assert stages[-1] == "step 6 of 6"
    assert "loading the fake" in stages


@pytest.mark.parametrize(
    ("prompt", "code", "words"),
    [
        (FAIL, "out_of_memory", "ran out of memory"),
        (BUG, "internal", "this is a bug"),
        (CRASH, "worker_died", "exit code 9"),
    ],
)
def test_a_failure_is_its_answer(run, prompt, code, words):
    trial = run(prompt)
    assert (trial.measured, trial.error.code) == (None, code)
    assert words in trial.error.message


def test_what_cannot_be_built_says_why(run):
    assert run(behaviour=Behaviour(broken=True)).error.code == "damaged_checkpoint"
    assert run(plan=fake_plan().replace(backend="unknown")).error.code == "unknown_name"


def test_a_trial_that_hangs_is_ended(run):
    trial = run(HANG, deadlines=Deadlines(step_seconds=0.5, idle_seconds=0.5))
    assert trial.error.code == "worker_hung"


def test_interrupted_it_ends_its_process_first(run):
    def interrupt(stage: str) -> None:
        if stage.startswith("step"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(behaviour=Behaviour(step_seconds=0.05), on_stage=interrupt)
