"""torch's allocator settings: that they are merged as torch reads them, and set before it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoflux.runtime.allocator import apply, merged, settings
from autoflux.serving.process import Deadlines
from autoflux.serving.service import Service
from autoflux.serving.supervisor import Supervisor
from autoflux.testing import fake_model, fake_plan, fake_prepare
from tests.serving.running import eventually

VERSION = metadata.version("torch")
OURS = settings(VERSION, "linux")
ALL = ",".join(f"{name}:{value}" for name, value in OURS.items())
PINNED = "pinned_max_round_threshold_mb:32,pinned_max_cached_size_mb:32"
NEW, FORMER, HIP = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"


def in_a_process(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process that has those allocator settings only."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True, check=False)


APPLY = "import os; from autoflux.runtime.allocator import apply; reason = apply(os.environ); print(reason);"
SHOW = "import torch; print(torch._C._accelerator_getAllocatorSettings())"


@pytest.mark.parametrize(
    ("user", "result"),
    [
        (None, "expandable_segments:True"),
        ("", "expandable_segments:True"),
        (" ", "expandable_segments:True"),
        ("max_split_size_mb:128", "max_split_size_mb:128,expandable_segments:True"),
        (" max_split_size_mb : 128 , ", " max_split_size_mb : 128,expandable_segments:True"),
        ("expandable_segments:False", "expandable_segments:False"),
        ("backend:cudaMallocAsync", "backend:cudaMallocAsync"),
        ("a:[64:8,>:1],b:0.5", "a:[64:8,>:1],b:0.5,expandable_segments:True"),
    ],
)
def test_what_the_user_says_wins_and_ours_fills_in(user, result):
    assert merged(user, {"expandable_segments": "True"}) == result


def test_limits_of_pinned_buffers_are_set_together_or_not_at_all():
    """torch 2.13 hands out buffers that are too small where the first is below the second."""
    ours = settings("2.13.0", "linux")
    assert merged("pinned_max_cached_size_mb:1024", ours) == "pinned_max_cached_size_mb:1024,expandable_segments:True"
    assert "cached" not in merged("pinned_max_round_threshold_mb:64", ours)


@pytest.mark.parametrize("user", ["expandable_segments", "a:1,,b:2", "a:b:c", "a:[1", ",", "=", "a=1"])
def test_what_cannot_be_read_is_passed_on_untouched_with_a_warning(user, caplog):
    assert merged(user, OURS) == user
    (line,) = caplog.messages
    assert repr(user) in line


_NAMES = st.sampled_from(["max_split_size_mb", "backend", "x", *OURS])
_VALUES = st.sampled_from(["1", "True", "0.5", "[64:8,>:1]", "native"])


@given(st.dictionaries(_NAMES, _VALUES))
def test_merging_keeps_every_option_of_the_user_names_none_twice_and_is_idempotent(options):
    user = ",".join(f"{name}:{value}" for name, value in options.items())
    result = merged(user, OURS)
    assert result.startswith(user)
    assert merged(result, OURS) == result
    assert all(result.count(f"{name}:") == 1 for name in options)


@given(st.text())
def test_no_text_is_too_odd(text):
    assert merged(text, OURS).startswith(text.rstrip(" ,"))


@pytest.mark.parametrize(
    ("version", "platform", "result"),
    [
        ("2.11.0", "linux", "expandable_segments:True"),
        ("2.12.1+cu130", "linux", "expandable_segments:True"),
        ("2.13.0", "linux", f"expandable_segments:True,{PINNED}"),
        ("2.15.0+cu132", "darwin", f"expandable_segments:True,{PINNED}"),
        ("3.0.0.post1", "linux", f"expandable_segments:True,{PINNED}"),
        ("2.13.0a0+git1234", "linux", "expandable_segments:True"),
        ("2.13.0.dev20260301", "linux", "expandable_segments:True"),
        ("unknown", "linux", "expandable_segments:True"),
        ("2.11.0", "win32", ""),
        ("2.13.0", "win32", PINNED),
    ],
)
def test_a_version_is_told_only_what_it_knows(version, platform, result):
    assert merged(None, settings(version, platform)) == result


@pytest.mark.parametrize(
    ("variables", "seen"),
    [
        ({}, ALL),
        ({NEW: "max_split_size_mb:100"}, f"max_split_size_mb:100,{ALL}"),
        ({FORMER: "max_split_size_mb:200"}, f"max_split_size_mb:200,{ALL}"),
        ({HIP: "max_split_size_mb:300"}, f"max_split_size_mb:300,{ALL}"),
        ({FORMER: ""}, ALL),
        # torch takes the former name first.
        ({NEW: "max_split_size_mb:100", FORMER: "max_split_size_mb:200"}, f"max_split_size_mb:200,{ALL}"),
        ({NEW: "expandable_segments:False,pinned_max_cached_size_mb:64"},) * 2,
        (
            {NEW: "roundup_power2_divisions:[64:8,256:4,>:1], max_split_size_mb: 100,"},
            f"roundup_power2_divisions:[64:8,256:4,>:1], max_split_size_mb: 100,{ALL}",
        ),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="other settings there")
def test_torch_lives_with_the_result_and_has_read_it(variables, seen):
    seen = seen[NEW] if isinstance(seen, dict) else seen
    done = in_a_process(APPLY + SHOW, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["None", seen]


def test_the_variable_names_that_are_set_are_the_ones_that_change(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    both = {NEW: "max_split_size_mb:100", FORMER: "expandable_segments:False"}
    for environment in ({}, {NEW: ""}, {FORMER: ""}, both):
        names = set(environment) or {NEW}
        assert apply(environment) is None
        assert set(environment) == names
        first = dict(environment)
        assert apply(environment) is None
        assert environment == first
    assert "expandable_segments:False" in both[FORMER]


def test_it_is_too_late_when_torch_is_imported():
    import torch  # noqa: F401

    environment = {NEW: "max_split_size_mb:100"}
    assert "already imported" in apply(environment)
    assert environment == {NEW: "max_split_size_mb:100"}


def test_this_module_imports_no_torch():
    done = in_a_process(APPLY + "import sys; sys.exit('torch' in sys.modules)")
    assert (done.returncode, done.stdout) == (0, "None\n")


SPY = """
import os, sys
import autoflux
import click

def told():
    return f"{os.environ.get('PYTORCH_ALLOC_CONF')} {'torch' in sys.modules}"

@click.command("spy")
def spy():
    print(told())

class Backend:
    name = "fake"
    def missing(self):
        return None
    def build(self, plan, model, progress):
        raise autoflux.DamagedCheckpoint(told())

@autoflux.hookimpl
def register_commands(register):
    register(spy)

@autoflux.hookimpl
def register_backends(register):
    register(Backend())
"""


@pytest.fixture
def spy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin that says what it sees when a command runs, and when a pipeline is to be built."""
    (tmp_path / "spy_plugin.py").write_text(SPY, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("AUTOFLUX_PLUGINS", "spy_plugin")
    monkeypatch.syspath_prepend(tmp_path)
    for name in (NEW, FORMER, HIP):
        monkeypatch.delenv(name, raising=False)


def test_the_program_sets_them_before_a_command_runs(spy):
    done = subprocess.run([sys.executable, "-m", "autoflux", "spy"], capture_output=True, text=True, check=True)
    assert done.stdout == f"{merged(None, settings(VERSION, sys.platform))} False\n"


def test_a_worker_sets_them_also_when_its_service_has_not(spy):
    told = []
    assert fake_plan().backend == "fake"
    service = Service(fake_model(), Supervisor(Deadlines()))
    service.start(fake_prepare, told.append)
    try:
        eventually(lambda: told)
    finally:
        service.stop()
    assert told[0].message == f"{merged(None, settings(VERSION, sys.platform))} False"
