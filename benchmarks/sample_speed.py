"""How long a picture of the sample model takes, against what the plan predicts and what plain diffusers takes.

    python benchmarks/sample_speed.py [--device cpu] [--runs 7] [--steps 12] [--json FILE]

The figures are seconds from prompt to picture, the model loaded; the median of the runs after one that does not count,
and the ratio to diffusers' FluxPipeline in the same process, run by run in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import autoflux

PROMPT = "a large red circle on the left and a small yellow star on the right on a dark blue background"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sample")
    parser.add_argument("--device")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    begin = time.perf_counter()
    session = autoflux.load(options.model, wishes=autoflux.Wishes(device=options.device, steps=options.steps))
    to_start = time.perf_counter() - begin
    ours, gaps = _ours(session, options.steps)
    ours(options.runs)
    peak_ram_bytes = _peak_ram_bytes()  # before another pipeline joins
    theirs = _diffusers(session, options.steps)
    pairs = _in_turn(ours, theirs, options.runs)
    predicted = session.plan.predicted
    median = statistics.median(own for own, _ in pairs)
    result = {
        "device": session.plan.device,
        "precision": session.plan.component("transformer").storage,
        "compiled": session.plan.compiled,
        "attention": session.plan.attention,
        "steps": options.steps,
        "seconds_per_image": {"measured": median, "predicted": predicted.seconds_per_image},
        "seconds_per_step": {"measured": statistics.median(gaps), "predicted": predicted.seconds_per_step},
        "seconds_to_start": {"measured": to_start, "predicted": predicted.seconds_to_start},
        "ratio_to_diffusers": statistics.median(own / other for own, other in pairs),
        "peak_ram_bytes": {"measured": peak_ram_bytes, "predicted": predicted.peak_ram_bytes},
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "transformers")},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n")


def _ours(session: autoflux.Session, steps: int) -> tuple[Callable[[int], object], list[float]]:
    """Draws a picture; notes what its steps took, but for the first, which on a card waits for the encoders too."""
    gaps: list[float] = []

    def draw(run: int) -> object:
        moments: list[float] = []
        # A new prompt each time, so that none is remembered and its encoding counts.
        drawn = session.generate(
            f"{PROMPT} {run}", seed=run, steps=steps, on_step=lambda *_: moments.append(time.perf_counter())
        )
        gaps.extend(late - early for early, late in pairwise(moments))
        return drawn

    return draw, gaps


def _diffusers(session: autoflux.Session, steps: int) -> Callable[[int], object]:
    import torch
    from diffusers import FluxPipeline

    defaults = session.model.defaults
    precision = getattr(torch, session.plan.component("transformer").arithmetic)
    pipe: Any = FluxPipeline.from_pretrained(session.model.path, dtype=precision).to(session.plan.device)
    pipe.set_progress_bar_config(disable=True)

    def draw(run: int) -> object:
        return pipe(
            f"{PROMPT} {run}",
            width=defaults.width,
            height=defaults.height,
            num_inference_steps=steps,
            guidance_scale=defaults.guidance,
            max_sequence_length=defaults.text_tokens,
            generator=torch.Generator("cpu").manual_seed(run),
        )

    return draw


def _in_turn(first: Callable[[int], object], second: Callable[[int], object], runs: int) -> list[tuple[float, float]]:
    first(runs), second(runs)
    return [(_seconds(first, run), _seconds(second, run)) for run in range(runs)]


def _seconds(draw: Callable[[int], object], run: int) -> float:
    begin = time.perf_counter()
    draw(run)
    return time.perf_counter() - begin


def _peak_ram_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _processor() -> str:
    hardware = autoflux.probe()
    return hardware.host.processor


if __name__ == "__main__":
    main()
