"""The architecture, held by tests: rooms import downwards only, plugins see public names only, starting is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import autoflux

ROOT = Path(__file__).parents[1]
FOUNDATION = ("errors", "units", "values", "paths", "files", "process")
ROOMS = ("hardware", "models", "planning", "runtime", "plugin_manager", "api", "serving", "cli")
"""Each may import from those before it, and from the foundation."""
ABOVE_ALL = ("__init__", "__main__", "hookspecs", "testing")


def _imports(file: Path) -> Iterator[tuple[str, bool]]:
    """Names of autoflux modules that a file imports, and whether only for type checking."""
    tree = ast.parse(file.read_text())
    typing_only = {
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("autoflux"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("autoflux")]
        else:
            continue
        yield from ((name, node in typing_only) for name in names)


def _room(dotted: str) -> str:
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def test_rooms_import_only_from_rooms_above_them():
    wrong = []
    for file in (ROOT / "autoflux").rglob("*.py"):
        room = file.relative_to(ROOT / "autoflux").parts[0].removesuffix(".py")
        if room in ABOVE_ALL:
            continue
        allowed = set(FOUNDATION if room in FOUNDATION else (*FOUNDATION, *ROOMS[: ROOMS.index(room) + 1]))
        if room in ("plugin_manager", "api", "cli", "serving"):
            allowed.add("hookspecs")
        for name, typing_only in _imports(file):
            target = _room(name)
            if target not in allowed and name not in ("autoflux", "autoflux.__version__") and not typing_only:
                wrong.append(f"{file.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_plugins_import_only_public_names():
    wrong = []
    for file in (ROOT / "plugins").rglob("*.py"):
        for name, _ in _imports(file):
            if name == "autoflux":  # `autoflux.hookimpl`: only public names can be reached that way
                continue
            if name.count(".") != 1 or name.removeprefix("autoflux.") not in autoflux.__all__:
                wrong.append(f"{file.name} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_every_public_name_exists():
    assert len(autoflux.__all__) > 30
    for name in autoflux.__all__:
        assert getattr(autoflux, name) is not None


def test_planning_is_pure():
    forbidden = {"torch", "os", "pathlib", "time", "datetime", "random", "subprocess", "psutil"}
    for file in (ROOT / "autoflux" / "planning").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not forbidden & {name.partition(".")[0] for name in names}, f"{file.name}: {names}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["plan", "--help"],
        ["tune", "--help"],
        ["generate", "--help"],
        ["serve", "--help"],
        ["models", "pull", "--help"],
        ["models", "list"],
        ["plugins"],
        ["machines"],
    ],
)
def test_the_program_starts_without_torch(arguments: list[str]):
    code = (
        "import sys\n"
        "from autoflux.cli.main import run\n"
        f"code = run({arguments!r})\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'gradio'} & set(sys.modules)\n"
        "sys.exit(f'{code} {heavy}' if code or heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_room_has_tests():
    for room in ("hardware", "models", "planning", "runtime", "serving", "cli", "plugins"):
        assert list((ROOT / "tests" / room).glob("test_*.py")), room


def test_nothing_in_the_project_names_the_machine_it_was_written_on():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    telling = ("/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/")
    for name in files:
        file = ROOT / name
        if file.suffix in (".py", ".md", ".toml", ".yml", "") and file.is_file():
            text = file.read_text(errors="ignore")
            assert not [path for path in telling if path in text], name
