"""Memory given back to the system."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from autoflux.runtime import memory
from autoflux.runtime.memory import peak_ram_bytes

GIVEN_BACK = """
import contextlib, gc, psutil, sys, torch
from autoflux.runtime.memory import freed_ram_given_back

MIB = 2**20

def stays():
    '''What is still taken, in MiB, of freed weights that lie below one in use.'''
    before = psutil.Process().memory_info().rss
    weights = [torch.ones(8 * MIB, dtype=torch.uint8) for _ in range(40)]
    last = weights[-1]
    weights.clear()
    gc.collect()
    assert last.sum() == 8 * MIB
    return (psutil.Process().memory_info().rss - before) // MIB

torch.ones(31 * MIB, dtype=torch.uint8)  # from now on glibc keeps what is smaller
while_loading = contextlib.nullcontext() if sys.argv[1] == "without" else freed_ram_given_back()
with while_loading:
    print(stays())
torch.ones(31 * MIB, dtype=torch.uint8)
print(stays())
"""


def stays(how: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", GIVEN_BACK, how], capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_is_freed_while_loading_does_not_stay_with_the_c_library_and_afterwards_it_may_again():
    assert stays("without")[0] > 200
    loading, afterwards = stays("with")
    assert loading < 20
    assert afterwards > 200


def test_without_glibc_nothing_is_called(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _name: object())
    with memory.freed_ram_given_back():
        pass
    monkeypatch.setattr(memory.sys, "platform", "win32")
    monkeypatch.setattr(memory.ctypes, "CDLL", None)
    with memory.freed_ram_given_back():
        pass


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_what_torch_keeps_is_given_back_on_every_kind_of_device(monkeypatch, kind):
    given_back = []
    accelerator = SimpleNamespace(
        is_available=lambda: True, current_accelerator=lambda: SimpleNamespace(type=kind)
    )  # without `empty_cache`, which fails on mps
    own = SimpleNamespace(empty_cache=lambda: given_back.append(kind))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(accelerator=accelerator, **{kind: own}))
    memory.give_back_unused()
    assert given_back == [kind]


@pytest.mark.parametrize(("reserved", "times"), [(199, 0), (200, 1)])
def test_a_little_that_torch_keeps_is_not_worth_giving_back(monkeypatch, reserved, times):
    given_back = []
    cuda = SimpleNamespace(
        empty_cache=lambda: given_back.append(reserved),
        memory_reserved=lambda device: reserved if device == "cuda:1" else 0,
        memory_allocated=lambda device: 100 if device == "cuda:1" else 0,
    )
    accelerator = SimpleNamespace(is_available=lambda: True, current_accelerator=lambda: SimpleNamespace(type="cuda"))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(accelerator=accelerator, cuda=cuda))
    memory.give_back_much_unused("cuda:1", 100)
    assert given_back == [reserved] * times
    memory.give_back_much_unused("cuda:0", 100)
    assert given_back == [reserved] * times


@pytest.mark.parametrize("torch", [None, SimpleNamespace(mps=SimpleNamespace())])
def test_where_torch_does_not_say_how_much_it_keeps_nothing_is_given_back(monkeypatch, torch):
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(memory, "give_back_unused", None)
    memory.give_back_much_unused("mps", 1)


def test_nothing_is_given_back_where_there_is_no_device(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(accelerator=SimpleNamespace(is_available=lambda: False)))
    memory.give_back_unused()
    monkeypatch.setitem(sys.modules, "torch", None)
    memory.give_back_unused()


def test_the_peak_is_read_from_where_linux_keeps_it(tmp_path: Path):
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmHWM:\t   2048 kB\nVmRSS:\t 1024 kB\n")
    assert peak_ram_bytes(status) == 2 * 2**20


@pytest.mark.parametrize("text", ["", "VmHWM:\n", "VmHWM: many kB\n", None])
def test_where_nothing_is_told_nothing_is_made_up(tmp_path: Path, text: str | None):
    status = tmp_path / "status"
    if text is not None:
        status.write_text(text)
    peak = peak_ram_bytes(status)
    assert peak is None or peak > 10**6


@pytest.mark.parametrize("own", [True, False])
def test_what_imports_made_is_never_gone_through_again_where_nothing_but_autoflux_runs(own):
    script = f"""
import gc
from autoflux import collection_paused
from autoflux import process
if {own}:
    process.claim()
with collection_paused():
    import asyncio
    assert not gc.isenabled()
assert gc.isenabled()
frozen = gc.get_freeze_count()
assert (frozen > 1000) is {own}
with collection_paused():
    import asyncio
assert gc.get_freeze_count() == frozen, "it was imported before"
"""
    ran = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
