"""`autoflux models show`, and planning for a model that is not here."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save

from autoflux.cli.main import run


@pytest.fixture(autouse=True)
def no_hub(tmp_path, monkeypatch):
    for variable in ("HF_HUB_CACHE", "MODELSCOPE_CACHE"):
        monkeypatch.setenv(variable, str(tmp_path / "none"))


def _data(capsys, *arguments: str) -> dict:
    assert run([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["data"]


def test_a_folder_is_shown(tiny_model: Path, capsys):
    assert run(["models", "show", str(tiny_model)]) == 0
    out = capsys.readouterr().out
    for words in ("FLUX.1 dev family", "diffusers folder", "transformer_blocks", "F32", "2 double and 3 single"):
        assert words in out
    data = _data(capsys, "models", "show", str(tiny_model))
    assert (data["layout"], data["family"]) == ("diffusers folder", "FLUX.1 dev family")
    assert data["parameters"].keys() == {"text_encoder", "text_encoder_2", "transformer", "vae"}
    assert data["published"] is None


def test_a_name_of_the_catalogue_is_shown_without_weights(capsys):
    assert run(["models", "show", "flux.1-schnell"]) == 0
    out = capsys.readouterr().out
    for words in ("FLUX.1 schnell", "not on this machine", "apache-2.0", "autoflux models pull flux.1-schnell"):
        assert words in out
    data = _data(capsys, "models", "show", "flux.1-dev")
    assert data["parameters"]["transformer"] == 11_901_408_320
    assert data["published"]["huggingface"] == "black-forest-labs/FLUX.1-dev"


def test_a_broken_file_is_an_error_without_traceback(tmp_path, capsys):
    (tmp_path / "a.safetensors").write_bytes(b"<!DOCTYPE html>")
    assert run(["models", "show", str(tmp_path / "a.safetensors")]) == 1
    err = capsys.readouterr().err
    assert "web page" in err
    assert "Traceback" not in err


def test_what_is_not_here_is_planned_but_not_drawn(capsys):
    # Whether it fits depends on this machine; that the weights are missing must not.
    assert run(["plan", "--model", "flux.1-dev", "--json"]) in (0, 3)
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] or report["error"]["code"] == "does_not_fit"
    assert run(["generate", "a cat", "--model", "flux.1-dev"]) == 1
    assert "autoflux models pull flux.1-dev" in capsys.readouterr().err
    assert run(["serve", "--model", "flux.1-dev", "--port", "0"]) == 1
    assert "autoflux models pull flux.1-dev" in capsys.readouterr().err


def test_a_name_that_is_nearly_right_is_guessed(capsys):
    assert run(["models", "show", "flux.1-deb"]) == 2
    assert "did you mean 'flux.1-dev'?" in capsys.readouterr().err


NOT_UTF8 = os.fsdecode(b"inv\xff")


def _misnamed_file(folder: Path, tiny_model: Path) -> Path:
    held = load_file(tiny_model / "transformer" / "diffusion_pytorch_model.safetensors")
    (folder / f"{NOT_UTF8}.safetensors").write_bytes(save(held))
    return folder / f"{NOT_UTF8}.safetensors"


def _misnamed_folder(folder: Path, tiny_model: Path) -> Path:
    return shutil.copytree(tiny_model, folder / NOT_UTF8)


def _misnamed_weights(folder: Path, tiny_model: Path) -> Path:
    place = shutil.copytree(tiny_model, folder / "tiny")
    weights = place / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name(f"{NOT_UTF8}.safetensors"))
    return place


@pytest.mark.skipif(sys.platform != "linux", reason="names are text there")
@pytest.mark.parametrize("put", [_misnamed_file, _misnamed_folder, _misnamed_weights])
@pytest.mark.parametrize("command", [["models", "show"], ["models", "pack"], ["generate", "a hill", "--model"]])
def test_a_name_that_is_no_text_is_refused_with_the_reason(tiny_model, tmp_path, capsys, put, command):
    place = put(tmp_path, tiny_model)
    base = ["--base", str(tiny_model)] if put is _misnamed_file else []
    assert run([*command, str(place), *base, "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert "is not valid text" in error["message"]
    assert error["hint"]


@pytest.mark.skipif(sys.platform != "linux", reason="names are text there")
@pytest.mark.parametrize("put", [_misnamed_file, _misnamed_folder])
def test_nothing_of_a_name_that_is_no_text_is_verified(tiny_model, tmp_path, capsys, put):
    assert run(["models", "verify", str(put(tmp_path, tiny_model)), "--json"]) == 2
    assert "is not valid text" in json.loads(capsys.readouterr().out)["error"]["message"]
