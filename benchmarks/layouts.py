"""How long it takes to know a full-size FLUX.1-dev in each layout, and to plan for it.

The files have the real headers and sparse data, so that they take no room. No weights are read, so neither the disk
nor the card matters.

Run: python benchmarks/layouts.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from autoflux.api import plan_for
from autoflux.hardware.values import Accelerator, DeviceKind, Disk, Hardware, Host, Link, Size, Source
from autoflux.models.finding import find
from autoflux.planning.values import Wishes
from autoflux.plugin_manager import load_plugins
from tests.layouts import write_full_size

REPEATS = 5


def main() -> None:
    plugins, machine = load_plugins(), _machine()
    with tempfile.TemporaryDirectory() as folder:
        made = write_full_size(Path(folder))
        whole = made["diffusers folder"]
        print(f"{'layout':28}{'take stock':>12}{'plan':>12}{'new process':>14}")
        for name, path in made.items():
            base = None if path == whole else str(whole)
            stock, plan = [], []
            for _ in range(REPEATS):
                begin = time.perf_counter()
                model = find(str(path), {}, base)
                middle = time.perf_counter()
                plan_for(model, Wishes(), plugins, machine)
                stock.append(middle - begin)
                plan.append(time.perf_counter() - middle)
            print(f"{name:28}{_ms(stock):>12}{_ms(plan):>12}{_ms(_fresh(path, base)):>14}")


def _fresh(path: Path, base: str | None) -> list[float]:
    """`autoflux models show` from the start of the interpreter."""
    command = [sys.executable, "-m", "autoflux", "models", "show", str(path), *(["--base", base] if base else [])]
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - begin)
    return times


def _ms(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1000:.0f} ms"


def _machine() -> Hardware:
    """A card of 24 GB and 64 GB of RAM."""

    def size(gigabytes: float) -> Size:
        return Size(value=int(gigabytes * 1e9), source=Source.ASSUMED)

    card = Accelerator(
        kind=DeviceKind.CUDA,
        index=0,
        name="a card of 24 GB",
        capability="8.9",
        total_bytes=size(24),
        free_bytes=size(24),
        usable_bytes=size(23),
        unified_memory=False,
        link=Link(pcie_generation=4, pcie_width=16, transfers=()),
    )
    host = Host(
        system="Linux",
        processor="any",
        cores=8,
        total_bytes=size(64),
        available_bytes=size(60),
        pinnable_bytes=size(32),
    )
    return Hardware(
        fingerprint="layouts",
        probed_at="2026-01-01T00:00:00Z",
        versions={},
        accelerators=(card,),
        host=host,
        disk=Disk(path="/", free_bytes=size(1000)),
    )


if __name__ == "__main__":
    main()
