from __future__ import annotations

from pathlib import Path

from autoflux.hardware import disk
from autoflux.hardware.values import Disk, Size, Source

MIB = 2**20


def test_the_rate_is_measured_and_nothing_is_left_behind(tmp_path: Path):
    found, problems = disk.measure(disk.read(tmp_path), 20 * MIB)
    assert problems == []
    assert found.read_gb_per_s is not None
    assert found.read_gb_per_s.source == Source.MEASURED
    assert found.read_gb_per_s.value > 0
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_among_models_if_there_is_another_place(tmp_path: Path):
    (tmp_path / "models").mkdir()
    before = (tmp_path / "models").stat().st_mtime_ns
    _, problems = disk.measure(disk.read(tmp_path / "models"), MIB, [tmp_path / "cache" / "not yet there"])
    assert problems == []
    assert (tmp_path / "models").stat().st_mtime_ns == before


def test_too_little_space(tmp_path: Path):
    full = Disk(path=str(tmp_path), free_bytes=Size(value=10**9, source=Source.REPORTED))
    found, (problem,) = disk.measure(full)
    assert found.read_gb_per_s is None
    assert "1.00 GB" in problem.message


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    gone = Disk(path=str(tmp_path / "gone"), free_bytes=Size(value=10**12, source=Source.REPORTED))
    found, (problem,) = disk.measure(gone)
    assert found.read_gb_per_s is None
    assert "gone" in problem.message


def test_a_folder_that_is_not_there_yet(tmp_path: Path):
    assert disk.read(tmp_path / "a" / "b").path == str(tmp_path)


def test_a_file_is_in_its_folder(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert disk.read(tmp_path / "model.safetensors").path == str(tmp_path)


def test_same_file_system(tmp_path: Path):
    assert disk.is_same(tmp_path, tmp_path.parent)
    assert not disk.is_same(tmp_path, tmp_path / "gone")
