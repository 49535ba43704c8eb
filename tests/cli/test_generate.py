"""`autoflux generate` and `autoflux plan` as a user types them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from autoflux.cli.main import run
from autoflux.runtime.picture import read_request


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def generate(model: Path, *arguments: str) -> int:
    return run(["generate", "a red circle", "--model", str(model), "--device", "cpu", *arguments])


def test_a_picture_is_drawn_and_its_path_is_the_only_output(here, tiny_model, capsys):
    assert generate(tiny_model, "--seed", "5", "--out", "circle.png") == 0
    captured = capsys.readouterr()
    assert captured.out == "circle.png\n"
    assert "seed 5" in captured.err
    with Image.open(here / "circle.png") as image:
        assert image.size == (64, 64)
    assert read_request((here / "circle.png").read_bytes()).seed == 5


def test_several_pictures_get_their_seed_in_the_name(here, tiny_model, capsys):
    assert generate(tiny_model, "--seed", "5", "-n", "2", "--out", "c.png", "--size", "96x64", "--json") == 0
    data = json.loads(capsys.readouterr().out)["data"]
    assert [p["file"] for p in data["pictures"]] == ["c-5.png", "c-6.png"]
    assert sorted(f.name for f in here.iterdir()) == ["c-5.png", "c-6.png"]
    assert data["plan"]["predicted"]["picture"]["width"] == 96
    first, second = (np.asarray(Image.open(here / f"c-{seed}.png")) for seed in (5, 6))
    assert not np.array_equal(first, second)


def test_a_name_chosen_for_the_user_never_overwrites(here, tiny_model):
    for _ in range(2):
        assert generate(tiny_model, "--seed", "5") == 0
    (here / "folder").mkdir()
    assert generate(tiny_model, "--seed", "5", "--out", "folder") == 0
    files = {f.relative_to(here).as_posix() for f in here.rglob("*.png")}
    assert files == {"autoflux-5.png", "autoflux-5-2.png", "folder/autoflux-5.png"}
    assert (here / "autoflux-5.png").read_bytes() == (here / "autoflux-5-2.png").read_bytes()


def test_several_processes_that_choose_a_name_at_once_keep_all_pictures(here, tiny_model):
    command = [sys.executable, "-m", "autoflux", "generate", "x", "--model", str(tiny_model), "--steps", "1"]
    begun = [subprocess.Popen([*command, "--seed", "5", "--device", "cpu"], stdout=subprocess.PIPE) for _ in range(2)]
    told = {process.communicate()[0].decode() for process in begun}
    assert told == {"autoflux-5.png\n", "autoflux-5-2.png\n"}
    assert sorted(f.name for f in here.iterdir()) == ["autoflux-5-2.png", "autoflux-5.png"]


def test_a_link_is_followed_and_stays(here, tiny_model):
    (here / "there").mkdir()
    (here / "c.png").symlink_to("there/real.png")
    assert generate(tiny_model, "--seed", "5", "--out", "c.png") == 0
    assert (here / "c.png").is_symlink()
    assert read_request((here / "there" / "real.png").read_bytes()).seed == 5


def test_a_name_of_full_length_is_written(here, tiny_model):
    assert generate(tiny_model, "--out", "a" * 251 + ".png") == 0
    assert [len(f.name) for f in here.iterdir()] == [255]


def test_names_that_cannot_be_written_are_refused_before_anything_is_drawn(here, tiny_model, capsys):
    (here / "c-6.png").mkdir()
    assert generate(tiny_model, "--seed", "5", "-n", "2", "--out", "c.png") == 1
    said = capsys.readouterr().err
    assert "cannot write 'c-6.png': a folder is there" in said
    assert "tiny on cpu" not in said
    assert [f.name for f in here.iterdir()] == ["c-6.png"]


SPOILER = """
from pathlib import Path
from autoflux.hookspecs import hookimpl
from autoflux.testing import FakeBackend, FakePipeline

class Pipeline(FakePipeline):
    def decode(self, states):
        Path("c-6.png").mkdir()
        return super().decode(states)

class Backend(FakeBackend):
    name = "spoiler"

    def build(self, plan, model, progress):
        return Pipeline()

@hookimpl
def register_backends(register):
    register(Backend())
"""


@pytest.mark.parametrize("as_json", [False, True])
def test_what_can_be_saved_is_saved_and_told_when_a_file_fails_later(here, tiny_model, capsys, monkeypatch, as_json):
    (here / "plugin").mkdir()
    (here / "plugin" / "spoiler_plugin.py").write_text(SPOILER)
    monkeypatch.syspath_prepend(here / "plugin")
    monkeypatch.setenv("AUTOFLUX_PLUGINS", "spoiler_plugin")
    asked = ["--seed", "5", "-n", "3", "--out", "c.png", "--backend", "spoiler", *(["--json"] if as_json else [])]
    assert generate(tiny_model, *asked) == 1
    assert sorted(f.name for f in here.glob("*.png") if f.is_file()) == ["c-5.png", "c-7.png"]
    captured = capsys.readouterr()
    if as_json:
        envelope = json.loads(captured.out)
        assert [picture["file"] for picture in envelope["data"]["pictures"]] == ["c-5.png", "c-7.png"]
        assert envelope["error"]["code"] == "output_unwritable"
        assert "c-6.png" in envelope["error"]["message"]
    else:
        assert captured.out == "c-5.png\nc-7.png\n"
        assert "error: cannot write 'c-6.png'" in captured.err


def test_brackets_in_a_name_are_no_markup(here, tiny_copy, capsys):
    tiny_copy.rename(here / "[red]x")
    assert generate(here / "[red]x", "--steps", "1") == 0
    assert "[red]x on cpu" in capsys.readouterr().err


BAD = {
    "empty prompt": (["generate", ""], 2, "prompt is empty"),
    "long prompt": (["generate", "x" * 100_000], 2, "100,000 characters"),
    "odd size": (["generate", "x", "--size", "100"], 2, "multiple of 16"),
    "zero size": (["generate", "x", "--size", "0"], 2, "16 to 256"),
    "huge size": (["generate", "x", "--size", "99999x16"], 2, "16 to 256"),
    "size in words": (["generate", "x", "--size", "large"], 2, "'large' is not a size"),
    "no steps": (["generate", "x", "--steps", "0"], 2, "steps must be"),
    "negative steps": (["generate", "x", "--steps", "-1"], 2, "steps must be"),
    "a million steps": (["generate", "x", "--steps", "1000000"], 2, "steps must be"),
    "steps in words": (["generate", "x", "--steps", "few"], 2, "few"),
    "guidance not a number": (["generate", "x", "--guidance", "nan"], 2, "guidance"),
    "negative seed": (["generate", "x", "--seed", "-1"], 2, "seed"),
    "no pictures": (["generate", "x", "-n", "0"], 2, "number of pictures"),
    "unknown device": (["generate", "x", "--device", "cdua"], 2, "did you mean 'cuda'"),
    "no such device": (["generate", "x", "--device", "XPU"], 1, "no device 'XPU'; there is cpu"),
    "unknown backend": (["generate", "x", "--backend", "difusers"], 2, "did you mean 'diffusers'"),
    "unknown profile": (["plan", "--profile", "cuda-touring"], 2, "did you mean 'cuda-turing'"),
    "profile of another device": (["plan", "--device", "cpu", "--profile", "cuda"], 2, "is for 'cuda'"),
    "profile of nobody": (["plan", "--profile", "~nosuchuser/x.toml"], 1, "cannot read '~nosuchuser/x.toml'"),
    "machine of nobody": (["plan", "--on", "~nosuchuser/x.json"], 1, "cannot read '~nosuchuser/x.json'"),
    "plan of nobody": (["plan", "--plan", "~nosuchuser/x.json"], 1, "cannot read '~nosuchuser/x.json'"),
    "plan without size": (["plan", "--size", "0"], 2, "16 to 256"),
    "plan without steps": (["plan", "--steps", "0"], 2, "steps must be"),
    "not a png": (["generate", "x", "--out", "a.jpg"], 2, "--out a.png"),
    "folder that is not there": (["generate", "x", "--out", "sub/"], 1, "the folder 'sub/' is not there"),
    "empty name": (["generate", "x", "--out", ""], 2, "--out is empty"),
    "standard output": (["generate", "x", "--out", "-"], 2, "--out picture.png"),
    "home of nobody": (["generate", "x", "--out", "~no-such-user/a.png"], 1, "~no-such-user"),
    "long name": (["generate", "x", "--out", "a" * 300 + ".png"], 1, "choose a shorter name"),
    "long name without a suffix": (["generate", "x", "--out", "a" * 300], 1, "choose a shorter name"),
    "long name with a seed": (["generate", "x", "-n", "2", "--out", "a" * 251 + ".png"], 1, "choose a shorter name"),
    "unknown offload": (["plan", "--offload", "some"], 2, "some"),
    "offload on the cpu": (["plan", "--device", "cpu", "--offload", "component"], 2, "makes no sense"),
    "too little memory": (["generate", "x", "--device", "cpu", "--ram", "1MB"], 3, "needs"),
    "size of memory": (["plan", "--ram", "lots"], 2, "not a size"),
    "folder missing": (["generate", "x", "--out", "no/where/a.png"], 1, "create the folder 'no/where' first"),
    "unknown option": (["generate", "x", "--sead", "3"], 2, "--seed"),
    "unknown command": (["generat"], 2, "generat"),
    "no prompt": (["generate"], 2, "PROMPT"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("as_json", [False, True])
def test_bad_input_ends_with_a_message_and_a_code_and_nothing_written(here, tiny_model, capsys, case, as_json):
    arguments, code, words = BAD[case]
    model = ["--model", str(tiny_model)] if arguments[0] in ("generate", "plan") else []
    assert run([*arguments, *model, *(["--json"] if as_json else [])]) == code
    captured = capsys.readouterr()
    assert list(here.iterdir()) == []
    assert "Traceback" not in captured.err
    if as_json:
        envelope = json.loads(captured.out)
        assert envelope["ok"] is False
        assert envelope["data"] is None
        assert words in f"{envelope['error']['message']} {envelope['error']['hint']}"
    else:
        assert captured.out == ""
        assert words in captured.err.replace("\n", " ")


@pytest.mark.parametrize(
    "model", ["nothing/here", "/", "smaple", ".", "", "a" * 5000, "a" * 5000 + ".gguf", "/dev/zero", "a\0b"]
)
def test_a_model_that_is_none_is_refused(here, capsys, model):
    assert run(["generate", "x", "--model", model]) in (1, 2)
    error = capsys.readouterr().err
    assert "error:" in error
    assert "unexpected" not in error
    assert "header" not in error
    assert "try:" in error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused_before_anything_is_loaded(here, tiny_model, capsys):
    (here / "locked").mkdir(mode=0o500)
    assert generate(tiny_model, "--out", "locked/a.png") == 1
    assert "cannot write" in capsys.readouterr().err


def test_the_plan_is_shown_with_its_reasons(tiny_model, capsys):
    assert run(["plan", "--model", str(tiny_model), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    for words in ("tiny on cpu in float32", "transformer", "a step", "RAM", "you asked for it", "--explain"):
        assert words in text
    assert run(["plan", "--model", str(tiny_model), "--json"]) == 0
    envelope = json.loads(capsys.readouterr().out)
    assert envelope["ok"] is True
    assert envelope["schema"] == 1
    assert envelope["data"]["predicted"]["seconds_per_step"] > 0


def test_planning_imports_no_torch(tiny_model):
    code = (
        "import sys\n"
        "from autoflux.cli.main import run\n"
        f"code = run(['plan', '--model', {str(tiny_model)!r}])\n"
        "sys.exit(code or ('torch' in sys.modules and 'torch was imported'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("moment", ["at once", "importing", "drawing"])
def test_ctrl_c_ends_with_130_and_leaves_nothing(here, tiny_model, moment):
    # Python's own start, before it runs our first line, is not ours to handle: `ready` comes right after that line.
    program = (
        "from autoflux.cli import interrupt; interrupt.install(); print('ready', flush=True);"
        "from autoflux.__main__ import main; main()"
    )
    # Sixteen pictures of 200 steps take many seconds, so the signal comes before they are done.
    picture = ["--steps", "200", "--size", "256", "-n", "16", "--out", "a.png"]
    command = [sys.executable, "-c", program, "generate", "x", "--model", str(tiny_model), "--device", "cpu", *picture]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "ready\n"
    if moment != "at once":
        assert "tiny on cpu" in process.stderr.readline()
        time.sleep({"importing": 0.3, "drawing": 9}[moment])
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in error
    assert list(here.iterdir()) == []


def test_a_reader_that_goes_away_is_no_error(tiny_model):
    command = f"{sys.executable} -m autoflux plan --model {tiny_model} --json | head -c 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" or "Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is always full")
@pytest.mark.parametrize("as_json", [False, True])
def test_a_full_output_is_told_without_a_traceback(tiny_model, as_json):
    command = [sys.executable, "-m", "autoflux", "plan", "--model", str(tiny_model), *(["--json"] if as_json else [])]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_name_that_the_terminal_cannot_show_is_no_failure(here, tiny_model):
    command = [sys.executable, "-m", "autoflux", "generate", "é日", "--model", str(tiny_model), "--out", "é.png"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert (here / "é.png").exists()


def test_a_name_without_a_suffix_gets_one(here, tiny_model):
    assert generate(tiny_model, "--seed", "5", "--out", "circle") == 0
    assert [f.name for f in here.iterdir()] == ["circle.png"]
