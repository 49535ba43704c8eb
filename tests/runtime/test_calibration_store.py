"""What runs have measured is kept by machine and model, and what cannot be used does no harm."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoflux.planning.calibration import (
    CALIBRATION_SCHEMA,
    BlockTimes,
    Calibration,
    CopyRates,
    FixedCosts,
    Setting,
    Slower,
    Tuned,
    Working,
)
from autoflux.planning.terms import Offload, Waiting
from autoflux.runtime.calibration_store import VARIABLE, CalibrationStore
from autoflux.testing import fake_hardware, fake_model, fake_plan

MODEL = fake_model()
HERE = fake_hardware().replace(fingerprint="f00d")


def known(**changes: object) -> Calibration:
    return Calibration(
        fingerprint="f00d",
        probed_at=HERE.probed_at,
        model=MODEL.name,
        model_revision=MODEL.revision,
        model_bytes=MODEL.disk_bytes,
        made_at="2026-11-24T10:00:00",
    ).replace(**changes)


@pytest.fixture(autouse=True)
def _calibrating(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)


@pytest.fixture
def store(tmp_path: Path) -> CalibrationStore:
    return CalibrationStore(tmp_path / "not there yet")


def test_what_is_saved_is_loaded(store):
    assert store.load(HERE, MODEL) == (None, None)
    assert store.save(known(), MODEL) is None
    assert store.load(HERE, MODEL) == (known(), None)
    assert [file.suffix for file in store.folder.iterdir()] == [".json"]


def test_another_machine_or_model_has_its_own(store):
    store.save(known(), MODEL)
    assert store.load(HERE.replace(fingerprint="beef"), MODEL) == (None, None)
    assert store.load(HERE, MODEL.replace(revision="changed")) == (None, None)
    assert store.load(HERE, MODEL.replace(name="called otherwise"))[0] == known()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "Expected `object`"),
        ('{"schema": 99}', f"version 99 and this autoflux reads version {CALIBRATION_SCHEMA}"),
        (known().to_json().replace("made_at", "made"), "made"),
        (known(fingerprint="beef").to_json(), "another machine or model"),
        (known(model_bytes=7).to_json(), "another machine or model"),
        ("\x00" * 100, "not JSON"),
    ],
)
def test_what_is_damaged_is_ignored_with_a_warning_and_rewritten(store, text, words):
    store.save(known(), MODEL)
    store.path("f00d", MODEL).write_text(text)
    found, warning = store.load(HERE, MODEL)
    assert found is None
    assert "ignored" in warning
    assert words in warning
    assert store.save(known(), MODEL) is None
    assert store.load(HERE, MODEL) == (known(), None)


def test_factors_on_what_was_measured_before_go_when_the_machine_is_measured_again(store):
    here, setting = {"device": "cpu"}, Setting.of(fake_plan())
    fitted = {
        "blocks": (BlockTimes(**here, backend="fake", way=setting.way, factor=2.0, steps=8),),
        "copies": (CopyRates(**here, waiting=Waiting.PINNED, factor=0.5, steps=8),),
        "fixed": (FixedCosts(**here, backend="fake", offload=Offload.NONE, around=2.0),),
    }
    kept = {
        "working": (Working(**here, backend="fake", denoise_activations=7.0),),
        "tuned": Tuned(setting=setting, made_at="2026", seconds_per_step=1.0, plans=2),
        "slower": (Slower(setting=setting, than=setting),),
    }
    store.save(known(**fitted, **kept), MODEL)
    later = HERE.replace(probed_at="2026-02-01T00:00:00Z")
    found, warning = store.load(later, MODEL)
    assert found == known(**kept, probed_at=later.probed_at)
    assert "measured again since" in warning
    store.save(found, MODEL)
    assert store.load(later, MODEL) == (found, None)


def test_a_folder_in_the_place_of_the_file_is_a_warning(store):
    store.path("f00d", MODEL).mkdir(parents=True)
    assert "cannot read" in store.load(HERE, MODEL)[1]
    assert "not kept" in store.save(known(), MODEL)


def test_a_folder_that_cannot_be_made_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    store = CalibrationStore(tmp_path / "file" / "folder")
    assert "not kept" in store.save(known(), MODEL)
    assert store.load(HERE, MODEL)[0] is None


def test_off_means_nothing_is_read_or_kept(store, monkeypatch):
    store.save(known(), MODEL)
    monkeypatch.setenv(VARIABLE, "off")
    assert store.load(HERE, MODEL) == (None, None)
    store.forget("f00d", MODEL)
    assert store.save(known(), MODEL) is None
    assert list(store.folder.iterdir()) == []
