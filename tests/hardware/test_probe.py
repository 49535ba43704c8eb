from __future__ import annotations

import datetime as dt
import os
import subprocess
import sys
from pathlib import Path

import pytest

from autoflux.hardware.probe import Surroundings, cached, probe
from autoflux.hardware.values import Hardware, Source
from tests.hardware import fakes
from tests.hardware.fakes import GB, FakeCard, FakeNvml, device_report, healthy_child, torch_report

MIB = 2**20


@pytest.fixture
def around(tmp_path: Path):
    """Make surroundings with a fake card; their cache lasts one test."""

    def make(measure: tuple[str, ...] | None = None, library: FakeNvml | None = None, **changes) -> Surroundings:
        return Surroundings(
            root=tmp_path / "root",
            nvml=library or FakeNvml(),
            measure=measure or healthy_child(device_report()),
            cache=changes.pop("cache", tmp_path / "cache"),
            sample_bytes=MIB,
            **changes,
        )

    return make


@pytest.fixture
def look(around, tmp_path: Path):
    """Probe with the arguments of `around`."""

    def look(*, refresh: bool = False, **changes) -> Hardware:
        return probe(refresh=refresh, models_path=tmp_path, surroundings=around(**changes))

    return look


CRASHES = fakes.child(then="sys.exit(3)")


def test_everything_together(look):
    found = look()
    (card,) = found.accelerators
    assert (card.name, card.device, card.driver) == ("Fake 4090", "cuda:0", "580.1")
    assert found.host.copy_gb_per_s is not None
    assert found.disk.read_gb_per_s is not None
    assert found.versions["driver"] == "580.1"
    assert found.versions["torch_cuda"] == "13.0"
    assert found.problems == ()
    assert dt.datetime.fromisoformat(found.probed_at).tzinfo is not None
    assert Hardware.from_json(found.to_json()) == found


def test_the_second_time_nothing_is_measured(look):
    first = look()
    second = look(measure=CRASHES)
    assert second.probed_at == first.probed_at
    assert second.accelerators == first.accelerators


def test_what_is_free_is_asked_every_time(look, around, tmp_path: Path):
    look()
    busy = FakeNvml([FakeCard(free=2 * GB)])
    assert look(library=busy, measure=CRASHES).accelerators[0].free_bytes.value == 2 * GB
    kept = cached(models_path=tmp_path, surroundings=around(library=busy))
    assert kept is not None
    assert kept.accelerators[0].free_bytes.value == 2 * GB


def test_refresh_measures_again(look):
    look()
    again = look(refresh=True, measure=healthy_child(device_report(matmul_tflops={"bfloat16": fakes.measured(7)})))
    assert again.accelerators[0].matmul_tflops["bfloat16"].value == 7


def test_another_card_is_another_machine(look):
    first = look()
    other = FakeNvml([FakeCard(uuid="GPU-cccc")])
    assert look(library=other, measure=healthy_child(device_report("cccc"))).fingerprint != first.fingerprint


def test_hidden_cards_are_another_machine(look, monkeypatch: pytest.MonkeyPatch):
    first = look()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    hidden = look(measure=healthy_child())
    assert hidden.fingerprint != first.fingerprint
    assert hidden.accelerators == ()
    assert hidden.problems == ()


def test_cached_is_none_before_the_first_probe(around, tmp_path: Path):
    assert cached(models_path=tmp_path, surroundings=around()) is None


def test_a_damaged_cache_is_said_and_written_anew(look, tmp_path: Path):
    look()
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_text("{ not json")
    assert [problem.subject for problem in look().problems] == ["cache"]
    assert look(measure=CRASHES).problems == ()


def test_a_cache_that_cannot_be_written(look, tmp_path: Path):
    (tmp_path / "file").write_text("")
    found = look(cache=tmp_path / "file")
    assert found.accelerators
    assert [problem.subject for problem in found.problems] == ["cache"]


def test_a_cache_that_cannot_be_written_any_more(look, tmp_path: Path):
    first = look()
    (tmp_path / "cache").chmod(0o500)
    if os.access(tmp_path / "cache", os.W_OK):
        pytest.skip("this user may write everywhere")
    again = look(measure=CRASHES)
    assert again.probed_at == first.probed_at
    assert [problem.subject for problem in again.problems] == ["cache"]


@pytest.mark.parametrize(
    ("measure", "words"),
    [
        (CRASHES, "code 3"),
        (fakes.child("rubbish"), "before it was done"),
        (
            fakes.child(torch_report(version=None, cuda=None, error="libcudart.so.13 not found"), fakes.Done()),
            "libcudart",
        ),
    ],
)
def test_failures_of_the_child_are_problems(look, measure, words: str):
    found = look(measure=measure)
    assert any(words in problem.message and problem.hint for problem in found.problems)


def test_a_hanging_child_leaves_the_card_unmeasured(look):
    found = look(measure=fakes.child(then="time.sleep(600)"), limit_seconds=1.0)
    (card,) = found.accelerators
    assert card.free_bytes.value == 23 * GB
    assert card.matmul_tflops == {}


def test_a_failure_is_not_kept_for_good(look, tmp_path: Path):
    failed = look(measure=CRASHES)
    assert look().accelerators[0].matmul_tflops == {}  # not tried again at once
    (kept,) = (tmp_path / "cache").iterdir()
    long_ago = (dt.datetime.now(dt.UTC) - dt.timedelta(days=1)).isoformat()
    kept.write_text(failed.replace(probed_at=long_ago).to_json())
    assert look().accelerators[0].matmul_tflops


DISTURBED = healthy_child(device_report(), share=0.4, tflops=0.07)
QUIET = healthy_child(device_report(), share=0.97, tflops=0.2)


def test_what_was_disturbed_is_said_and_measured_again_when_it_is_quiet(look):
    first = look(measure=DISTURBED)
    (problem,) = first.problems
    assert (problem.subject, first.disturbed) == ("load", 1)
    assert "other programs took 60% of the processors" in problem.message
    assert "measures again by itself" in (problem.hint or "")
    # As long as the others compute it is what there is.
    busy = look(measure=CRASHES, is_quiet=lambda cores: False)
    assert (busy.probed_at, busy.problems) == (first.probed_at, first.problems)
    again = look(measure=QUIET, is_quiet=lambda cores: cores == first.host.cores)
    assert (again.disturbed, again.problems) == (0, ())
    assert again.host.matmul_tflops["float32"].value == 0.2
    # And that is kept: whether it is quiet is not even asked.
    assert look(measure=CRASHES, is_quiet=lambda cores: 1 // 0).probed_at == again.probed_at


def test_what_was_measured_on_a_busy_card_is_measured_again_when_it_is_quiet(look):
    busy = FakeNvml(cards=[FakeCard(busy_percent=96)])
    first = look(library=busy)
    (problem,) = first.problems
    assert (problem.subject, first.disturbed) == ("load", 1)
    assert "other programs kept Fake 4090 busy 96% of the time" in problem.message
    assert look(library=busy, measure=CRASHES, is_quiet=lambda _cores: True).probed_at == first.probed_at
    again = look(library=FakeNvml(cards=[FakeCard(busy_percent=9)]), is_quiet=lambda _cores: True)
    assert (again.disturbed, again.problems) == (0, ())


def test_a_card_that_is_hidden_may_be_busy(look, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert look(library=FakeNvml(cards=[FakeCard(), FakeCard(uuid="GPU-bbbb", busy_percent=96)])).disturbed == 0


def test_a_machine_that_is_never_quiet_is_not_measured_for_ever(look):
    found = [look(measure=DISTURBED, is_quiet=lambda cores: True) for _ in range(3)]
    assert [hardware.disturbed for hardware in found] == [1, 2, 3]
    last = look(measure=CRASHES, is_quiet=lambda cores: True)
    assert last.disturbed == 3
    (problem,) = last.problems
    assert problem.hint == "end them, then `autoflux probe --refresh`"
    assert look(refresh=True, measure=QUIET).disturbed == 0


def test_a_quiet_measurement_is_no_problem(look):
    assert look(measure=healthy_child(device_report(), share=0.86)).problems == ()
    assert look(refresh=True, measure=healthy_child(device_report(), share=0.84)).disturbed == 1


def test_a_driver_that_does_not_answer(look):
    found = look(library=FakeNvml(errors={"nvmlInit": 999}), measure=healthy_child())
    assert [problem.subject for problem in found.problems] == ["nvml"]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Hardware:
    """This very machine, through the real child."""
    folder = tmp_path_factory.mktemp("real")
    return probe(models_path=folder, surroundings=Surroundings(cache=folder / "cache", sample_bytes=16 * MIB))


def test_this_machine(real: Hardware):
    assert not [problem for problem in real.problems if problem.subject in ("measuring", "torch", "cache")]
    assert real.host.cores >= 1
    assert 0 < real.host.available_bytes.value <= real.host.total_bytes.value
    assert real.host.copy_gb_per_s is not None
    assert real.host.copy_gb_per_s.source == Source.MEASURED
    assert real.host.matmul_tflops["float32"].value > 0
    assert real.disk.read_gb_per_s is not None
    assert real.versions["torch"]


def test_the_process_that_asks_never_imports_torch(tmp_path: Path):
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from autoflux.hardware.probe import Surroundings, cached, probe\n"
        f"around = Surroundings(cache=Path({str(tmp_path)!r}), measure={healthy_child()!r}, sample_bytes=1 << 20)\n"
        "probe(surroundings=around)\nassert cached(surroundings=around)\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
