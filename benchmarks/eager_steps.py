"""A step of FLUX.1-dev's transformer (random weights) as diffusers computes it, and as autoflux does.

    python -m benchmarks.eager_steps --json out.json    # needs a CUDA card of 40 GB; 2 minutes
    python -m benchmarks.eager_steps --tiny             # the same code on a small transformer; wants a card, too

Three ways: diffusers' blocks; the same with rotary positions turned by one kernel; and these replayed from CUDA graphs.
All weights are on the card, in bfloat16 and in 8 bits, or pass through it in 8 bits while a third of the blocks stay.
Memory counts beside the weights: what torch had reserved, in units of tokens x hidden size x two bytes, and what the
driver took beyond that. Says whether all ways give the same bits; the exit code is 1 if not.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import msgspec

from benchmarks.report import told_and_kept

GB = 1e9
PICTURES = ((512, 1), (1024, 1), (1024, 4))
"""Pixels a side and how many at once."""
WARM = 4
"""Steps that are not timed: a block is launched, then recorded."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """Steps of one size in one way."""

    way: str
    """`diffusers`, `rotated` or `replayed`."""
    storage: str
    resident_blocks: int
    side: int
    batch: int
    seconds: float
    host_seconds: float
    """Until the host has launched a step, when nothing else is to be waited for."""
    reserved_units: float
    """Beside weights."""
    driver_gb: float
    """On the card beside what torch had reserved."""
    same_bits: bool | None = None
    """As diffusers'."""


def measure_all(options: argparse.Namespace) -> Iterator[Row]:
    """Every size in every way, with all blocks on the card, and the narrow ones with a third of them."""
    from autoflux.models.values import Precision
    from autoflux.runtime.streaming import Holding, StreamedTransformer, arena_for
    from benchmarks.full_size import BLOCK_LISTS, FLUX_DEV, FLUX_TINY, best_device, transformer

    size, device = (FLUX_TINY if options.tiny else FLUX_DEV), best_device()
    model = transformer(size, device=device)
    every = frozenset(range(size.num_double + size.num_single))
    held = ((Precision.BFLOAT16, every), (Precision.FLOAT8, every), (Precision.FLOAT8, frozenset(sorted(every)[::3])))
    for storage, resident in held:
        holding = Holding(resident=resident, storage=storage, native=storage == Precision.FLOAT8)
        made = StreamedTransformer(model, BLOCK_LISTS, holding, device)
        made.attach(arena_for(made.parts, 2 * made.blocks.largest_streamed, device))
        try:
            for side, batch in ((64, 1),) if options.tiny else PICTURES:
                yield from all_ways(made, model, size, side=side, batch=batch, count=options.steps)
        finally:
            made.detach()


def all_ways(made: Any, model: Any, size: Any, *, side: int, batch: int, count: int) -> Iterator[Row]:
    """Steps of one size in all ways."""
    import torch
    from autoflux.plugins.diffusers_attention import RotatedAttention
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    from autoflux.runtime.graphs import BlockGraphs, CudaTape
    from autoflux.runtime.units import block_atoms
    from benchmarks.full_size import BLOCK_LISTS, best_device, transformer_inputs

    device = best_device()
    inputs = transformer_inputs(size, device=device, pixels=side, batch=batch)
    with torch.inference_mode():
        times, guidance = inputs["timestep"] * 1000, inputs["guidance"].to(torch.bfloat16) * 1000
        embedding = model.time_text_embed(times, guidance, inputs["pooled_projections"])
        rows = made.modulation(embedding.split(1))

    def step() -> torch.Tensor:
        made.select(rows)
        output: torch.Tensor = model(**inputs, return_dict=False)[0]
        return output

    measured = partial(measured_steps, step, made.holding, side=side, batch=batch, width=size.heads * 128, count=count)
    model.set_attn_processor(FluxAttnProcessor())
    wanted, row = measured("diffusers")
    yield row
    RotatedAttention.placed_in(model)
    found, row = measured("rotated")
    yield msgspec.structs.replace(row, same_bits=bool(torch.equal(wanted, found)))
    if device.type == "cuda":
        graphs = BlockGraphs((atom.module for atom in block_atoms(model, BLOCK_LISTS)), CudaTape(device))
        found, row = measured("replayed")
        graphs.undo()
        yield msgspec.structs.replace(row, same_bits=bool(torch.equal(wanted, found)))


def measured_steps(
    step: Callable[[], Any], holding: Any, way: str, *, side: int, batch: int, width: int, count: int
) -> tuple[Any, Row]:
    """What the last of the steps gave, and what they took."""
    import torch

    from benchmarks.card import Card
    from benchmarks.full_size import measure

    card = Card(there=torch.cuda.is_available())
    with torch.inference_mode():
        card.release()
        before = torch.cuda.memory_reserved()
        measured = measure(step, steps=count, warm=WARM)
        card.synchronize()
        began = time.perf_counter()
        output = step()
        host_seconds = time.perf_counter() - began
        output = output.clone()
    unit = ((side // 16) ** 2 + 512) * batch * width * 2
    return output, Row(
        way=way,
        storage=holding.storage.value,
        resident_blocks=len(holding.resident),
        side=side,
        batch=batch,
        seconds=measured.median_seconds,
        host_seconds=host_seconds,
        reserved_units=(measured.reserved_bytes - before) / unit,
        driver_gb=(measured.on_card_bytes - measured.reserved_bytes) / GB,
    )


def told(row: Row) -> str:
    """One line."""
    same = {True: "same bits", False: "OTHER BITS", None: ""}[row.same_bits]
    return (
        f"{row.storage:14} {row.resident_blocks:2} blocks resident, {row.side:5} x{row.batch}"
        f" {row.way:9} {row.seconds:7.4f} s,"
        f" host {row.host_seconds:7.4f} s,"
        f" reserved {row.reserved_units:5.1f} units, driver {row.driver_gb:.2f} GB {same}"
    )


if __name__ == "__main__":
    sys.exit(told_and_kept(__doc__, measure_all, told, steps=8))
