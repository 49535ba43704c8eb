"""Draw the plan that docs/streaming.md shows: FLUX.1-dev on a made-up machine, from their sizes alone.

python -m tools.plan_drawing docs/images/plan-12gb.svg
"""

from __future__ import annotations

import sys
from pathlib import Path

from autoflux.files import write_atomic
from autoflux.hardware.values import Accelerator, DeviceKind, Disk, Figure, Hardware, Host, Link, Size, Source, Transfer
from autoflux.models import catalogue
from autoflux.models.absent import absent_model
from autoflux.models.values import Model, Precision
from autoflux.planning.drawing import draw
from autoflux.planning.drawing_svg import to_svg
from autoflux.planning.planner import make_plan
from autoflux.planning.profiles import for_host
from autoflux.planning.values import Profile, Wishes
from autoflux.plugin_manager import load_plugins
from autoflux.units import GB


def flux_dev() -> Model:
    """FLUX.1-dev as the catalogue knows it."""
    entry = catalogue.find("flux.1-dev")
    assert entry is not None  # noqa: S101 — it is in the catalogue
    return absent_model(entry)


def machine(*, vram_gb: float, tflops: float, link_gb_per_s: float = 24.0, ram_gb: float = 64.0) -> Hardware:
    """A machine with one card of those figures, all of them assumed."""
    ram, disk = _size(ram_gb), Disk(path="/", free_bytes=_size(1000), read_gb_per_s=_figure(2.0))
    host = Host(
        system="Linux",
        processor="made up",
        cores=8,
        total_bytes=ram,
        available_bytes=ram,
        pinnable_bytes=ram,
        copy_gb_per_s=_figure(9.0),
    )
    rate, memory = _figure(link_gb_per_s), _size(vram_gb)
    card = Accelerator(
        kind=DeviceKind.CUDA,
        index=0,
        name="made up",
        capability="8.9",
        total_bytes=memory,
        free_bytes=memory,
        usable_bytes=memory,
        unified_memory=False,
        link=Link(
            transfers=(Transfer(block_bytes=2**26, pinned=True, to_device_gb_per_s=rate, to_host_gb_per_s=rate),)
        ),
        matmul_tflops={Precision.BFLOAT16.value: _figure(tflops)},
    )
    return Hardware(fingerprint="made up", probed_at="", versions={}, accelerators=(card,), host=host, disk=disk)


def _figure(value: float) -> Figure:
    return Figure(value=value, source=Source.ASSUMED)


def _size(gigabytes: float) -> Size:
    return Size(value=int(gigabytes * GB), source=Source.ASSUMED)


def shipped_profiles() -> list[Profile]:
    """The profiles that come with autoflux, for a host with plenty of RAM."""
    return for_host(load_plugins(entry_points=False).profiles, 64 * GB)


def main(target: Path) -> None:
    """Write the drawing for a card of 12 GB."""
    model, hardware = flux_dev(), machine(vram_gb=12, tflops=200)
    plan = make_plan(hardware, model, shipped_profiles(), Wishes(device="cuda"), ("diffusers",))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, to_svg(draw(plan, model)).encode())


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images/plan-12gb.svg"))
