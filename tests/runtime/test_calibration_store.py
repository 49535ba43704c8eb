"""What runs have measured is kept by machine and model, and what cannot be used does no harm."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoflux.planning.calibration import CALIBRATION_SCHEMA, Calibration
from autoflux.runtime.calibration_store import VARIABLE, CalibrationStore
from autoflux.testing import fake_model

MODEL = fake_model()


def known(**changes: object) -> Calibration:
    return Calibration(
        fingerprint="f00d",
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
    assert store.load("f00d", MODEL) == (None, None)
    assert store.save(known(), MODEL) is None
    assert store.load("f00d", MODEL) == (known(), None)
    assert [file.suffix for file in store.folder.iterdir()] == [".json"]


def test_another_machine_or_model_has_its_own(store):
    store.save(known(), MODEL)
    assert store.load("beef", MODEL) == (None, None)
    assert store.load("f00d", MODEL.replace(revision="changed")) == (None, None)
    assert store.load("f00d", MODEL.replace(name="called otherwise"))[0] == known()


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
    found, warning = store.load("f00d", MODEL)
    assert found is None
    assert "ignored" in warning
    assert words in warning
    assert store.save(known(), MODEL) is None
    assert store.load("f00d", MODEL) == (known(), None)


def test_a_folder_in_the_place_of_the_file_is_a_warning(store):
    store.path("f00d", MODEL).mkdir(parents=True)
    assert "cannot read" in store.load("f00d", MODEL)[1]
    assert "not kept" in store.save(known(), MODEL)


def test_a_folder_that_cannot_be_made_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    store = CalibrationStore(tmp_path / "file" / "folder")
    assert "not kept" in store.save(known(), MODEL)
    assert store.load("f00d", MODEL)[0] is None


def test_off_means_nothing_is_read_or_kept(store, monkeypatch):
    store.save(known(), MODEL)
    monkeypatch.setenv(VARIABLE, "off")
    assert store.load("f00d", MODEL) == (None, None)
    store.forget("f00d", MODEL)
    assert store.save(known(), MODEL) is None
    assert list(store.folder.iterdir()) == []
