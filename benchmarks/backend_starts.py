"""How long each backend's library takes to import, in a process of its own: what the planner adds to a start.

    python -m benchmarks.backend_starts [--runs 5] [--json FILE]

Needs both libraries; no GPU. Runs alternate, and the first of each is not counted, so that files come from the page
cache for all of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

IMPORTS = {
    "diffusers": "import autoflux.plugins.diffusers_loading, autoflux.plugins.diffusers_pipeline",
    "diffsynth": "import autoflux.plugins.diffsynth_pipeline",
}
"""What `build` of each backend imports first."""


def seconds(statement: str) -> float:
    """Of a process that imports this and ends."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    """Time both in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rounds = [[seconds(statement) for statement in IMPORTS.values()] for _ in range(options.runs + 1)][1:]
    taken = {name: statistics.median(times) for name, times in zip(IMPORTS, zip(*rounds, strict=True), strict=True)}
    more = [diffsynth - diffusers for diffusers, diffsynth in rounds]
    result = {
        "seconds": taken,
        "diffsynth_takes_more": {"median": statistics.median(more), "least": min(more), "most": max(more)},
        "runs": options.runs,
        "processor": platform.processor() or platform.machine(),
        **{name: version(name) for name in ("torch", "diffusers", "diffsynth")},
    }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
