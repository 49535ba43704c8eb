"""`autoflux bench load` with the sample model, and what it says of bad input."""

from __future__ import annotations

import json
import os

import pytest

import autoflux
from autoflux import Wishes
from autoflux.cli.bench_load import PROMPT
from autoflux.cli.main import run
from autoflux.models.pack_shelf import NO_PACK, Shelf
from autoflux.runtime.prompt_cache import VARIABLE


def test_strategies_are_compared_with_the_sample_model(capsys):
    with autoflux.load("sample", wishes=Wishes(device="cpu", backend="diffusers", pictures=1)) as session:
        session.generate(PROMPT, steps=1)
    before = dict(os.environ)
    asked = ["bench", "load", "--only", "known", "--steps", "1", "--device", "cpu", "--backend", "diffusers", "--json"]
    assert run(asked) == 0
    data = json.loads(capsys.readouterr().out)["data"]
    assert data["model"] == "sample"
    (times,) = data["strategies"]
    assert times["strategy"] == "known"
    assert times["encoder_seconds"] == 0, "the prompt was encoded above"
    packed = [pack for pack in Shelf().packs() if pack.model == "sample"]
    assert times["read_bytes"] == sum(pack.nbytes for pack in packed if pack.component in ("transformer", "vae"))
    assert times["read_seconds"] > 0
    assert times["accepted_seconds"] < times["ready_seconds"] < times["first_picture_seconds"]
    assert times["peak_ram_bytes"] > 10**8
    stages = {stage["name"]: stage["seconds"] for stage in times["stages"]}
    assert (stages["ready"], stages["picture"]) == (times["ready_seconds"], times["first_picture_seconds"])
    assert list(stages.values()) == sorted(stages.values())
    assert {pack.component for pack in packed} == {"text_encoder", "text_encoder_2", "transformer", "vae"}
    assert {k: v for k, v in os.environ.items() if k in (NO_PACK, VARIABLE)} == {
        k: v for k, v in before.items() if k in (NO_PACK, VARIABLE)
    }


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["--only", "tomorrow"], 2, "tomorrow"),
        (["--steps", "0"], 2, "steps"),
        (["--model", "no/such/model"], 1, "no/such/model"),
        (["--size", "7"], 2, "width"),
    ],
)
def test_bad_input_is_refused_by_name(arguments, code, word, capsys):
    assert run(["bench", "load", *arguments]) == code
    assert word in capsys.readouterr().err


def test_a_model_that_the_limit_leaves_no_room_for_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("AUTOFLUX_PACK_LIMIT", "12MB")
    asked = ["bench", "load", "--only", "packs", "--steps", "1", "--device", "cpu", "--precision", "bfloat16"]
    assert run(asked) == 1
    assert "the packs of this model would take 14.9 MB, and packs may take 12.0 MB" in capsys.readouterr().err


def test_help_lists_what_can_be_measured(capsys):
    assert run(["bench", "--help"]) == 0
    assert "load" in capsys.readouterr().out
