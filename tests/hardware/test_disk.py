from __future__ import annotations

import os
from pathlib import Path

import pytest

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


def weights(path: Path, count: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(count))
    return path


def test_a_model_is_read_rather_than_a_sample(tmp_path: Path):
    weights(tmp_path / "flux" / "model.safetensors", 3 * MIB)
    full = Disk(path=str(tmp_path), free_bytes=Size(value=0, source=Source.REPORTED))
    found, problems = disk.measure(full, 2 * MIB)
    assert problems == []
    assert found.read_gb_per_s is not None
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["flux", "model.safetensors"]


def test_the_largest_file_of_weights_is_taken(tmp_path: Path):
    weights(tmp_path / "a.gguf", 2 * MIB)
    largest = weights(tmp_path / "hub" / "models--x" / "blobs" / "0123abcd", 3 * MIB)
    weights(tmp_path / "holiday.mp4", 4 * MIB)
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "holiday.mp4")
    with (tmp_path / "holes.safetensors").open("wb") as file:
        file.truncate(8 * MIB)
    assert disk.large_file(tmp_path, MIB) == largest
    assert disk.large_file(tmp_path, 9 * MIB) is None
    assert disk.large_file(tmp_path / "gone", 1) is None


def test_no_more_is_read_than_asked_for(tmp_path: Path):
    path = weights(tmp_path / "file", 40 * MIB)
    assert disk.read_rate(path, 16 * MIB).note.startswith("16.8 MB")
    assert disk.read_rate(path, 64 * MIB).note.startswith("41.9 MB")


def test_an_empty_file_has_no_rate(tmp_path: Path):
    with pytest.raises(ValueError, match="nothing could be read"):
        disk.read_rate(weights(tmp_path / "empty", 0), MIB)


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="asks Linux")
def test_whether_a_file_is_in_ram_is_seen(tmp_path: Path):
    path = weights(tmp_path / "file", 16 * MIB)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.pread(descriptor, 16 * MIB, 0)
        if disk.cached_share(descriptor, 16 * MIB) < 1:
            pytest.skip("this file system does not tell, or keeps nothing")
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        # Asked once only: the asking itself has the system read pages, which a second one would find.
        share = disk.cached_share(descriptor, 16 * MIB)
        if share == 1:
            pytest.skip("this file system lies in RAM")
        assert share < 0.5
    finally:
        os.close(descriptor)


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
