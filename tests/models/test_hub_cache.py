"""Models that the hubs' own programs have put on this machine."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from autoflux.models.catalogue import CATALOGUE
from autoflux.models.catalogue import find as find_entry
from autoflux.models.finding import find, require_weights
from autoflux.models.hub_cache import find_cached, hugging_face_cache, modelscope_cache
from autoflux.models.values import Family, Layout

VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "MODELSCOPE_CACHE")


@pytest.fixture
def home(tmp_path: Path, monkeypatch) -> Path:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_the_cache_is_where_the_hubs_say(home, monkeypatch):
    assert hugging_face_cache() == home / ".cache" / "huggingface" / "hub"
    assert modelscope_cache() == home / ".cache" / "modelscope" / "hub"
    for variable, place in (
        ("XDG_CACHE_HOME", home / "xdg"),
        ("HF_HOME", home / "hf"),
        ("HUGGINGFACE_HUB_CACHE", home / "old"),
        ("HF_HUB_CACHE", home / "new"),
    ):
        monkeypatch.setenv(variable, str(place))
        below = {"XDG_CACHE_HOME": "huggingface/hub", "HF_HOME": "hub"}.get(variable, "")
        assert hugging_face_cache() == place / below
    monkeypatch.setenv("MODELSCOPE_CACHE", "~/ms")
    assert modelscope_cache() == home / "ms"


@pytest.mark.parametrize(
    "place",
    [
        ".cache/huggingface/hub/models--black-forest-labs--FLUX.1-Krea-dev/snapshots/abc",
        ".cache/modelscope/hub/models/black-forest-labs/FLUX.1-Krea-dev",
        ".cache/modelscope/hub/models/black-forest-labs/FLUX___1-Krea-dev",
        ".cache/modelscope/hub/black-forest-labs/FLUX.1-Krea-dev",
    ],
)
def test_a_model_in_a_cache_is_found_by_its_name(home, tiny_model, place):
    assert find("flux-krea", {}).layout == Layout.ABSENT
    (home / place).parent.mkdir(parents=True)
    shutil.copytree(tiny_model, home / place)
    (home / place / "autoflux.json").unlink()
    model = find("flux-krea", {})
    require_weights(model)
    assert (model.name, model.family, model.layout) == ("flux.1-krea-dev", Family.KREA, Layout.FOLDER)
    assert Path(model.path) == home / place
    assert model.defaults.guidance == 4.5


def test_the_current_snapshot_is_taken_and_other_models_are_not(home):
    entry = find_entry("flux.1-dev")
    folder = home / ".cache/huggingface/hub/models--black-forest-labs--FLUX.1-dev"
    for revision in ("aaa", "bbb", "ccc"):
        (folder / "snapshots" / revision).mkdir(parents=True)
        (folder / "snapshots" / revision / "model_index.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("bbb")
    assert find_cached(entry) == folder / "snapshots" / "bbb"
    (folder / "snapshots" / "bbb" / "model_index.json").unlink()
    assert find_cached(entry) == folder / "snapshots" / "aaa"
    assert find_cached(entry.replace(revision="ccc")) == folder / "snapshots" / "ccc"
    assert find_cached(entry.replace(revision="ddd")) is None
    assert not any(find_cached(other) for other in CATALOGUE if other is not entry)
