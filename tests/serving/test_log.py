"""What is kept of a worker's output."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoflux.serving.log import MAX_CHARACTERS, WorkerLog


def test_the_last_line_is_kept_and_the_file_is_gone():
    log = WorkerLog()
    path = Path(str(log.path))
    path.write_bytes(b"first\nlast \xff\n\n")
    log.forget_name()
    log.forget_name()
    assert log.take() == "last \ufffd"
    assert not path.exists()


def test_a_long_line_is_cut_and_nothing_is_nothing():
    silent, long = WorkerLog(), WorkerLog()
    Path(str(long.path)).write_text("x" * 1000)
    assert long.take() == "x" * MAX_CHARACTERS
    assert silent.take() == ""


def test_debugging_leaves_the_output_on_the_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AUTOFLUX_DEBUG", "1")
    log = WorkerLog()
    assert log.path is None
    assert log.take() == ""
