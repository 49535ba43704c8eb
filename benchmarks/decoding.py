"""Decoding FLUX.1's latents (random weights): time and memory as diffusers does it, and as autoflux lets it do it.

    python -m benchmarks.decoding --json out.json    # wants a CUDA card with 8 GB free
    python -m benchmarks.decoding --tiny             # the same code on a small decoder, which a CPU can run

Memory counts beside the weights, in units of the decoder's largest tensor (pixels x widest channels at full
resolution): what tensors took at most, and what torch had reserved. Says whether both pictures are equal to the bit.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

import msgspec

from benchmarks.report import told_and_kept

SIDES = (512, 1024, 1280)
TIMES = 4
"""Decodes of each size; the first is not timed."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """Decoding pictures of one size."""

    way: str
    side: int
    seconds: float
    allocated_units: float
    reserved_units: float
    same_bits: bool | None = None
    """As diffusers' own."""


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Every size both ways."""
    import torch

    from autoflux.runtime.decoding import spare_memory
    from benchmarks.full_size import best_device, fill_randomly
    from benchmarks.hollow_model import networks_on_meta

    device = best_device()
    vae: Any = fill_randomly(networks_on_meta(tiny=options.tiny)["vae"], device=device)
    pictures: dict[int, torch.Tensor] = {}
    for way in ("diffusers", "autoflux"):
        if way == "autoflux":
            spare_memory(vae.decoder)
        for side in (128,) if options.tiny else SIDES:
            picture, row = decode(vae, way, side)
            same = torch.equal(picture, pictures.setdefault(side, picture))
            yield msgspec.structs.replace(row, same_bits=None if way == "diffusers" else same)


def decode(vae: Any, way: str, side: int) -> tuple[Any, Row]:
    """Pictures of one size, one after the other; the last of them, and what it took."""
    import torch

    from benchmarks.card import Card

    card = Card(there=vae.device.type == "cuda")
    config = vae.config
    factor = 2 ** (len(config.block_out_channels) - 1)
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (1, config.latent_channels, side // factor, side // factor)
    latents = torch.randn(shape, generator=generator).to(vae.device, vae.dtype)
    card.release()
    card.restart()
    reserved, allocated = card.held_bytes()
    seconds = []
    with torch.inference_mode():
        for _ in range(TIMES):
            began = time.perf_counter()
            picture = vae.decode(latents).sample
            card.synchronize()
            seconds.append(time.perf_counter() - began)
    unit = side * side * config.block_out_channels[min(1, len(config.block_out_channels) - 1)] * latents.itemsize
    row = Row(
        way=way,
        side=side,
        seconds=min(seconds[1:]),
        reserved_units=(card.peak_bytes() - card.context_bytes - reserved) / unit,
        allocated_units=(card.peaks().allocated - allocated) / unit,
    )
    return picture, row


def told(row: Row) -> str:
    """One line."""
    same = {True: "same bits", False: "OTHER BITS", None: ""}[row.same_bits]
    return (
        f"{row.way:10} {row.side:5} {row.seconds:8.4f} s, tensors {row.allocated_units:5.2f} units,"
        f" reserved {row.reserved_units:5.2f} {same}"
    )


if __name__ == "__main__":
    sys.exit(told_and_kept(__doc__, measure, told))
