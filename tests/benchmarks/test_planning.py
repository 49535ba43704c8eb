"""The measurement of plans against runs: the whole of it with a miniature, and what its rows come to."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import pytest

from autoflux.planning.terms import Quality
from benchmarks import planning
from benchmarks.planning_report import (
    CAPS_GB,
    QUALITIES,
    Figures,
    Report,
    Row,
    Setting,
    resume,
    settings,
    summary,
    telling,
)
from tests.conftest import GB


@pytest.fixture
def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the benchmark's miniature; gives its exit code, what it wrote, and what it printed."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    file = tmp_path / "rows.json"

    def run(*arguments: str) -> tuple[int, dict, str]:
        code = planning.main(["--tiny", "--steps", "1", "--json", str(file), *arguments])
        printed = capsys.readouterr()
        return code, json.loads(file.read_bytes()) if file.exists() else {}, printed.out + printed.err

    return run


def test_rows_are_planned_run_and_written_and_not_run_again(measure):
    code, report, printed = measure("--caps", "1.115")
    assert code == 0
    rows = report["rows"]
    assert len(rows) == 4
    refused = [row for row in rows if row["refused"]]
    assert {row["setting"]["batch"] for row in refused} == {2}
    assert all("needs 1.12 GB of device memory" in row["error"] for row in refused)
    run = [row for row in rows if not row["refused"]]
    assert {row["setting"]["quality"] for row in run} == {"exact", "balanced"}
    assert {row["way"]["offload"] for row in run} == {"stream"}
    assert all(row["error"] is None and row["measured"]["seconds_per_step"] > 0 for row in run)
    # All weights of the miniature lie in RAM beside, and are not counted.
    assert all(0 < row["measured"]["peak_ram_bytes"] < 20 * GB for row in run)
    assert report["summary"]["all"]["measured"] == len(run)
    assert "say nothing" in printed
    again = measure("--caps", "1.115", "--minutes", "1e-9")
    assert (again[0], again[1]["rows"]) == (0, rows)


def test_files_are_put_together(measure, tmp_path):
    _, low, _ = measure("--caps", "1.115", "--quality", "exact")
    parts = [tmp_path / "low.json", tmp_path / "high.json"]
    (tmp_path / "rows.json").rename(parts[0])
    _, high, _ = measure("--caps", "1.23", "1.115", "--quality", "exact")
    (tmp_path / "rows.json").rename(parts[1])
    assert planning.main(["--merge", *map(str, parts), "--json", str(tmp_path / "all.json")]) == 0
    merged = json.loads((tmp_path / "all.json").read_bytes())
    assert [row["setting"]["cap_gb"] for row in merged["rows"]] == [1.115, 1.115, 1.23, 1.23]
    assert merged["rows"][:2] == low["rows"]
    assert merged["summary"]["exact"]["measured"] == high["summary"]["exact"]["measured"]


def test_files_of_different_machines_are_not_put_together(tmp_path, capsys):
    for name in ("one", "other"):
        Report(machine={"device": name}).save(tmp_path / f"{name}.json")
    assert planning.main(["--merge", str(tmp_path / "one.json"), str(tmp_path / "other.json")]) == 2
    assert "the first file those of" in capsys.readouterr().err
    assert planning.main(["--merge", str(tmp_path / "none.json")]) == 1
    assert "no report of this benchmark" in capsys.readouterr().err


def test_what_there_is_no_time_for_is_left_to_the_next_call(measure):
    code, report, printed = measure("--minutes", "1e-9")
    assert (code, report["rows"]) == (75, [])
    assert "call again" in printed


def test_alternatives_are_run_and_the_best_told(measure):
    code, report, printed = measure("--regret", "3", "--direct")
    assert code == 0
    chosen, *others = report["rows"]
    assert chosen["alternative"] == ""
    assert len({row["alternative"] for row in others}) == 3
    assert all(row["alternative"].startswith("--") and row["measured"] for row in others)
    ways = [json.dumps(row["way"], sort_keys=True) for row in report["rows"]]
    assert len(set(ways)) == 4
    (regret,) = report["summary"]["regret"]
    assert regret["alternatives"] == 3
    assert regret["best_seconds_per_image"] == min(row["measured"]["seconds_per_image"] for row in others)
    assert f"regret {regret['regret']:.1%}" in printed


def test_a_file_of_another_machine_or_of_nothing_is_refused(measure, tmp_path):
    (tmp_path / "rows.json").write_text("[]")
    assert planning.main(["--tiny", "--json", str(tmp_path / "rows.json")]) == 1
    (tmp_path / "rows.json").write_bytes(msgspec.json.encode(Report(machine={"device": "another"})))
    code, report, printed = measure()
    assert (code, report["rows"]) == (2, [])
    assert "holds rows of {'device': 'another'}" in printed


def figures(**changes: float) -> Figures:
    usual = {"seconds_per_step": 1.0, "seconds_per_image": 30.0, "peak_vram_bytes": 10 * GB, "peak_ram_bytes": 20 * GB}
    return Figures(**(usual | changes))


def row(number: int, *, alternative: str = "", quality: Quality = Quality.EXACT, **taken: float) -> Row:
    setting = Setting(cap_gb=number, quality=quality, width=64, height=64, batch=1)
    return Row(setting=setting, alternative=alternative, predicted=figures(), measured=figures(**taken))


def test_rows_come_to_errors_shares_and_regret():
    rows = [
        row(1, seconds_per_step=1.25, peak_vram_bytes=8 * GB),
        row(2, seconds_per_step=0.8),
        row(3, peak_vram_bytes=11 * GB, quality=Quality.BALANCED),
        row(3, alternative="--keep vae", seconds_per_image=20.0, quality=Quality.BALANCED),
        row(3, alternative="--compile", seconds_per_image=40.0, quality=Quality.BALANCED),
        Row(setting=row(4).setting, error="needs more", refused=True),
        Row(setting=row(5).setting, error="OutOfMemory: gone"),
    ]
    every = summary(rows)
    assert (every["all"]["measured"], every["all"]["refused"]) == (3, 1)
    assert every["all"]["failed"] == [rows[-1].setting.name]
    assert every["all"]["median_step_error"] == pytest.approx(0.2)
    assert (every["all"]["worst_step_error"], every["all"]["worst_step"]) == (pytest.approx(0.25), rows[1].setting.name)
    vram = every["all"]["vram"]
    assert vram["above_planned"] == [rows[2].setting.name]
    assert (vram["lowest_planned_share"], vram["highest_planned_share"]) == (pytest.approx(10 / 11), 1.25)
    assert (every["exact"]["measured"], every["balanced"]["measured"]) == (2, 1)
    (regret,) = every["regret"]
    assert (regret["regret"], regret["best_alternative"]) == (pytest.approx(0.5), "--keep vae")
    assert summary([])["all"]["measured"] == 0


def test_where_torch_gave_memory_back_is_told_as_far_as_it_was_counted(capsys):
    counts = (None, 0, 3)
    rows = [msgspec.structs.replace(row(number), given_back=count) for number, count in enumerate(counts)]
    planning.show(Report(machine={}, rows=rows, summary=summary(rows)))
    assert f"gave memory back in {rows[2].setting.name} (of 2 where" in capsys.readouterr().out


def test_what_tensors_took_of_the_plan_is_told_where_there_is_a_card(capsys):
    taken = {"context_bytes": GB, "allocated_bytes": {"encode": 3 * GB, "denoise": 7 * GB}}
    rows = [msgspec.structs.replace(row(1), **taken), row(2)]
    made = summary(rows)
    assert made["all"]["tensors"] == {"lowest_share": 0.8, "highest_share": 0.8}
    assert made["balanced"]["tensors"] == {"lowest_share": None, "highest_share": None}
    planning.show(Report(machine={}, rows=rows, summary=made))
    assert "tensors and the context took 0.800 to 0.800 of what was planned" in capsys.readouterr().out


def test_a_report_is_read_as_it_was_written(tmp_path):
    report = Report(machine={"device": "H200"}, rows=[row(1), row(2, alternative="--keep vae")])
    report.save(tmp_path / "rows.json")
    found = resume(tmp_path / "rows.json", {"device": "H200"})
    assert (found.rows, found.done) == (report.rows, {r.key for r in report.rows})
    assert resume(tmp_path / "none.json", {}).rows == []


def test_the_telling_settings_are_among_all_and_caps_beyond_the_card_are_left_out():
    every = settings(CAPS_GB, planning.SIZES, planning.BATCHES)
    assert len(every) == len(set(every)) == 108
    quick = telling(150.0)
    assert len(quick) == len(set(quick)) == 12
    assert set(quick) <= set(every)
    assert {s.quality for s in quick} == set(QUALITIES)
    assert {(s.width, s.height) for s in quick} == set(planning.SIZES)
    assert {s.batch for s in quick} == set(planning.BATCHES)
    assert all(s.cap_gb <= 80 for s in telling(80.0))
