"""From nothing to the first picture: FLUX.1-dev packed in 8 bits, against the disk and `FluxPipeline.from_pretrained`.

    python -m benchmarks.starts --folder DIR --json FILE    # needs a CUDA card of 40 GB, 60 GB of RAM and of DIR's disk
    python -m benchmarks.starts --tiny                      # the same code on small networks; wants a card, too
    python -m benchmarks.starts --folder DIR --only packs   # besides diffusers' pipeline, only this way

Writes a whole model of random weights into DIR (kept, and used again if it is there), and packs it beside. Then
`autoflux bench load` times starts, each in processes of their own: from the model's files and from packs, which are in
the page cache or are not; before each, the same files are only read, which is what the disk allows. A start that is
not counted goes first: it leaves compiled kernels and notes behind, and nobody has packs before a first start.
diffusers' own pipeline is started in the same way: from a new process to the first picture, all weights on the card.
Says at the end what of this must hold at full size, and whether it does (exit code 1 if not).
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from autoflux.hardware import page_cache
from benchmarks.checks import Check
from benchmarks.checks import told as verdict

GB = 1e9
STRATEGIES = ("queue", "packs")
LONGER_THAN_READING = 1.15
BESIDE_READING_SECONDS = 5.0
HOT_SECONDS = 12.0
PROMPT = "a lighthouse above a calm sea at dawn"
STOCK = "from_pretrained"


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """One way to start, with the model's files in the page cache or not."""

    way: str
    cold: bool
    first_picture_seconds: float
    read_gb: float = 0.0
    read_seconds: float = 0.0
    """Only reading the same files, one after the other."""
    encoder_seconds: float = 0.0
    accepted_seconds: float = 0.0
    ready_seconds: float = 0.0
    peak_vram_gb: float = 0.0
    peak_ram_gb: float = 0.0
    stages: dict[str, float] = msgspec.field(default_factory=dict)
    """Its moments, after so many seconds."""


def write_model(folder: Path, *, tiny: bool) -> None:
    """A diffusers folder of random weights in bfloat16, as a download leaves it."""
    from benchmarks.full_size import fill_randomly
    from benchmarks.hollow_model import networks_on_meta, write_hollow_model

    fresh = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    networks = networks_on_meta(tiny=tiny)
    write_hollow_model(fresh, networks)
    for name, network in networks.items():
        shutil.rmtree(fresh / name)
        fill_randomly(copy.deepcopy(network), device="cpu").save_pretrained(fresh / name, max_shard_size="10GB")
    fresh.rename(folder)


def ours(folder: Path, options: argparse.Namespace, *, cold: bool) -> Iterator[Start]:
    """What `autoflux bench load` tells."""
    command = [sys.executable, "-m", "autoflux", "bench", "load", "--model", str(folder), "--quant", options.quant]
    command += [word for way in options.only or STRATEGIES for word in ("--only", way)]
    command += ["--prompt", PROMPT, "--steps", str(options.steps), "--size", str(options.size)]
    ran = subprocess.run([*command, "--cold" if cold else "--hot", "--json"], check=False, stdout=subprocess.PIPE)
    told = json.loads(ran.stdout or "{}")
    if ran.returncode:
        raise SystemExit(f"autoflux bench load: {told.get('error')} (exit code {ran.returncode})")
    for row in told["data"]["strategies"]:
        yield Start(
            way=row["strategy"],
            cold=cold,
            read_gb=row["read_bytes"] / GB,
            peak_vram_gb=row["peak_vram_bytes"] / GB,
            peak_ram_gb=row["peak_ram_bytes"] / GB,
            stages={stage["name"]: stage["seconds"] for stage in row["stages"]},
            **{name: row[name] for name in row if name.endswith("_seconds")},
        )


def stock(folder: Path, options: argparse.Namespace, *, cold: bool) -> Start:
    """diffusers' pipeline, in a process of its own."""
    files = sorted(folder.rglob("*.safetensors"))
    _settle(files, cold=cold)
    began = time.perf_counter()
    nbytes = page_cache.read_all(files)
    read_seconds = time.perf_counter() - began
    _settle(files, cold=cold)
    began = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.starts", "--stock", "--folder", str(folder)]
    subprocess.run([*command, "--steps", str(options.steps), "--size", str(options.size)], check=True)
    seconds = time.perf_counter() - began
    return Start(way=STOCK, cold=cold, first_picture_seconds=seconds, read_gb=nbytes / GB, read_seconds=read_seconds)


def draw_stock(options: argparse.Namespace) -> None:
    """Load and draw as diffusers' documentation does."""
    import torch
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(options.folder, torch_dtype=torch.bfloat16)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    size = {"width": options.size, "height": options.size}
    pipe(PROMPT, num_inference_steps=options.steps, guidance_scale=3.5, **size).images[0].tobytes()


def _settle(files: list[Path], *, cold: bool) -> None:
    """Have the files in the page cache, or not."""
    if cold:
        page_cache.drop(files)
    else:
        page_cache.read_all(files)


def checks(starts: list[Start]) -> list[Check]:
    """The packed starts, in seconds, against what they must not exceed."""
    return [
        Check(
            name=f"packed, {'cold' if start.cold else 'hot'}",
            value=start.first_picture_seconds,
            bound=bound(start),
            holds=start.first_picture_seconds <= bound(start),
        )
        for start in starts
        if start.way == "packs"
    ]


def bound(start: Start) -> float:
    """Most seconds that a packed start may take."""
    return LONGER_THAN_READING * start.read_seconds + BESIDE_READING_SECONDS if start.cold else HOT_SECONDS


def told(start: Start) -> str:
    """One line."""
    heat = "cold" if start.cold else "hot"
    return (
        f"{start.way:16} {heat:5} {start.first_picture_seconds:7.2f} s to the first picture;"
        f" {start.read_gb:.1f} GB are only read in {start.read_seconds:.2f} s"
    )


def run(options: argparse.Namespace) -> int:
    """Measure, say what holds, and write it down."""
    folder = Path(options.folder)
    if not (folder / "model_index.json").exists():
        write_model(folder, tiny=options.tiny)
    for first in ours(folder, options, cold=False):
        print(f"not counted: {told(first)}", flush=True)
    starts: list[Start] = []
    for cold in (False, True) if page_cache.CAN_DROP else (False,):
        for start in (*ours(folder, options, cold=cold), stock(folder, options, cold=cold)):
            starts.append(start)
            print(told(start), flush=True)
    made = checks(starts)
    print("\n".join(map(verdict, made)))
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(_report(options, starts, made))))
    return 0 if options.tiny or all(check.holds for check in made) else 1


def _report(options: argparse.Namespace, starts: list[Start], made: list[Check]) -> dict[str, Any]:
    import torch

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "settings": {"steps": options.steps, "size": options.size, "quant": options.quant},
        "starts": starts,
        "checks": made,
    }


def main() -> int:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="of the model; made if it is not there")
    parser.add_argument(
        "--quant", default="fp8", choices=["none", "int8", "fp8"], help="older cards take int8, processors none"
    )
    parser.add_argument("--only", action="append", choices=STRATEGIES, help="of our ways to start this one; repeat")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--size", type=int, help="pixels a side (1024; 128 with --tiny)")
    parser.add_argument("--tiny", action="store_true", help="small networks")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--stock", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.size = options.size or (128 if options.tiny else 1024)
    if options.stock:
        draw_stock(options)
        return 0
    if options.folder:
        return run(options)
    with tempfile.TemporaryDirectory() as made:
        options.folder = str(Path(made) / "model")
        return run(options)


if __name__ == "__main__":
    sys.exit(main())
