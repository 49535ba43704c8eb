"""Benchmarks that a processor can run go through, in their smallest setting; what they measured says nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import layouts, packing
from tests.layouts import write_full_size

ROOT = Path(__file__).parents[2]


def test_every_layout_is_taken_stock_of_and_planned_for(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(layouts, "REPEATS", 1)
    layouts.main()
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["layout", "take", "stock", "plan", "new", "process"]
    assert len(lines) == len(write_full_size(tmp_path))
    assert all(line.count(" ms") == 3 for line in lines)


def test_packs_are_read_beside_the_ways_of_others(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(packing, "REPEATS", 1)
    found = packing.measure(ROOT / "autoflux" / "models" / "sample" / "transformer", tmp_path)
    ways = [name for name, took in found.items() if isinstance(took, dict) and took["hot_seconds"] > 0]
    assert ways == ["from_pretrained", "from_pretrained, then int8", "pack, bfloat16", "pack, int8"]


@pytest.mark.parametrize("script", ["decoding", "pictures"])
def test_scripts_run_with_small_networks(script: str, tmp_path: Path):
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", f"benchmarks.{script}", "--tiny", "--json", str(result)]
    ran = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert result.stat().st_size > 100
