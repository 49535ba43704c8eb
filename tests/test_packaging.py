"""The wheel: built, installed apart from the sources, run from another folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a virtual environment that has the wheel and sees our dependencies, but not our sources."""
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy: another worker may build at the same time, and what an earlier build left in `build/` is not taken.
    sources = _copied(folder / "sources")
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(sources)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    site = next((folder / "venv").glob("lib/python*/site-packages"))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True, text=True)
    dependencies = [p for p in sys.path if p.endswith("site-packages")]
    # Appended as plain path entries: an editable install's hook in the other folders is not run.
    (site / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    return python


def _copied(folder: Path) -> Path:
    folder.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("autoflux", "plugins", "profiles"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_the_wheel_holds_plugins_profiles_and_the_sample_model(installed, tmp_path):
    code = (
        "import autoflux, json, sys\n"
        "from autoflux.plugin_manager import load_plugins\n"
        "from autoflux.api import find_model\n"
        "p = load_plugins(entry_points=False)\n"
        "print(json.dumps({'home': autoflux.__file__, 'profiles': p.profiles.names(), 'problems': len(p.problems),"
        " 'backends': p.backends.names(), 'sample': find_model('sample', p).path}))"
    )
    done = subprocess.run([installed, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert str(ROOT) not in found["home"]
    assert str(ROOT) not in found["sample"]
    assert found["problems"] == 0
    assert {"cpu", "cuda", "mps", "xpu"} <= set(found["profiles"])
    assert found["backends"] == ["diffusers", "diffsynth"]


def test_the_installed_program_runs_from_another_folder(installed, tmp_path):
    command = [installed, "-m", "autoflux", "plugins", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] is True


def test_every_folder_of_the_package_is_listed():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    places = {
        "autoflux": ROOT / "autoflux",
        "autoflux.plugins": ROOT / "plugins",
        "autoflux.profiles": ROOT / "profiles",
    }
    for package, folder in places.items():
        for init in folder.rglob("__init__.py"):
            dotted = ".".join([package, *init.parent.relative_to(folder).parts])
            assert dotted in listed, dotted
