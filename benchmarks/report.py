"""Benchmarks whose measurements are rows: told as they come, and kept in a file that says on what it was made."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from autoflux.runtime import allocator


def told_and_kept(
    description: str | None,
    measure: Callable[[argparse.Namespace], Iterator[Any]],
    told: Callable[[Any], str],
    **options: Any,
) -> int:
    """Measure as the command line says; the exit code is 1 if a row's `same_bits` is False.

    Beside `--tiny` and `--json` there are integer `options` with these values unless given.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path)
    for name, value in options.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    allocator.apply(os.environ)  # torch reads it when it is imported
    rows = []
    for row in measure(given):
        rows.append(row)
        print(told(row), flush=True)
    if given.json:
        _write(given.json, rows)
    return 0 if all(row.same_bits is not False for row in rows) else 1


def _write(file: Path, rows: Iterable[Any]) -> None:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    made_on = {"device": device, **{name: version(name) for name in ("torch", "diffusers")}}
    file.write_bytes(msgspec.json.format(msgspec.json.encode({"versions": made_on, "rows": list(rows)})))
