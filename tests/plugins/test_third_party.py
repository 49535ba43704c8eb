"""What docs/plugins.md says is true: its examples work, and the whole frontend in it installs and serves."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient

from autoflux import hookspecs
from autoflux.plugin_manager import BUILT_IN, load_plugins
from autoflux.testing import FakeDesk
from tests.serving.running import running

DOCUMENT = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text(encoding="utf-8")
HOOKS = [name for name in vars(hookspecs) if name.startswith("register_")]


def section(heading: str) -> str:
    """The text below a heading, up to the next one of any level."""
    match = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert match, f"docs/plugins.md has no heading {heading!r}"
    return match[1]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def module(name: str, source: str) -> types.ModuleType:
    made = types.ModuleType(name)
    exec(compile(source, name, "exec"), made.__dict__)
    return made


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented_and_has_a_built_in_user(hook: str):
    text = section(hook)
    users = re.findall(r"`plugins/(\w+)\.py`", text.partition("Used by:")[2])
    assert users
    for user in users:
        assert user in BUILT_IN
        assert f"def {hook}(" in (Path(__file__).parents[2] / "plugins" / f"{user}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("hook", "registry", "name"),
    [
        ("register_backends", "backends", "echo"),
        ("register_frontends", "frontends", "hello"),
        ("register_models", "models", "seaside"),
        ("register_profiles", "profiles", "my_cpu"),
        ("register_commands", "commands", "greet"),
    ],
)
def test_the_example_of_every_hook_works(hook: str, registry: str, name: str):
    (example,) = blocks(section(hook), "python")
    plugins = load_plugins(module(f"example_{name}", example), entry_points=False)
    assert not [problem for problem in plugins.problems if "example" in problem.plugin]
    assert name in getattr(plugins, registry).names()


def test_the_example_frontend_answers():
    plugins = load_plugins(module("hello", blocks(section("register_frontends"), "python")[0]), entry_points=False)
    with FakeDesk() as desk:
        answer = TestClient(plugins.frontends.get("hello").build(desk)).get("/")
        assert answer.text in ("starting", "loading", "ready")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the documented package is installed in."""
    text = section("A whole frontend")
    (project,), (source,) = blocks(text, "toml"), blocks(text, "python")
    folder = tmp_path_factory.mktemp("postcard")
    (folder / "pyproject.toml").write_text(project, encoding="utf-8")
    (folder / "postcard.py").write_text(source, encoding="utf-8")
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(target), str(folder)], check=True)
    return target


def test_the_documented_frontend_is_short():
    text = section("A whole frontend")
    lines = [line for block in blocks(text, r"(?:toml|python)") for line in block.splitlines() if line.strip()]
    assert len(lines) < 40


def test_the_documented_frontend_serves_pictures(installed: Path, tiny_model: Path):
    command = ["-m", "autoflux", "serve", "--frontend", "postcard", "--port", "0", "--backend", "fake"]
    with running(*command, "--model", str(tiny_model), PYTHONPATH=str(installed)) as server:
        server.url  # noqa: B018 — waits for the port
        server.until("ready")
        assert "<form" in httpx.get(server.url).text
        page = httpx.post(server.url, content="prompt=a+red+circle", timeout=60)
        (name,) = re.findall(r"<img src='(\w+\.png)'>", page.text)
        assert httpx.get(f"{server.url}/{name}").content.startswith(b"\x89PNG")
        refused = httpx.post(server.url, content="prompt=+", timeout=60)
        assert (refused.status_code, "the prompt is empty" in refused.text) == (400, True)
        assert httpx.post(server.url, headers={"origin": "http://evil.example"}).status_code == 403
        assert server.interrupt() == 130


def test_the_documented_test_passes(installed: Path, tmp_path: Path):
    (tmp_path / "test_postcard.py").write_text(blocks(section("Testing a plugin"), "python")[0], encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(installed)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_a_plugin_that_cannot_be_imported_does_not_stop_the_program(tmp_path: Path):
    (tmp_path / "broken_plugin.py").write_text("import no_such_package\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "autoflux", "plugins"],
        env={"PYTHONPATH": str(tmp_path), "AUTOFLUX_PLUGINS": "broken_plugin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "No module named 'no_such_package'" in done.stdout
