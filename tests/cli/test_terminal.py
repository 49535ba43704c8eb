"""Terminals of every width, streams that are closed or full, and words that are almost right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from autoflux.cli.main import run
from autoflux.hardware.known import known_machine
from autoflux.units import format_bytes


def start(*arguments: str, redirected: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run autoflux in a shell that redirects its streams."""
    command = ["bash", "-c", f'exec "$@" {redirected}', "bash", sys.executable, "-m", "autoflux", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def test_without_a_command_the_help_is_shown_and_not_called_an_error(capfd: pytest.CaptureFixture[str]):
    for arguments in ([], ["models"]):
        assert run(arguments) == 2
        said = capfd.readouterr().err
        assert "Commands:" in said
        assert "error:" not in said


def test_a_command_that_is_almost_right_is_guessed(capfd: pytest.CaptureFixture[str]):
    assert run(["plna"]) == 2
    said = capfd.readouterr().err
    assert "no command named 'plna'; known: " in said
    assert "did you mean 'plan'?" in said
    assert run(["--plan"]) == 2
    assert "no such option" in capfd.readouterr().err.lower()


def test_words_between_colons_are_no_pictures(capfd: pytest.CaptureFixture[str]):
    assert run(["plan", "--model", ":smile:"]) == 2
    assert "':smile:'" in capfd.readouterr().err


@pytest.mark.parametrize("redirected", [">&-", ">&- 2>&-"])
def test_a_closed_output_is_no_failure(tiny_model: Path, redirected: str):
    done = start("plan", "--model", str(tiny_model), redirected=redirected)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is always full")
def test_a_full_output_is_named_and_not_unexpected():
    done = start("machines", redirected=">/dev/full")
    assert done.returncode == 1
    assert done.stderr == "error: cannot write to standard output: No space left on device\n"


@pytest.mark.parametrize("columns", ["0", "1"])
def test_a_terminal_without_a_width_gets_lines_all_the_same(tiny_model: Path, columns: str):
    printed = start("plan", "--model", str(tiny_model), "--explain", COLUMNS=columns).stdout
    assert "What it takes" in printed
    assert "of the profile 'cpu'" in " ".join(printed.split())


def test_the_first_line_of_a_plan_is_all_of_its_summary(tiny_model: Path):
    first = start("plan", "--model", str(tiny_model), COLUMNS="40").stdout.splitlines()[0]
    assert " steps" in first


@pytest.mark.parametrize("columns", ["20", "40", "80"])
@pytest.mark.parametrize("command", [("models", "show"), ("plan", "--model")])
def test_no_word_of_a_table_is_broken(tiny_model: Path, command: tuple[str, ...], columns: str):
    words = start(*command, str(tiny_model), COLUMNS=columns).stdout.split()
    assert {"text_encoder_2", "transformer"} <= set(words)
    assert words.count("text_encoder_2") == 1


@pytest.mark.parametrize("columns", ["40", "80"])
def test_names_of_plugins_are_whole_at_every_width(columns: str):
    printed = start("plugins", COLUMNS=columns).stdout
    for name in ("diffusers_backend", "cuda-ampere-datacentre", "gradio_frontend"):
        assert name in printed
    assert max(map(len, printed.splitlines())) <= int(columns)


def test_a_narrow_terminal_cuts_no_figure_of_a_machine():
    lines = start("machines", COLUMNS="40").stdout.splitlines()
    memory = format_bytes(known_machine("b200-180gb").accelerators[0].total_bytes.value)
    (b200,) = [line.split() for line in lines if line.startswith("b200")]
    assert b200[1:3] == memory.split()
    assert b200[3].isdecimal()
    assert not any("…" in line or len(line) > 64 for line in lines[:-3])


def test_a_known_machine_has_a_disk_without_a_folder(capfd: pytest.CaptureFixture[str]):
    assert run(["machines", "rtx-3060-12gb"]) == 0
    assert "disk" in capfd.readouterr().out.splitlines()
