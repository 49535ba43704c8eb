"""What transformers' files hold, told from notes: the same as by reading them, for as long as they are the same."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from autoflux.plugins import transformers_imports
from autoflux.plugins.transformers_imports import found_once

READS = '''
from pathlib import Path

read = []

def create_import_structure_from_path(path):
    """As transformers' own, of modules with a name a line."""
    folder = Path(path).parent if Path(path).is_file() else Path(path)
    read.append(folder.name)
    found = {}
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and entry.name != "__pycache__":
            found[entry.name] = create_import_structure_from_path(str(entry))
        elif entry.suffix == ".py" and entry.name != "__init__.py":
            needs = frozenset({"torch"} if entry.name.startswith("modeling") else ())
            found.setdefault(needs, {})[entry.stem] = set(entry.read_text().split())
    return found
'''
FOUND: dict[Any, Any] = {
    "clip": {
        frozenset({"torch"}): {"modeling_clip": {"CLIPModel", "CLIPTextModel"}},
        frozenset(): {"configuration_clip": {"CLIPConfig"}},
    },
    "t5": {frozenset({"torch"}): {"modeling_t5": {"T5EncoderModel"}}},
}


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """Another transformers, in its own place for the time of a test."""
    folder = tmp_path / "site" / "transformers"
    for name in ("utils", "models", "models/clip", "models/t5"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("")
    (folder / "__init__.py").write_text("")
    (folder / "utils" / "import_utils.py").write_text(READS)
    (folder / "models" / "clip" / "modeling_clip.py").write_text("CLIPModel CLIPTextModel")
    (folder / "models" / "clip" / "configuration_clip.py").write_text("CLIPConfig")
    (folder / "models" / "t5" / "modeling_t5.py").write_text("T5EncoderModel")
    monkeypatch.setenv("AUTOFLUX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(folder.parent))
    for name in imported():
        monkeypatch.delitem(sys.modules, name)
    yield folder
    for name in imported():  # before the real ones are put back
        del sys.modules[name]


def imported() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == "transformers"]


def looked_up(package: Path, path: Path | None = None) -> tuple[dict[Any, Any], list[str]]:
    """What a new process would find, and the folders that were read for it."""
    for name in imported():
        del sys.modules[name]
    with found_once():
        utils = importlib.import_module("transformers.utils.import_utils")
    found = utils.create_import_structure_from_path(str(path or package / "models"))
    assert utils.create_import_structure_from_path(str(package / "models" / "__init__.py")) == FOUND or path
    return found, utils.read


def test_files_are_read_once_and_not_again_at_the_next_start(package):
    assert looked_up(package) == (FOUND, ["models", "clip", "t5"])
    assert looked_up(package) == (FOUND, [])


def test_another_folder_is_read(package):
    looked_up(package)
    found, read = looked_up(package, package / "models" / "t5")
    assert (found, read) == (FOUND["t5"], ["t5"])


@pytest.mark.parametrize("how", ["written", "added", "removed", "touched"])
def test_files_that_changed_are_read_again(package, how, monkeypatch):
    looked_up(package)
    file = package / "models" / "clip" / "configuration_clip.py"
    expected = dict(FOUND)
    if how == "written":
        file.write_text("CLIPConfig CLIPTextConfig")
        expected["clip"] = {**FOUND["clip"], frozenset(): {"configuration_clip": {"CLIPConfig", "CLIPTextConfig"}}}
    elif how == "added":
        file.with_name("modeling_more.py").write_text("More")
        expected["clip"] = {
            **FOUND["clip"],
            frozenset({"torch"}): {**FOUND["clip"][frozenset({"torch"})], "modeling_more": {"More"}},
        }
    elif how == "removed":
        file.unlink()
        expected["clip"] = {frozenset({"torch"}): FOUND["clip"][frozenset({"torch"})]}
    else:
        os.utime(file, (1, 1))
    monkeypatch.setitem(globals(), "FOUND", expected)
    found, read = looked_up(package)
    assert (found, bool(read)) == (expected, True)
    assert looked_up(package) == (expected, [])


@pytest.mark.parametrize(
    "content", ["", "{", '{"state": 1}', '{"state": "x", "found": {"folders": {}, "needing": []}}']
)
def test_damaged_notes_are_written_anew(package, content):
    looked_up(package)
    file = transformers_imports.cache_dir() / transformers_imports.CACHE
    file.write_text(content)
    assert looked_up(package)[0] == FOUND
    assert looked_up(package) == (FOUND, [])


def test_without_room_for_notes_it_is_read_each_time(package, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUTOFLUX_CACHE_DIR", str(tmp_path / "file"))
    assert looked_up(package)[1]
    assert looked_up(package)[1]


def test_what_cannot_be_noted_is_left_as_it_is(package):
    """A version that tells something else."""
    reads = READS.replace("set(entry.read_text().split())", "[entry.stem, 3]")
    (package / "utils" / "import_utils.py").write_text(reads)
    for _ in range(2):
        with found_once():
            for name in imported():
                del sys.modules[name]
            utils = importlib.import_module("transformers.utils.import_utils")
        found = utils.create_import_structure_from_path(str(package / "models"))
        assert found["t5"] == {frozenset({"torch"}): {"modeling_t5": ["modeling_t5", 3]}}
        assert utils.read


def test_a_version_without_the_function_is_imported_as_it_is(package):
    (package / "utils" / "import_utils.py").write_text("answer = 42\n")
    with found_once():
        utils = importlib.import_module("transformers.utils.import_utils")
    assert utils.answer == 42
