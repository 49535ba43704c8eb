"""What the planner is told of a model by backends and packs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from autoflux.plugins.diffsynth_backend import DiffSynthBackend

from autoflux.api import packs_of, plan_for
from autoflux.cli.main import run
from autoflux.models.finding import find
from autoflux.models.pack_shelf import NO_PACK, Shelf
from autoflux.models.values import Model
from autoflux.planning.values import Wishes
from autoflux.plugin_manager import load_plugins
from autoflux.testing import fake_hardware, fake_model
from tests.plugins.test_third_party import module


def of(**fields: object) -> Model:
    model = fake_model()
    parts = (c.replace(**fields) if c.name == "transformer" else c for c in model.components)
    return model.replace(components=tuple(parts))


@pytest.mark.parametrize(
    "fields", [{"prefix": "model.diffusion_model."}, {"scaled": True}, {"files": ("model.gguf",)}], ids=str
)
def test_diffsynth_says_which_layouts_it_cannot_read(fields):
    assert "it reads transformers from" in DiffSynthBackend().facts(of(**fields)).refuses
    assert not DiffSynthBackend().facts(of()).refuses


def test_a_backend_that_says_nothing_of_itself_is_taken_as_it_is(monkeypatch):
    quiet = module(
        "quiet_backend",
        "import autoflux\n"
        "class Quiet:\n"
        "    name = 'quiet'\n"
        "    def missing(self):\n        return None\n"
        "@autoflux.hookimpl\n"
        "def register_backends(register):\n    register(Quiet())\n",
    )
    monkeypatch.setitem(__import__("sys").modules, "quiet_backend", quiet)
    monkeypatch.setenv("AUTOFLUX_PLUGINS", "quiet_backend")
    plan = plan_for(fake_model(), Wishes(backend="quiet", device="cpu"), load_plugins(), fake_hardware())
    assert plan.backend == "quiet"


@pytest.fixture
def packed(tiny_copy) -> Model:
    assert run(["models", "pack", str(tiny_copy), "--precision", "float32"]) == 0
    return find(str(tiny_copy), {})


def test_packs_are_told_to_the_planner_unless_none_are_wanted(packed, monkeypatch):
    held = {part.component: part.nbytes for part in packs_of(packed).parts}
    assert held == {pack.component: pack.nbytes for pack in Shelf().of_model(Path(packed.path))}
    assert len(held) == 4
    monkeypatch.setenv(NO_PACK, "1")
    assert packs_of(packed).parts == ()


def test_packs_of_other_weights_are_not(packed, tiny_copy):
    file = next((tiny_copy / "vae").glob("*.safetensors"))
    file.touch()
    found = {part.component for part in packs_of(find(str(tiny_copy), {})).parts}
    assert found == {"text_encoder", "text_encoder_2", "transformer"}


def test_a_model_whose_files_have_gone_has_no_packs(packed, tiny_copy):
    next((tiny_copy / "vae").glob("*.safetensors")).unlink()
    assert packs_of(packed).parts == ()


def test_the_plan_says_that_packs_are_read(packed, capsys):
    def topics(*arguments: str) -> list[str]:
        capsys.readouterr()
        assert (
            run(["plan", "--model", packed.path, "--device", "cpu", "--precision", "float32", "--json", *arguments])
            == 0
        )
        return [choice["topic"] for choice in json.loads(capsys.readouterr().out)["data"]["choices"]]

    assert "packs" in topics()
    assert "packs" not in topics("--precision", "bfloat16")
    assert "packs" not in topics("--on", "rtx-4090-24gb"), "another machine has other disks"
