"""Whole FLUX.1-dev pictures at full size (random weights) under hard caps of device memory: time and peak memory.

    python -m benchmarks.pictures --vram 3 4 6 8 12 16 24 --json FILE   # caps in GB: plan, encode, 28 steps, decode
    python -m benchmarks.pictures --vram --endurance 12 --json FILE     # 150 pictures of many sizes under one cap
    python -m benchmarks.pictures --tiny                                # small networks, on whatever device there is

The plan is the planner's own for that cap. torch is forbidden to take more than the cap leaves beside the context, also
while weights are loaded, so that a plan that counts wrongly fails here as it would on a small card. Weights are random,
which is right for time and memory; they are made once, lie in RAM, and are copied from there as from a pack.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from autoflux.errors import AutofluxError
from autoflux.runtime import allocator

if TYPE_CHECKING:
    from autoflux.planning.values import Plan
    from autoflux.runtime.session import Session

GB = 10**9
SIDES = range(512, 1281, 64)
"""Widths and heights of the pictures of many sizes."""
WARM_STEPS = 4
MIXED, ALIKE = 50, 100
"""Pictures of many sizes, and then of one."""


class Bench:
    """The machine, the model and its weights."""

    def __init__(self, *, tiny: bool) -> None:
        import torch

        import autoflux
        from benchmarks.card import Card
        from benchmarks.host_weights import HostWeights

        self._hardware = autoflux.probe()  # while nothing else computes
        self.card = Card(there=torch.cuda.is_available())
        self._folder = tempfile.TemporaryDirectory()
        self._weights = HostWeights(tiny=tiny)
        self._model = self._weights.model(Path(self._folder.name))
        self._weights.draw()
        self.device = torch.cuda.get_device_name() if self.card.there else "cpu"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def open(self, cap_gb: float | None, side: int) -> tuple[Session, Plan, float]:
        """A session under that cap for pictures of that size, its plan, and how long it took to load."""
        from autoflux import api
        from autoflux.planning.findings import Findings
        from autoflux.planning.values import Wishes
        from autoflux.plugin_manager import load_plugins

        size = {"width": side, "height": side}
        cap = int(cap_gb * GB) if cap_gb else None
        wishes = Wishes(device="cuda", vram_bytes=cap, **size) if cap else Wishes(device="cpu", **size)
        plan = api.plan_for(self._model, wishes, load_plugins(), self._hardware, Findings(packs=self._weights.packs()))
        self._weights.narrow(plan)
        self.card.release()
        if cap:
            self.card.cap(cap, plan.priors.context_bytes)
        began = time.perf_counter()
        session = self._weights.session(plan, self._model, direct=True)
        self.card.release()
        return session, plan, time.perf_counter() - began


def draw(session: Session, bench: Bench, *, seed: int, width: int, height: int, steps: int) -> dict[str, Any]:
    """One picture, with the time of its parts."""
    marks: list[float] = []
    bench.card.restart()
    began = time.perf_counter()
    # Another prompt each time, so that the text encoders run.
    session.generate(
        f"picture number {seed}",
        seed=seed,
        steps=steps,
        width=width,
        height=height,
        on_step=lambda *_: marks.append(time.perf_counter()),
    )
    total = time.perf_counter() - began
    pauses = [later - earlier for earlier, later in pairwise(marks)]
    step = statistics.median(pauses) if pauses else marks[0] - began
    allocated = bench.card.peaks().allocated
    return {
        "width": width,
        "height": height,
        "steps": steps,
        "seconds": total,
        "seconds_per_step": step,
        "seconds_beside_steps": total - steps * step,
        "allocated_gb": allocated / GB,
        "on_card_gb": bench.card.peak_bytes() / GB,
    }


def under_cap(bench: Bench, cap_gb: float | None, options: argparse.Namespace) -> dict[str, Any]:
    """Plan, load and draw, after a picture of a few steps that warms up."""
    session, plan, ready_seconds = bench.open(cap_gb, options.size)
    with session:
        size = {"width": options.size, "height": options.size}
        draw(session, bench, seed=0, steps=min(WARM_STEPS, options.steps), **size)
        pictures = [draw(session, bench, seed=n + 1, steps=options.steps, **size) for n in range(options.pictures)]
    return {"cap_gb": cap_gb, "ready_seconds": ready_seconds, **described(plan), "pictures": pictures}


def endurance(bench: Bench, cap_gb: float | None, options: argparse.Namespace) -> dict[str, Any]:
    """Pictures of mixed sizes, then of one: does memory hold, and how much of it is lost to gaps?"""
    rng = random.Random(0)
    most = 128 if options.tiny else max(SIDES)
    sides = range(64, most + 1, 32) if options.tiny else SIDES
    sizes = [(rng.choice(sides), rng.choice(sides)) for _ in range(MIXED)] + [(options.size, options.size)] * ALIKE
    session, plan, _ = bench.open(cap_gb, most)
    held: list[dict[str, Any]] = []
    with session:
        for seed, (width, height) in enumerate(sizes):
            row = draw(session, bench, seed=seed, width=width, height=height, steps=2)
            reserved, kept = bench.card.held_bytes()
            held.append({**row, "reserved_gb": reserved / GB, "kept_bytes": kept})
    fullest = max(held, key=lambda row: row["reserved_gb"])
    reserved_gb = fullest["reserved_gb"]
    return {
        "cap_gb": cap_gb,
        **described(plan),
        "pictures": len(sizes),
        "most_on_card_gb": max(row["on_card_gb"] for row in held),
        "fullest": {name: fullest[name] for name in ("width", "height", "allocated_gb", "reserved_gb")},
        "reserved_after_mixed_gb": held[MIXED - 1]["reserved_gb"],
        "reserved_at_end_gb": held[-1]["reserved_gb"],
        # Gaps: of what torch had to reserve, what tensors did not take even when they took most.
        "unused_share": 1 - max(row["allocated_gb"] for row in held) / reserved_gb if reserved_gb else 0.0,
        "growth_bytes": held[-1]["kept_bytes"] - held[MIXED]["kept_bytes"],
    }


def described(plan: Plan) -> dict[str, Any]:
    """What was planned, and what for."""
    transformer = plan.component("transformer")
    return {
        "offload": plan.offload,
        "resident_blocks": len(transformer.resident),
        "ring_gb": plan.ring_bytes / GB,
        "waiting": {part.name: part.waiting for part in plan.arrangement.streamed},
        "placement": {part.name: part.placement for part in plan.components},
        "storage": transformer.storage,
        "native": transformer.native,
        "compiled": plan.compiled,
        "graphs": plan.graphs,
        "attention": plan.attention,
        "unit": plan.unit,
        "block_bytes": plan.block_bytes,
        "tiled": plan.tile_decode,
        "predicted_seconds_per_step": plan.predicted.seconds_per_step,
        "predicted_peak_gb": plan.predicted.peak_vram_bytes.peak / GB,
    }


def told(row: dict[str, Any]) -> str:
    """A line for a cap."""
    last = row["pictures"][-1]
    under = f"under {row['cap_gb']:g} GB" if row["cap_gb"] else "on the processor"
    return (
        f"{under}: {last['seconds']:.2f} s a picture = {last['steps']} x {last['seconds_per_step']:.4f} s + "
        f"{last['seconds_beside_steps']:.2f} s, at most {last['on_card_gb']:.2f} GB on the card; "
        f"{row['storage']}, {row['resident_blocks']} blocks resident; ready in {row['ready_seconds']:.1f} s"
    )


def run(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Every cap and then endurance, written down as they come."""
    with Bench(tiny=options.tiny) as bench:
        report["device"] = bench.device
        for cap in options.vram:
            try:
                row = under_cap(bench, cap, options)
                print(told(row), flush=True)
            except (AutofluxError, RuntimeError) as error:
                row = {"cap_gb": cap, "error": f"{type(error).__name__}: {error}"}
                print(row, flush=True)
            report["caps"].append(row)
            _save(report, options.json)
        if options.endurance is not None:
            report["endurance"] = endurance(bench, options.endurance or None, options)
            print(json.dumps(report["endurance"], indent=2), flush=True)
            _save(report, options.json)


def _save(report: dict[str, Any], file: Path | None) -> None:
    if file:
        file.write_text(json.dumps(report, indent=2) + "\n")


def main() -> None:
    """Draw under every cap asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vram", type=float, nargs="*", help="caps of device memory in GB, the context included")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--size", type=int, help="pixels a side (1024; 128 with --tiny)")
    parser.add_argument("--pictures", type=int, default=1, help="under each cap, after one that warms up")
    parser.add_argument("--endurance", type=float, metavar="GB", help="150 pictures under that cap; 0: no cap")
    parser.add_argument("--tiny", action="store_true", help="small networks")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.size = options.size or (128 if options.tiny else 1024)
    if options.vram is None:
        options.vram = [None]
    allocator.apply(os.environ)  # torch reads it when it is imported
    os.environ["AUTOFLUX_PROMPT_CACHE"] = "off"  # prompts are to be encoded
    run(options, {"versions": {name: version(name) for name in ("torch", "diffusers")}, "caps": []})


if __name__ == "__main__":
    main()
