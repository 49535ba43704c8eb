from __future__ import annotations

from pathlib import Path

import pytest

from autoflux.hardware import cache
from autoflux.hardware.values import Disk, Hardware, Host, Size, Source
from tests.conftest import figure

SIZE = Size(value=1, source=Source.REPORTED)
HARDWARE = Hardware(
    fingerprint="abc",
    probed_at="2026-01-01T00:00:00+00:00",
    versions={"torch": "2"},
    host=Host(system="s", processor="p", cores=1, total_bytes=SIZE, available_bytes=SIZE, pinnable_bytes=SIZE),
    disk=Disk(path="/", free_bytes=SIZE),
)


def test_kept_and_read_back(tmp_path: Path):
    assert cache.save(tmp_path / "new" / "folder", HARDWARE) == []
    assert cache.load(tmp_path / "new" / "folder", "abc") == (HARDWARE, [])


def test_nothing_kept_is_no_problem(tmp_path: Path):
    assert cache.load(tmp_path / "gone", "abc") == (None, [])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "\xff\xfe",
        HARDWARE.to_json()[:-40],
        HARDWARE.replace(fingerprint="other").to_json(),
        HARDWARE.replace(schema=99).to_json(),
        HARDWARE.to_json().replace('"fingerprint"', '"finger"'),
        HARDWARE.replace(host=HARDWARE.host.replace(matmul_tflops={"float32": figure(-3.0)})).to_json(),
    ],
)
def test_damaged_or_foreign_files_are_ignored_with_a_problem(tmp_path: Path, text: str):
    (tmp_path / "abc.json").write_bytes(text.encode("latin-1"))
    found, (problem,) = cache.load(tmp_path, "abc")
    assert found is None
    assert "ignored" in problem.message


def test_a_folder_in_place_of_the_file(tmp_path: Path):
    (tmp_path / "abc.json").mkdir()
    found, problems = cache.load(tmp_path, "abc")
    assert (found, len(problems)) == (None, 1)
    assert len(cache.save(tmp_path, HARDWARE)) == 1


def test_a_place_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    (problem,) = cache.save(tmp_path / "file" / "hardware", HARDWARE)
    assert "AUTOFLUX_CACHE_DIR" in (problem.hint or "")
    assert problem.message.count("cannot write") == 1
    assert cache.load(tmp_path / "file" / "hardware", "abc") == (None, [])


def test_looking_whether_a_place_can_be_written(tmp_path: Path):
    assert cache.check(tmp_path) == []
    (problem,) = cache.check(tmp_path / "gone")
    assert problem.subject == "cache"
    assert "AUTOFLUX_CACHE_DIR" in (problem.hint or "")


def test_fingerprints_differ_when_facts_do():
    one = cache.fingerprint({"torch": "2.11", "cards": ["a"]})
    assert one == cache.fingerprint({"cards": ["a"], "torch": "2.11"})
    assert one != cache.fingerprint({"cards": ["b"], "torch": "2.11"})
    assert len(one) == 16
