"""autoflux's streaming engine beside other tools, in one run on one machine: one table, one JSON.

    python -m benchmarks.streaming --json benchmarks/results/streaming.json    # needs a CUDA card
    python -m benchmarks.streaming --tiny                                      # to see it run, on a CPU too

FLUX.1-dev's transformer at full size with random weights. Each tool runs in a process of its own, one after the other;
a tool that is not installed is left out and named. For every row: seconds a step, memory allocated by torch, memory
taken of the card as its driver sees it (the CUDA context included), and the ratio to the physical bound, the larger of
arithmetic at the measured matrix rate and streamed bytes at the measured link rate.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from autoflux.runtime import allocator

PEERS = (
    ("diffusers-group-leaf",),
    ("diffusers-group-fp8",),
    ("mmgp", "--budget-mb", "3000"),
    ("mmgp", "--budget-mb", "3000", "--quantize"),
    ("diffusers-group-block",),
    ("mmgp", "--budget-mb", "10000"),
    ("cache-dit", "--buckets", "1"),
    ("diffsynth-vram-limit", "--vram-limit", "12"),
    ("diffsynth-vram-limit", "--vram-limit", "12", "--storage", "fp8"),
    ("diffsynth-vram-limit", "--vram-limit", "3"),
    ("diffusers-resident",),
    ("diffusers-resident-compiled",),
)
"""Arms of `benchmarks.streaming_peers` and their options, the fastest with little memory first."""

NARROW_PEERS = ("fp8", "--quantize")
"""Words in a peer's options that mean weights in 8 bits."""

GB = 1e9
TIMEOUT_SECONDS = 600


def run_ours(options: argparse.Namespace) -> dict[str, Any]:
    """Every setting of ours, in one process."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ours.json"
        environment = dict(os.environ)
        allocator.apply(environment)  # as autoflux does; other tools run with what they set themselves
        command = ["benchmarks.streaming_ours", "--json", str(file), "--steps", str(options.steps)]
        finished = subprocess.run(
            [sys.executable, "-m", *command, *(["--tiny"] if options.tiny else [])],
            check=False,
            timeout=1800,
            env=environment,
        )
        if not file.exists():
            raise SystemExit(f"our own settings failed with exit code {finished.returncode}")
        found: dict[str, Any] = json.loads(file.read_text())
        return found


def run_peer(arm: tuple[str, ...], options: argparse.Namespace) -> dict[str, Any]:
    """One tool in one setting."""
    command = [sys.executable, "-m", "benchmarks.streaming_peers", *arm, "--steps", str(options.steps)]
    try:
        finished = subprocess.run(
            [*command, *(["--tiny"] if options.tiny else [])],
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {TIMEOUT_SECONDS} s"}
    lines = finished.stdout.decode(errors="replace").strip().splitlines()
    if not lines:
        return {"failed": f"exit code {finished.returncode} and nothing printed"}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def peer_row(arm: tuple[str, ...], found: dict[str, Any]) -> dict[str, Any]:
    """In the columns of our own rows."""
    return {
        "name": " ".join(arm),
        "median_seconds": found["median_seconds"],
        "allocated_gb": found["allocated_bytes"] / GB,
        "on_card_gb": found["on_card_bytes"] / GB,
        "narrow": any(word in option for option in arm for word in NARROW_PEERS),
        "versions": found["versions"],
        "setup_seconds": found["setup_seconds"],
    }


def duels(ours: list[dict[str, Any]], peers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each of our rows against the fastest peer with no more memory: with weights of the same width, and with bf16."""
    found = []
    for row in ours:
        if not row["settings"] or row["batch"] != 1:
            continue
        narrow = row["settings"]["storage"] in ("float8_e4m3fn", "int8")
        for peer_is_narrow in {narrow, False}:
            rivals = [p for p in peers if p["on_card_gb"] <= row["on_card_gb"] * 1.01 and p["narrow"] == peer_is_narrow]
            if rivals:
                found.append(_duel(row, min(rivals, key=lambda p: p["median_seconds"])))
    return found


def _duel(row: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    return {
        "ours": row["name"],
        "peer": peer["name"],
        "peer_is_narrow": peer["narrow"],
        "on_card_gb": row["on_card_gb"],
        "times_faster": peer["median_seconds"] / row["median_seconds"],
    }


def show(report: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(title="FLUX.1-dev's transformer, a denoise step", box=None, title_justify="left")
    for column in ("", "s/step", "allocated GB", "on the card GB", "x bound", "output"):
        table.add_column(column, justify="left" if column in ("", "output") else "right")
    for row in report["ours"]["rows"]:
        bound = row.get("bound_seconds")
        ratio = f"{row['median_seconds'] / bound:.3f}" if bound else ""
        same = {True: "same bits", None: ""}.get(row.get("identical"), f"off {row.get('largest_difference') or 0:.1e}")
        table.add_row(row["name"], f"{row['median_seconds']:.4f}", *_memory(row), ratio, same)
    for row in report["peers"]:
        table.add_row(row["name"], f"{row['median_seconds']:.4f}", *_memory(row), "", "")
    console = Console(width=140)
    console.print(table)
    for duel in report["duels"]:
        console.print(f"{duel['ours']}: {duel['times_faster']:.2f} x as fast as {duel['peer']}")
    for name, why in report["left_out"].items():
        console.print(f"left out: {name}: {why}")


def _memory(row: dict[str, Any]) -> tuple[str, str]:
    return f"{row['allocated_gb']:.2f}", f"{row['on_card_gb']:.2f}"


def main() -> None:
    """Run everything, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--peers", type=int, default=len(PEERS), help="so many of the peers, the strongest first")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {"ours": run_ours(options), "peers": [], "left_out": {}, "duels": []}
    for arm in PEERS[: options.peers]:
        found = run_peer(arm, options)
        why = found.get("skipped") or found.get("failed")
        if why:
            report["left_out"][" ".join(arm)] = why
        else:
            report["peers"].append(peer_row(arm, found))
        report["duels"] = duels(report["ours"]["rows"], report["peers"])
        if options.json:  # after each, so that a run that is cut short leaves what it has found
            options.json.write_text(json.dumps(report, indent=2) + "\n")
    show(report)


if __name__ == "__main__":
    main()
