"""What starts are held to, and the model that is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.starts import HOT_SECONDS, Start, checks, write_model


def start(way: str, *, cold: bool, seconds: float) -> Start:
    return Start(way=way, cold=cold, first_picture_seconds=seconds, read_gb=17.0, read_seconds=20.0)


@pytest.mark.parametrize(("cold", "bound"), [(True, 1.15 * 20 + 5), (False, HOT_SECONDS)])
def test_only_packed_starts_are_held_to_the_disk_and_to_the_page_cache(cold, bound):
    others = [start("from_pretrained", cold=cold, seconds=100), start("queue", cold=cold, seconds=100)]
    for seconds, holds in ((bound, True), (bound + 0.1, False)):
        (check,) = checks([*others, start("packs", cold=cold, seconds=seconds)])
        assert (check.bound, check.holds) == (pytest.approx(bound), holds)


def test_what_is_started_is_a_whole_model_and_an_interrupted_one_is_written_again(tmp_path: Path):
    from diffusers import FluxPipeline

    (tmp_path / "model.new").mkdir()
    (tmp_path / "model.new" / "rest").touch()
    write_model(tmp_path / "model", tiny=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not (tmp_path / "model" / "rest").exists()
    pipe = FluxPipeline.from_pretrained(str(tmp_path / "model"))
    assert pipe.transformer.dtype == pipe.vae.dtype
