"""`autoflux plan` draws: as text below its tables, and as SVG into a file."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from autoflux.cli.main import run
from autoflux.planning.values import Plan


def test_the_drawing_stands_below_the_tables(capfd: pytest.CaptureFixture[str], tiny_model: Path):
    assert run(["plan", "--model", str(tiny_model), "--device", "cpu", "--drawing"]) == 0
    shown = capfd.readouterr().out
    tables, drawing = shown.split("\nblocks: ")
    assert "What it takes" in tables
    assert "compute  │██" in drawing
    assert "decode" in drawing
    run(["plan", "--model", str(tiny_model), "--device", "cpu"])
    assert "compute " not in capfd.readouterr().out


def test_a_terminal_without_unicode_gets_ascii(tiny_model: Path):
    command = [sys.executable, "-X", "utf8=0", "-m", "autoflux", "plan", "--model", str(tiny_model), "--device", "cpu"]
    done = subprocess.run(
        [*command, "--drawing"], capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 0, done.stderr
    assert b"compute  |##" in done.stdout
    assert done.stdout.isascii()
    assert b"\\u" not in done.stdout


def test_the_svg_is_written_beside_text_and_json(capfd, tiny_model: Path, tmp_path: Path):
    file = tmp_path / "plan.svg"
    file.write_text("old")
    assert run(["plan", "--model", str(tiny_model), "--device", "cpu", "--svg", str(file)]) == 0
    assert "What it takes" in capfd.readouterr().out
    assert ET.parse(file).getroot().tag.endswith("svg")
    written = file.read_bytes()
    file.unlink()
    assert run(["plan", "--model", str(tiny_model), "--device", "cpu", "--json", "--svg", str(file)]) == 0
    assert json.loads(capfd.readouterr().out)["ok"] is True
    assert ET.fromstring(file.read_text()).tag == ET.fromstring(written).tag
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.svg"]


@pytest.mark.parametrize("option", ["--save", "--svg"])
def test_a_link_is_followed_and_what_is_no_file_is_left_alone(capfd, tiny_model: Path, tmp_path: Path, option):
    (target := tmp_path / "target").write_text("old")
    (link := tmp_path / "link").symlink_to(target)
    assert run(["plan", "--model", str(tiny_model), "--device", "cpu", option, str(link)]) == 0
    assert link.is_symlink()
    assert target.read_text() != "old"
    os.mkfifo(fifo := tmp_path / "fifo")
    capfd.readouterr()
    assert run(["plan", "--model", "no such model", option, str(fifo)]) == 1
    assert "no regular file is there" in capfd.readouterr().err
    assert fifo.is_fifo()


def test_a_file_that_cannot_be_written_is_said_before_the_machine_is_measured(capfd, tiny_model: Path, tmp_path: Path):
    file = tmp_path / "missing" / "plan.svg"
    assert run(["plan", "--model", "no such model", "--svg", str(file)]) == 1
    said = capfd.readouterr()
    assert "cannot write" in said.err
    assert "create the folder" in said.err
    assert not said.out
    assert run(["plan", "--model", str(tiny_model), "--svg", str(tmp_path)]) == 2
    assert "is a directory" in capfd.readouterr().err


def test_plan_and_drawing_are_not_written_into_one_file(capfd, tiny_model: Path, tmp_path: Path):
    file = tmp_path / "plan"
    names = ["--save", str(file), "--svg", str(tmp_path / "." / "plan")]
    assert run(["plan", "--model", str(tiny_model), *names]) == 2
    assert "--save and --svg name the same file" in capfd.readouterr().err
    assert not file.exists()


def test_a_drawing_is_no_json(capfd, tiny_model: Path):
    assert run(["plan", "--model", str(tiny_model), "--drawing", "--json"]) == 2
    error = json.loads(capfd.readouterr().out)["error"]
    assert error["code"] == "usage"
    assert "--svg" in error["hint"]


FLUX_ON_A_SMALL_CARD = ["plan", "--model", "flux.1-dev", "--on", "rtx-4060-8gb"]


def test_a_plan_is_short_unless_asked(capfd):
    assert run(FLUX_ON_A_SMALL_CARD) == 0
    brief = capfd.readouterr().out
    for words in ("What it takes", "Where the weights go", "Why", "--explain", "--compare"):
        assert words in brief
    assert "instead" not in brief
    assert "Ways that" not in brief


@pytest.mark.parametrize("unit", ["block", "layer"])
def test_what_is_streamed_one_by_one_is_told(unit, capfd):
    assert run([*FLUX_ON_A_SMALL_CARD, "--block-size", unit, "--quality", "exact"]) == 0
    assert f"streamed {unit} by {unit}: about" in capfd.readouterr().out


def test_every_choice_is_explained_with_what_the_next_best_would_cost(capfd):
    assert run([*FLUX_ON_A_SMALL_CARD, "--explain"]) == 0
    shown = capfd.readouterr().out
    for topic in ("device", "precision", "weights", "offload", "backend", "batch", "compiling", "attention", "vae"):
        assert f"\n{topic}: " in shown
    for known in ("assumed", "reported", "a prior of the profile"):
        assert known in shown
    joined = " ".join(shown.split())
    assert re.search(
        r"instead bfloat16: \+[\d.]+ s a step, \+[\d.]+ s a picture, [+-][\d.]+ m?s to start, "
        r"[+-][\d.]+ MB of device memory",
        joined,
    )
    assert re.search(r"instead component: needs [\d.]+ GB of device memory and may use [\d.]+ GB", joined)


def test_all_ways_are_compared_also_those_that_do_not_fit(capfd):
    assert run([*FLUX_ON_A_SMALL_CARD, "--compare"]) == 0
    shown = capfd.readouterr().out
    fitting, others = shown.split("Ways that do not fit")
    assert fitting.index("stream int8") < fitting.index("stream fp8") < fitting.index("exact")
    assert "may use 8.09 GB" in " ".join(others.split())
    assert run([*FLUX_ON_A_SMALL_CARD, "--compare", "--json"]) == 0
    made = Plan.from_json(json.dumps(json.loads(capfd.readouterr().out)["data"]))
    assert {(way.offload.value, way.fits) for way in made.rejected if way.device == "cuda:0"} == {
        ("stream", True),
        ("component", False),
        ("none", False),
    }


def test_where_nothing_fits_the_comparison_stands_above_the_refusal(capfd):
    refused = ["plan", "--model", "flux.1-dev", "--on", "rtx-3050-laptop-4gb-windows", "--vram", "1.5GB", "--compare"]
    assert run(refused) == 3
    said = capfd.readouterr()
    assert "Ways that do not fit" in said.out
    assert "Ways that fit" not in said.out
    assert "does not fit" in said.err
    assert run([*refused, "--json"]) == 3
    envelope = json.loads(capfd.readouterr().out)
    assert (envelope["ok"], envelope["error"]["code"]) == (False, "does_not_fit")
    assert all(not way["fits"] and way["reason"].startswith("needs ") for way in envelope["data"]["rejected"])


def test_a_saved_plan_leaves_nothing_to_compare(capfd, tiny_model: Path, tmp_path: Path):
    file = str(tmp_path / "plan.json")
    assert run(["plan", "--model", str(tiny_model), "--explain", "--save", file]) == 0
    capfd.readouterr()
    assert run(["plan", "--plan", file, "--explain"]) == 0
    assert "instead" in capfd.readouterr().out
    assert run(["plan", "--plan", file, "--compare"]) == 2
    assert "--compare would change it" in capfd.readouterr().err
    assert run(["plan", "--plan", file, "--refresh"]) == 2
    assert "--refresh would change it" in capfd.readouterr().err


def test_numbers_are_told_as_people_write_them(capfd):
    assert run(["plan", "--model", "flux.1-dev", "--on", "b200-180gb"]) == 0
    assert "1462 TFLOP/s" in capfd.readouterr().out


@pytest.mark.parametrize(("resident", "words"), [((), "RAM"), ((3,), ", 1 block stays"), ((3, 4), ", 2 blocks stay")])
def test_blocks_that_stay_are_counted(capfd, tmp_path: Path, resident, words):
    file = tmp_path / "plan.json"
    assert run([*FLUX_ON_A_SMALL_CARD, "--quant", "int8", "--no-compile", "--save", str(file)]) == 0
    made = Plan.from_json(file.read_bytes())
    parts = (c.replace(resident=resident) if c.name == "transformer" else c for c in made.components)
    file.write_text(made.replace(components=tuple(parts), park_for_decode=False).to_json())
    capfd.readouterr()
    assert run(["plan", "--on", "rtx-4060-8gb", "--plan", str(file)]) == 0
    shown = " ".join(capfd.readouterr().out.split())
    assert words in shown
    assert resident or " stay" not in shown.partition("Why")[0]


def test_a_plan_whose_blocks_all_stay_streams_nothing(capfd):
    assert run(["plan", "--model", "flux.1-dev", "--on", "h100-80gb"]) == 0
    shown = " ".join(capfd.readouterr().out.split())
    assert "15.2 GB cuda:0, all 57 blocks stay" in shown
    assert "streams" not in shown
