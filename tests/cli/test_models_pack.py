"""`autoflux models pack`, and what the other commands do with packs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autoflux.cli.main import run
from autoflux.models.pack_shelf import Shelf, packs_wanted
from autoflux.models.packs import WEIGHTS


@pytest.fixture(autouse=True)
def shelf(tmp_path, monkeypatch) -> Shelf:
    for name, folder in (("AUTOFLUX_CACHE_DIR", "cache"), ("HF_HUB_CACHE", "hf"), ("MODELSCOPE_CACHE", "ms")):
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.delenv("AUTOFLUX_NO_PACK", raising=False)
    return Shelf()


def asked(capsys, *arguments: str, code: int = 0) -> dict:
    assert run(["models", *arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)["data"]


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_pack_list_verify_and_remove(tiny_copy, shelf, capsys):
    made = asked(capsys, "pack", str(tiny_copy), "--precision", "int8")["packs"]
    assert [(pack["component"], pack["storage"], pack["arithmetic"]) for pack in made] == [
        ("text_encoder", "bfloat16", "bfloat16"),
        ("text_encoder_2", "bfloat16", "bfloat16"),
        ("transformer", "int8", "bfloat16"),
        ("vae", "bfloat16", "bfloat16"),
    ]
    more = asked(capsys, "pack", str(tiny_copy), "--precision", "float8_e4m3fn")["packs"]
    assert [pack["key"] for pack in more if pack not in made] == [more[2]["key"]], "encoders are shared"
    assert asked(capsys, "list")["packs"] == [pack for pack in asked(capsys, "list")["packs"] if "tensors" not in pack]
    assert {p["key"] for p in asked(capsys, "list")["packs"]} == {p["key"] for p in made + more}
    checked = asked(capsys, "verify", str(tiny_copy))
    assert checked["whole"]
    assert len(checked["packs"]) == 5
    removed = asked(capsys, "pack", str(tiny_copy), "--rm")
    assert len(removed["removed"]) == 5
    assert removed["freed_bytes"] == sum(pack["nbytes"] for pack in [*made, more[2]])
    assert shelf.packs() == []


def test_people_are_told_sizes(tiny_copy, shelf, capsys):
    assert run(["models", "pack", str(tiny_copy)]) == 0
    assert "transformer: " in capsys.readouterr().out
    assert run(["models", "list"]) == 0
    assert "transformer" in capsys.readouterr().out
    assert run(["models", "verify", str(tiny_copy)]) == 0
    assert "4 packs" in capsys.readouterr().out
    assert run(["models", "pack", str(tiny_copy), "--rm"]) == 0
    assert "removed 4 packs" in capsys.readouterr().out


def test_verify_says_when_there_is_nothing_to_compare_with(tiny_copy, shelf, capsys):
    assert run(["models", "verify", str(tiny_copy)]) == 0
    assert "from no hub and without packs" in capsys.readouterr().out


def test_verify_finds_what_changed_and_drops_it(tiny_copy, shelf, capsys):
    made = asked(capsys, "pack", str(tiny_copy), "--precision", "int8")["packs"]
    flip(shelf.folder(made[2]["key"]) / WEIGHTS)
    checked = asked(capsys, "verify", str(tiny_copy), code=1)
    assert not checked["whole"]
    assert [pack["component"] for pack in checked["packs"] if pack["fault"]] == ["transformer"]
    assert shelf.find(made[2]["key"]) is None
    assert asked(capsys, "verify", str(tiny_copy))["whole"]
    assert asked(capsys, "pack", str(tiny_copy), "--precision", "int8")["packs"] == made


def test_packs_in_use_stay(tiny_copy, shelf, capsys):
    made = asked(capsys, "pack", str(tiny_copy))["packs"]
    opened = shelf.open(made[0]["key"])
    assert opened
    removed = asked(capsys, "pack", str(tiny_copy), "--rm")
    assert removed["in_use"] == [made[0]["key"]]
    opened.close()


def test_a_model_that_is_not_there_is_told(capsys):
    assert run(["models", "pack", "no-such-model", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "unknown_name"
    assert run(["models", "pack", "flux.1-dev", "--json"]) == 1
    assert "pull" in json.loads(capsys.readouterr().out)["error"]["hint"]


def test_no_pack_holds_as_long_as_the_command(tiny_copy, capsys):
    asked(capsys, "pack", str(tiny_copy))
    assert run(["generate", "a red circle", "--model", "no-such-model", "--no-pack"]) == 2
    assert packs_wanted()


def test_rm_removes_the_packs_of_a_downloaded_model(tiny_copy, tmp_path, shelf, capsys):
    snapshot = tmp_path / "hf" / "models--someone--tiny" / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    tiny_copy.rename(snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    assert len(asked(capsys, "pack", "someone/tiny")["packs"]) == 4
    assert len(asked(capsys, "rm", "someone/tiny", "--yes")["packs"]["removed"]) == 4
    assert shelf.packs() == []
    assert not snapshot.exists()
