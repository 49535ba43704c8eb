"""`autoflux plan` draws: as text below its tables, and as SVG into a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from autoflux.cli.main import run


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


def test_a_file_that_cannot_be_written_is_said_before_the_machine_is_measured(capfd, tiny_model: Path, tmp_path: Path):
    file = tmp_path / "missing" / "plan.svg"
    assert run(["plan", "--model", "no such model", "--svg", str(file)]) == 1
    said = capfd.readouterr()
    assert "cannot write" in said.err
    assert "create the folder" in said.err
    assert not said.out
    assert run(["plan", "--model", str(tiny_model), "--svg", str(tmp_path)]) == 2
    assert "is a directory" in capfd.readouterr().err


def test_a_drawing_is_no_json(capfd, tiny_model: Path):
    assert run(["plan", "--model", str(tiny_model), "--drawing", "--json"]) == 2
    error = json.loads(capfd.readouterr().out)["error"]
    assert error["code"] == "usage"
    assert "--svg" in error["hint"]
