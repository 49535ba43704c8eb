"""Where what Python compiles libraries to is kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LOOK = """
import sys
from autoflux.runtime import bytecode
bytecode.keep("library")
import library
print(library.__spec__.cached, sys.pycache_prefix)
"""


def imported(folder: Path, *flags: str, **variables: str) -> tuple[Path, str]:
    """Import the library in a process: where its bytecode belongs, and the place for all of it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]),
        "AUTOFLUX_CACHE_DIR": str(folder / "cache"),
        **variables,
    }
    command = [sys.executable, *flags, "-c", LOOK]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    return Path(said[0]), said[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    library = tmp_path / "library"
    library.mkdir()
    (library / "__init__.py").write_text("answer = 42\n")
    return tmp_path


def test_what_python_may_not_write_is_kept_in_the_cache_folder(folder):
    cached, prefix = imported(folder, PYTHONDONTWRITEBYTECODE="1")
    assert prefix == str(folder / "cache" / "bytecode")
    assert cached.is_relative_to(prefix)
    assert cached.exists()
    assert not (folder / "library" / "__pycache__").exists()


def test_what_is_kept_is_used_by_the_next_start_and_made_anew_when_the_source_changes(folder):
    cached, _ = imported(folder, "-B")
    first = cached.read_bytes()
    os.utime(cached, (0, 0))
    assert imported(folder, "-B") == (cached, str(folder / "cache" / "bytecode"))
    assert cached.stat().st_mtime == 0
    (folder / "library" / "__init__.py").write_text("answer = 'another'\n")
    imported(folder, "-B")
    assert cached.read_bytes() != first


def test_processes_that_are_started_keep_it_there_too(folder):
    cached, prefix = imported(folder, "-B")
    cached.unlink()
    assert imported(folder, "-B", PYTHONPYCACHEPREFIX=prefix) == (cached, prefix)
    assert cached.exists()


def test_python_does_it_where_it_can(folder):
    cached, prefix = imported(folder)
    assert (cached.parent, prefix) == (folder / "library" / "__pycache__", "None")
    assert imported(folder, "-B") == (cached, "None")


def test_a_place_that_the_user_has_named_stays(folder):
    mine = str(folder / "mine")
    cached, prefix = imported(folder, "-B", PYTHONPYCACHEPREFIX=mine)
    assert prefix == mine
    assert not cached.exists()


def test_where_the_cache_folder_cannot_be_made_nothing_changes(folder):
    (folder / "cache").write_text("a file")
    assert imported(folder, "-B")[1] == "None"


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has no such permissions")
@pytest.mark.parametrize("shared", ["cache", "cache/bytecode"])
def test_what_others_could_have_put_there_is_not_run(folder, shared):
    (folder / "cache" / "bytecode").mkdir(parents=True)
    (folder / shared).chmod(0o777)
    assert imported(folder, "-B")[1] == "None"


def test_the_folder_is_the_user_s_alone(folder):
    _, prefix = imported(folder, "-B")
    assert Path(prefix).stat().st_mode & 0o077 == 0
