"""Imports that leave out what is not used: it is still there for who uses it, and nothing else is changed."""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from autoflux.plugins import diffusers_imports
from autoflux.plugins.diffusers_imports import hidden, import_later, lean_imports, packages_distributions


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A package `heavy` with a module `heavy.part`, each of which notes that it was imported."""
    folder = tmp_path / "with_packages" / "heavy"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "part.py").write_text("answer = 42\n")
    monkeypatch.syspath_prepend(str(folder.parent))
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "heavy"]:
        del sys.modules[name]


@pytest.fixture
def searched(tmp_path, monkeypatch) -> list[None]:
    """Grows whenever all packages are searched; with a cache folder of the test's own."""
    times: list[None] = []

    def find() -> dict[str, list[str]]:
        times.append(None)
        return importlib.metadata.packages_distributions()

    monkeypatch.setenv("AUTOFLUX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(diffusers_imports, "_FIND_ALL", find)
    return times


def test_hidden_packages_cannot_be_imported_and_can_be_afterwards(package):
    with hidden("heavy"):
        assert importlib.util.find_spec("heavy") is None
        with pytest.raises(ModuleNotFoundError):
            import heavy
    import heavy.part

    sys.modules.pop("heavy.part")
    sys.modules.pop("heavy")
    with hidden("heavy", before=("no_such_package",)), pytest.raises(ModuleNotFoundError):
        import heavy
    with hidden("heavy", before=("no_such_package", "pytest")):  # pytest may have seen it
        import heavy.part
    with hidden("heavy"):  # who has it keeps it
        assert sys.modules["heavy"] is heavy
    assert heavy.part.answer == 42


def test_a_module_is_imported_when_it_is_used(package):
    import_later("heavy.part", "no_such_package.part", "heavy.no_such_part")
    import heavy.part

    kept = heavy.part
    assert "answer" not in vars(kept)
    assert kept.__file__ == str(package / "part.py")
    assert not hasattr(kept, "__wrapped__")
    assert "answer" not in vars(kept)
    assert kept.answer == 42
    assert vars(heavy.part)["answer"] == 42
    assert sys.modules["heavy.part"] is heavy.part is not kept
    assert kept.answer == 42
    with pytest.raises(AttributeError):
        _ = kept.question


def test_a_module_that_is_there_stays_what_it_is(package):
    there = importlib.import_module("heavy.part")
    import_later("heavy.part")
    assert sys.modules["heavy.part"] is there


def test_parts_of_a_package_come_without_the_whole_of_it(package):
    (package / "parts").mkdir()
    (package / "parts" / "__init__.py").write_text("from .other import many\n")
    (package / "parts" / "one.py").write_text("answer = 42\n")
    (package / "parts" / "other.py").write_text("many = 1000\n")
    import_later("heavy.parts")
    import heavy.parts
    from heavy.parts.one import answer

    assert answer == 42
    assert heavy.parts.one.answer == 42
    assert "heavy.parts.other" not in sys.modules
    one = sys.modules["heavy.parts.one"]
    assert heavy.parts.many == 1000
    assert "many" in vars(heavy.parts)
    assert heavy.parts.one is one is sys.modules["heavy.parts.one"]
    assert heavy.parts.other.many == 1000


def test_packages_are_searched_once_until_one_comes(package, searched):
    expected = importlib.metadata.packages_distributions()
    assert packages_distributions() == expected
    assert packages_distributions() == expected
    assert len(searched) == 1
    (package.parent / "other-1.0.dist-info").mkdir()
    (package.parent / "other-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: other\nVersion: 1.0\n"
    )
    (package.parent / "other-1.0.dist-info" / "top_level.txt").write_text("heavy\n")
    assert packages_distributions()["heavy"] == ["other"]
    assert len(searched) == 2
    assert packages_distributions()["heavy"] == ["other"]
    assert len(searched) == 2


@pytest.mark.parametrize("content", [b"", b"{", b'{"python": 3}', b"[]", b"\xff\xfe"])
def test_a_damaged_note_is_written_anew(tmp_path, searched, content):
    (tmp_path / "cache").mkdir()
    file = tmp_path / "cache" / diffusers_imports.CACHE
    file.write_bytes(content)
    assert packages_distributions() == importlib.metadata.packages_distributions()
    assert json.loads(file.read_bytes())["python"] == sys.version


def test_without_a_place_for_the_note_packages_are_searched(tmp_path, searched):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert packages_distributions()
    assert packages_distributions()
    assert len(searched) == 2


def test_afterwards_everything_is_as_it_was():
    found = importlib.metadata.packages_distributions

    def fail() -> None:
        assert importlib.metadata.packages_distributions is packages_distributions
        assert not gc.isenabled()
        raise RuntimeError("broken")

    frozen = gc.get_freeze_count()
    with lean_imports():
        pass
    assert gc.get_freeze_count() == frozen, "garbage of those who import would stay for good"
    with pytest.raises(RuntimeError, match="broken"), lean_imports():
        fail()
    assert importlib.metadata.packages_distributions is found
    assert gc.isenabled()


def test_libraries_come_without_what_takes_longest_and_find_it_when_it_is_used():
    """In a process of its own: here, all of it was imported long ago."""
    script = """
import sys
from autoflux import process
process.claim()
import autoflux.plugins.diffusers_loading
assert not {"sklearn", "scipy.optimize", "scipy.stats._stats_py", "peft", "torchvision", "sympy"} & set(sys.modules)
assert not [name for name in sys.modules if name.startswith("diffusers.") and "stable_cascade" in name]
from diffusers import StableCascadeUNet
from diffusers.models.unets import StableCascadeUNet as Same
from diffusers.models.attention_dispatch import flex_attention
from torch.nn.attention.flex_attention import BlockMask
from transformers.utils import is_torch_flex_attn_available
assert StableCascadeUNet is Same and flex_attention.BlockMask is BlockMask and not is_torch_flex_attn_available()
from diffusers import FlowMatchEulerDiscreteScheduler, LMSDiscreteScheduler
beta = FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True)
beta.set_timesteps(4)
linear = LMSDiscreteScheduler()
linear.set_timesteps(4)
print(beta.sigmas.tolist(), linear.get_lms_coefficient(1, 0, 0))
"""
    plain = """
from diffusers import FlowMatchEulerDiscreteScheduler, LMSDiscreteScheduler
beta = FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True)
beta.set_timesteps(4)
linear = LMSDiscreteScheduler()
linear.set_timesteps(4)
print(beta.sigmas.tolist(), linear.get_lms_coefficient(1, 0, 0))
"""
    ours, theirs = (
        subprocess.run([sys.executable, "-c", text], check=True, capture_output=True, text=True).stdout
        for text in (script, plain)
    )
    assert ours == theirs
    assert ours.startswith("[1.0")


def test_a_program_that_imports_autoflux_finds_all_of_both_libraries():
    script = """
import autoflux.plugins.diffusers_loading
from diffusers.models import transformers, unets
from transformers.utils import is_torch_flex_attn_available
assert "SD3Transformer2DModel" in dir(transformers) and "StableCascadeUNet" in dir(unets)
print(is_torch_flex_attn_available())
"""
    ran = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert ran.stdout == "True\n"
