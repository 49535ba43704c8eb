"""`autoflux models` as a user types it, and downloaded models as `--model`."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest

from autoflux.cli.main import run
from autoflux.models.hubs.values import Source
from tests.models.hubs.conftest import BIG, NEEDED, REPO, contents, hub, start_hub
from tests.models.hubs.stub import Fault, StubHub

__all__ = ["hub", "start_hub"]  # fixtures

DEV = "black-forest-labs/FLUX.1-dev"


@pytest.fixture
def dev(hub: StubHub, tiny_model: Path) -> StubHub:
    """Hubs that hold a tiny FLUX under FLUX.1-dev's names."""
    files = {p.relative_to(tiny_model).as_posix(): p.read_bytes() for p in tiny_model.rglob("*") if p.is_file()}
    hub.repos[DEV] = hub.repos["AI-ModelScope/FLUX.1-dev"] = files
    hub.gated = "auto"
    return hub


def answer(capsys, *arguments: str, code: int = 0) -> dict:
    """The envelope that a command prints with `--json`."""
    capsys.readouterr()
    assert run([*arguments, "--json"]) == code
    envelope = json.loads(capsys.readouterr().out)
    assert envelope.keys() == {"schema", "ok", "data", "error"}
    return envelope


@pytest.mark.parametrize("source", list(Source))
def test_a_model_is_pulled_listed_planned_verified_and_removed(dev, capsys, source):
    pulled = answer(capsys, "models", "pull", "flux.1-dev", "--source", source)["data"]
    assert (pulled["name"], pulled["listing"]["source"]) == ("flux.1-dev", source)
    data = answer(capsys, "models", "list")["data"]
    assert [entry["name"] for entry in data["registered"]] == ["sample"]
    assert [(m["name"], m["source"], m["complete"]) for m in data["models"]] == [("flux.1-dev", source, True)]
    for name in ("flux.1-dev", "flux-dev", DEV):
        assert answer(capsys, "plan", "--model", name, "--device", "cpu")["data"]["model"] == "flux.1-dev"
    assert answer(capsys, "models", "verify", "flux.1-dev")["data"]["whole"] is True
    removed = answer(capsys, "models", "rm", "flux.1-dev", "--yes")["data"]
    assert removed["freed_bytes"] == data["models"][0]["size_bytes"]
    assert answer(capsys, "models", "list")["data"]["models"] == []


def test_people_read_the_licence_the_size_and_the_path(dev, capsys):
    assert run(["models", "pull", DEV]) == 0
    captured = capsys.readouterr()
    assert Path(captured.out.strip()).is_dir()
    for words in (
        "from Hugging Face",
        "licence: test-licence",
        "terms have to be accepted",
        "to download: ",
        "--model",
    ):
        assert words in captured.err
    assert run(["models", "list"]) == 0
    text = capsys.readouterr().out
    for words in ("sample", "flux.1-dev", "huggingface", "complete"):
        assert words in text


def test_the_source_can_come_from_the_environment(dev, capsys, monkeypatch):
    monkeypatch.setenv("AUTOFLUX_SOURCE", "modelscope")
    assert answer(capsys, "models", "pull", "flux.1-dev")["data"]["listing"]["source"] == "modelscope"
    monkeypatch.setenv("AUTOFLUX_SOURCE", "nowhere")
    assert "AUTOFLUX_SOURCE" in answer(capsys, "models", "pull", "flux.1-dev", code=2)["error"]["message"]


def test_a_flipped_bit_is_named_and_mended(hub, capsys):
    pulled = answer(capsys, "models", "pull", REPO)["data"]
    blob = (Path(pulled["path"]) / BIG).resolve()
    blob.write_bytes(b"X" + blob.read_bytes()[1:])
    assert run(["models", "verify", REPO]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{BIG} has the sha256 ")
    mend = captured.err.partition("try:")[2].split()
    assert mend == ["autoflux", "models", "pull", REPO, "--source", "huggingface", "--repair"]
    data = answer(capsys, "models", "verify", REPO, code=1)["data"]
    assert data["whole"] is False
    assert [file["path"] for file in data["files"] if file["fault"]] == [BIG]
    assert run(mend[1:]) == 0
    assert run(["models", "verify", REPO]) == 0
    assert contents(Path(pulled["path"]))[BIG] == NEEDED[BIG]


def test_removing_asks_first(hub, capsys, monkeypatch):
    path = Path(answer(capsys, "models", "pull", REPO)["data"]["path"])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"n\n")))
    assert run(["models", "rm", REPO]) == 0
    assert "nothing was removed" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert run(["models", "rm", REPO]) == 2
    assert "[y/N]: \nerror: removing a model needs a yes" in capsys.readouterr().err
    assert answer(capsys, "models", "rm", REPO, code=2)["error"]["hint"] == "add --yes"
    assert path.exists()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"y\n")))
    assert run(["models", "rm", REPO]) == 0
    assert "freed" in capsys.readouterr().out
    assert not path.exists()


def test_a_model_in_both_caches_is_removed_only_from_the_one_that_is_said(hub, capsys):
    for source in Source:
        answer(capsys, "models", "pull", REPO, "--source", source)
    assert answer(capsys, "models", "rm", REPO, "--yes", code=2)["error"]["code"] == "contradictory_wishes"
    answer(capsys, "models", "rm", REPO, "--yes", "--source", "modelscope")
    assert [m["source"] for m in answer(capsys, "models", "list")["data"]["models"]] == ["huggingface"]


def test_a_model_that_is_not_here_names_the_command_that_brings_it(hub, capsys):
    for name, told in (("flux.1-dev", "flux.1-dev"), (REPO, REPO), (f"hf.co/{DEV}", "flux.1-dev")):
        error = answer(capsys, "generate", "a hill", "--model", name, code=1)["error"]
        assert (error["code"], error["hint"]) == ("model_not_found", f"autoflux models pull {told}")


def test_of_the_catalogue_a_model_that_is_not_here_is_planned(hub, capsys):
    for name in ("flux.1-dev", f"hf.co/{DEV}"):
        planned = answer(capsys, "plan", "--model", name, "--on", "rtx-4090-24gb")["data"]
        assert (planned["model"], planned["device"]) == ("flux.1-dev", "cuda:0")
    assert answer(capsys, "plan", "--model", REPO, code=1)["error"]["code"] == "model_not_found"


def test_a_model_that_is_here_in_part_is_not_loaded(hub, capsys):
    path = answer(capsys, "models", "pull", REPO)["data"]["path"]
    (Path(path) / BIG).unlink()
    error = answer(capsys, "plan", "--model", REPO, code=1)["error"]
    assert "only in part" in error["message"]
    assert answer(capsys, "models", "list")["data"]["models"][0]["missing"] == [BIG]


def test_a_model_of_another_tool_that_is_here_in_part_does_not_verify(hub, capsys, tmp_path):
    path = answer(capsys, "models", "pull", REPO)["data"]["path"]
    shutil.rmtree(Path(path).parents[1] / ".autoflux")
    (Path(path) / BIG).unlink()
    assert run(["models", "verify", REPO]) == 1
    assert capsys.readouterr().out == f"{BIG} is missing\n"
    assert answer(capsys, "models", "verify", REPO, code=1)["data"]["whole"] is False


def test_a_folder_goes_before_a_hub(dev, capsys, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, tmp_path / "someone" / "own")
    assert answer(capsys, "plan", "--model", "someone/own", "--device", "cpu")["data"]["model"] == "own"


BAD = {
    "unknown name": (["pull", "flux.1-dve"], 2, "did you mean 'flux.1-dev'"),
    "unknown model": (["pull", "someone/nothing"], 1, "has no model"),
    "unknown source": (["pull", REPO, "--source", "github"], 2, "github"),
    "another hub's address": (["pull", f"https://hf.co/{REPO}", "--source", "modelscope"], 2, "is on Hugging Face"),
    "two revisions": (["pull", f"https://hf.co/{REPO}/tree/a", "--revision", "b"], 2, "give one"),
    "odd revision": (["pull", REPO, "--revision", "../.."], 2, "cannot be the name of a revision"),
    "no such file": (["pull", REPO, "--file", "x.gguf"], 1, "no file there matches"),
    "nothing to verify": (["verify", REPO], 1, "not on this machine"),
    "nothing of a name too long": (["verify", "a" * 300], 2, "no model of a hub named"),
    "nothing of nobody": (["verify", "~nosuchuser/x"], 2, "no model of a hub named"),
    "nothing to remove": (["rm", "flux.1-dev", "--yes"], 1, "not on this machine"),
    "registered, not downloaded": (["rm", "sample", "--yes"], 2, "'sample' comes with a plugin"),
    "unknown command": (["remove"], 2, "remove"),
    "no name": (["pull"], 2, "NAME"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_a_message_and_a_code(hub, capsys, case):
    arguments, code, words = BAD[case]
    error = answer(capsys, "models", *arguments, code=code)["error"]
    assert words in f"{error['message']} {error['hint']}"


def test_a_gated_model_ends_with_the_page_of_its_terms(dev, capsys):
    for path in dev.repos[DEV]:
        dev.faults[path] = [Fault(status=401, headers={"X-Error-Code": "GatedRepo"})]
    error = answer(capsys, "models", "pull", "flux.1-dev", code=1)["error"]
    assert error["code"] == "access_denied"
    assert f"{dev.url}/{DEV}" in error["hint"]
    assert "hf auth login" in error["hint"]
