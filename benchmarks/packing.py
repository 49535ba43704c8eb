"""How fast packed weights are read, against `from_pretrained`, in the same run, on this machine's CPU and disk.

For each model: the transformer in bfloat16 loaded by diffusers, loaded and narrowed to int8, and read from packs into
ordinary RAM with all checksums; with the files in the page cache, and without where the system lets us drop them
(`posix_fadvise`). After each of them, in turn, the same files are read and nothing done with them: in one piece of
memory that is used again and again, which is the speed of the disk, and into new memory of their size, which is what
any way to load takes at least. In the end, what the processor alone takes for checksums and new memory.

Run: python -m benchmarks.packing [--gb 3] [--folder /tmp]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import accelerate
import torch
from diffusers import FluxTransformer2DModel

from autoflux.hardware import page_cache
from autoflux.hardware.pages import own_pages
from autoflux.models.checkpoints import read_checkpoint
from autoflux.models.components import make_component
from autoflux.models.pack_shelf import Shelf
from autoflux.models.packs import WEIGHTS, Recipe
from autoflux.models.values import Component, Precision
from autoflux.planning.terms import Placement
from autoflux.planning.values import ComponentPlan
from autoflux.runtime.pack_file import checksum
from autoflux.runtime.packed import load_packed
from autoflux.runtime.packing import pack_component
from autoflux.runtime.quantized import quantize_linears
from autoflux.runtime.streaming import stays_wide
from autoflux.testing import fake_model

REPEATS = 3
READ_BYTES = 16 * 2**20
NEW_BYTES = 2**28
BLOCK_PARAMETERS = 141_591_808
"""A single block of FLUX.1-dev."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=3.0, help="size of the synthetic transformer in bfloat16")
    parser.add_argument("--folder", default=None, help="where to write; on the disk to be measured")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as made:
        os.environ["AUTOFLUX_PACK_LIMIT"] = "100GB"
        sample = Path(__file__).parents[1] / "autoflux/models/sample/transformer"
        synthetic = write_synthetic(Path(made) / "synthetic", round(given.gb * 1e9 / 2 / BLOCK_PARAMETERS))
        results = {name: measure(f, Path(made)) for name, f in (("sample", sample), ("synthetic", synthetic))}
    results["checksum_gb_per_s"] = checksum_rate()
    results["new_memory_gb_per_s"] = new_memory_rate()
    print(json.dumps(results, indent=2))


def write_synthetic(folder: Path, blocks: int) -> Path:
    """A FLUX of full width with only a few single blocks, in bfloat16."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    network = FluxTransformer2DModel(num_layers=0, num_single_layers=blocks)
    torch.set_default_dtype(torch.float32)
    network.save_pretrained(folder, max_shard_size="20GB")
    return folder


def measure(folder: Path, made: Path) -> dict[str, object]:
    """Seconds and rates of every way to load one transformer."""
    component = component_of(folder)
    found: dict[str, object] = {"source_gb": component.disk_bytes / 1e9}
    shelf = Shelf(made / f"packs of {folder.parent.name}")
    source = [Path(file) for file in component.files]
    found["from_pretrained"] = timed(lambda: from_pretrained(folder), source)
    found["from_pretrained, then int8"] = timed(lambda: narrowed(folder), source)
    for storage in (Precision.BFLOAT16, Precision.INT8):
        begin = time.perf_counter()
        pack = pack_component(Recipe(component, storage, Precision.BFLOAT16), fake_model(), shelf)
        seconds = time.perf_counter() - begin
        file = shelf.folder(pack.key) / WEIGHTS

        def read(storage: Precision = storage, key: str = pack.key) -> None:
            read_pack(component, storage, shelf, key)

        found[f"pack, {storage.value}"] = {"gb": pack.nbytes / 1e9, "seconds_to_make": seconds, **timed(read, [file])}
    return found


def component_of(folder: Path) -> Component:
    config = json.loads((folder / "config.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    from autoflux.models.checkpoints import find_parts
    from autoflux.models.values import Naming

    parts = find_parts([read_checkpoint(file) for file in files], Naming.DIFFUSERS, "").parts
    return make_component("transformer", config, parts, origin=str(folder), files=files, folder=folder)


def timed(load: Callable[[], object], files: list[Path]) -> dict[str, float]:
    """Median seconds from the page cache and from the disk, each beside those of only reading the files."""
    nbytes = sum(file.stat().st_size for file in files)
    ways = {
        "": load,
        "read_": lambda: page_cache.read_all(files),
        "read_to_new_memory_": lambda: read_to_new_memory(files),
    }
    found: dict[str, float] = {}
    for heat in ("hot", "cold") if page_cache.CAN_DROP else ("hot",):
        page_cache.read_all(files)
        took: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(REPEATS):
            for name, way in ways.items():
                took[name].append(seconds_of(way, drop=files if heat == "cold" else None))
        for name, seconds in took.items():
            median = statistics.median(seconds)
            found |= {f"{name}{heat}_seconds": median, f"{name}{heat}_gb_per_s": nbytes / median / 1e9}
    return found


def read_to_new_memory(files: list[Path]) -> None:
    for file in files:
        memory = memoryview(own_pages(file.stat().st_size))
        with file.open("rb", buffering=0) as opened:
            done = 0
            while count := opened.readinto(memory[done : done + READ_BYTES]):
                done += count


def seconds_of(load: Callable[[], object], drop: list[Path] | None = None) -> float:
    page_cache.drop(drop or [])
    begin = time.perf_counter()
    load()
    return time.perf_counter() - begin


def from_pretrained(folder: Path) -> FluxTransformer2DModel:
    network = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    # Weights that are only mapped would be read later.
    for tensor in network.parameters():
        tensor.data = tensor.data.clone()
    return network


def narrowed(folder: Path) -> None:
    network = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    for block in (*network.transformer_blocks, *network.single_transformer_blocks):
        quantize_linears(block, Precision.INT8, native=False, keep=stays_wide)


def read_pack(component: Component, storage: Precision, shelf: Shelf, key: str) -> None:
    with accelerate.init_empty_weights(include_buffers=False):
        network = FluxTransformer2DModel.from_config(component.config)
    opened = shelf.open(key)
    if opened is None:
        raise RuntimeError("the pack has gone")
    planned = ComponentPlan(
        name="transformer", storage=storage, arithmetic=Precision.BFLOAT16, placement=Placement.DEVICE
    )
    load_packed(network, opened, planned, torch.device("cpu"))


def new_memory_rate() -> float:
    """One core, 10^9 bytes a second: the system gives pages when they are first written to."""

    def touch() -> None:
        memory = own_pages(NEW_BYTES)
        for at in range(0, NEW_BYTES, 4096):
            memory[at] = 1

    return NEW_BYTES / statistics.median(seconds_of(touch) for _ in range(REPEATS)) / 1e9


def checksum_rate() -> float:
    """One core, 10^9 bytes a second."""
    data = os.urandom(2**24)
    return len(data) / min(seconds_of(lambda: checksum(data)) for _ in range(10)) / 1e9


if __name__ == "__main__":
    main()
