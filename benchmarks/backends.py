"""The two backends at FLUX.1-dev's real size: the same output, and how long a step takes (random weights).

    python -m benchmarks.backends --json out.json     # needs CUDA, 60 GB on the card and 80 GB of RAM
    python -m benchmarks.backends --tiny              # the same code on a small transformer, which a CPU can run

Each transformer with everything on the card, streamed whole, and streamed with as many blocks staying as 12 GB of the
card allow; then DiffSynth's under its own VRAM management with 12 GB. Says at the end what of this must hold, and
whether it does (exit code 1 if not); speeds only on a card.

The libraries add timestep, guidance and pooled prompt in different order, which rounds differently, and every block
feels it; autoflux hands DiffSynth the sum in diffusers' order, and so does this.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import torch
from autoflux.plugins.diffsynth_offload import VramManagement
from autoflux.plugins.diffsynth_transformer import (
    BLOCK_LISTS,
    ROTARY_AXES,
    Conditioned,
    SizedDiT,
    Sizes,
    embedding_of,
    joined_weights,
)
from autoflux.plugins.diffusers_loading import DIFFUSERS

from autoflux import ComponentPlan, Placement, Precision
from autoflux.planning.schedule import Unit as Load
from autoflux.planning.schedule import choose_resident
from autoflux.runtime.streaming import Holding, StreamedTransformer, arena_for
from benchmarks.ceilings import measure_ceilings
from benchmarks.checks import Check
from benchmarks.checks import told as verdict
from benchmarks.full_size import (
    FLUX_DEV,
    FLUX_TINY,
    PIXELS_PER_TOKEN,
    Measurement,
    best_device,
    measure,
    transformer,
    transformer_inputs,
)

# isort: split
from diffsynth.pipelines.flux_image import model_fn_flux_image

GB = 1e9
GIB = 2**30
LEAST_COSINE = 0.9999
MOST_APART = 0.05
"""Of the streamed step times of the two."""
LEAST_FASTER = 5.0
"""Streamed under the limit, than DiffSynth's own management under the same."""
RING_UNITS = 1.34
"""Size of the ring in largest blocks."""

Inputs = dict[str, torch.Tensor]


class Side(msgspec.Struct, kw_only=True):
    """One library's transformer. `step` is a pass, (batch, tokens, 64); `embedding` is what its blocks modulate by."""

    name: str
    model: Any
    lists: Sequence[str]
    step: Callable[[], torch.Tensor]
    embedding: Callable[[], torch.Tensor]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One side in one setting."""

    side: str
    setting: str
    measured: Measurement
    streamed_gb: float = 0.0
    same_bits: bool | None = None
    """As with everything on the device."""


class Bench:
    """Both transformers, one at a time anywhere but at the start."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = best_device() if options.tiny else torch.device("cuda")
        self.size = FLUX_TINY if options.tiny else FLUX_DEV
        self.pixels = 128 if options.tiny else 1024
        self.ceilings = measure_ceilings(self.device, tiny=options.tiny)
        self.inputs = transformer_inputs(
            self.size, device=self.device, pixels=self.pixels, text_tokens=16 if options.tiny else 512
        )
        self.rows: list[Row] = []
        self.outputs: dict[str, torch.Tensor] = {}

    def sides(self) -> Iterator[Side]:
        """diffusers' transformer, and DiffSynth's with the same weights; each on the device when it comes."""
        theirs = transformer(self.size, device=self.device)
        dit = twin(theirs)
        yield diffusers_side(theirs, self.inputs)
        yield diffsynth_side(dit, self.inputs, self.pixels)

    def add(self, side: Side, setting: str, **more: Any) -> Row:
        row = Row(side=side.name, setting=setting, measured=measure(side.step, steps=self.options.steps), **more)
        self.rows.append(row)
        print(told(row), flush=True)
        return row

    def resident(self, side: Side) -> float:
        """Everything on the device; returns the seconds of a block."""
        with torch.no_grad():
            self.outputs[side.name] = side.step()
        row = self.add(side, "resident")
        return row.measured.median_seconds / (self.size.num_double + self.size.num_single)

    def streamed(self, side: Side, setting: str, *, resident_bytes: int, block_seconds: float) -> None:
        """Under our engine, the modulation taken out of the loop."""
        self.forget()
        with self.held(side, resident_bytes, block_seconds) as made, torch.no_grad():
            made.select(made.modulation(side.embedding().split(1)))
            same = bool(torch.equal(side.step(), self.outputs[side.name]))
            self.add(side, setting, streamed_gb=made.blocks.streamer.streamed_bytes / GB, same_bits=same)

    @contextmanager
    def held(self, side: Side, resident_bytes: int, block_seconds: float) -> Iterator[StreamedTransformer]:
        """Those blocks stay that make the fastest pass in so many bytes."""
        made = StreamedTransformer(side.model, side.lists, Holding(hoist=True), self.device)
        loads = [Load(unit.nbytes, block_seconds) for unit in made.blocks.units]
        ring = int(RING_UNITS * max(load.nbytes for load in loads))
        link = self.ceilings.link_gb_per_s * GB
        made.blocks.resident = frozenset(choose_resident(loads, resident_bytes, ring, link))
        made.attach(arena_for(made.parts, ring, self.device))
        try:
            yield made
        finally:
            made.detach()

    def own_management(self, side: Side) -> None:
        """DiffSynth's own, as `--offload native` sets it up."""
        self.forget()
        precision = Precision.BFLOAT16
        planned = ComponentPlan(name="transformer", storage=precision, arithmetic=precision, placement=Placement.NATIVE)
        limit_gib = self.options.limit_gb * GB / GIB if self.device.type == "cuda" else None
        management = VramManagement(self.device.type, limit_gib)
        management.hold(side.model, planned)
        with management.use(side.model):
            self.add(side, "own management")

    def forget(self) -> None:
        """Give back what the setting before has left with torch's allocator."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def seconds(self, side: str, setting: str) -> float:
        return next(r.measured.median_seconds for r in self.rows if (r.side, r.setting) == (side, setting))


def twin(model: torch.nn.Module) -> SizedDiT:
    """DiffSynth's transformer with the weights of diffusers' one, where they lie."""
    state = dict(model.named_parameters())
    weights = joined_weights({name: tuple(weight.shape) for name, weight in state.items()})
    with torch.device("meta"):
        dit = SizedDiT(Sizes.of(weights, ROTARY_AXES))
    made = {
        name: torch.cat([state[part.name].data[part.start : part.stop] for part in joined.rows])
        for name, joined in weights.items()
    }
    dit.load_state_dict(made, assign=True)
    return dit.eval().requires_grad_(requires_grad=False)


def diffusers_side(model: Any, inputs: Inputs) -> Side:
    """As `FluxTransformer2DModel.forward` does it, with the attention that the backend puts into it."""
    DIFFUSERS.prepare(model)

    def embedding() -> torch.Tensor:
        dtype = inputs["hidden_states"].dtype
        times, guidance = inputs["timestep"].to(dtype) * 1000, inputs["guidance"].to(dtype) * 1000
        return model.time_text_embed(times, guidance, inputs["pooled_projections"])

    return Side(
        name="diffusers",
        model=model,
        lists=DIFFUSERS.block_lists,
        step=lambda: model(**inputs, return_dict=False)[0],
        embedding=embedding,
    )


def diffsynth_side(dit: SizedDiT, inputs: Inputs, pixels: int) -> Side:
    """As the backend has `model_fn_flux_image` do it."""
    side, batch = 2 * pixels // PIXELS_PER_TOKEN, len(inputs["hidden_states"])
    dtype = inputs["hidden_states"].dtype
    guidance, times = inputs["guidance"].to(dtype) * 1000, inputs["timestep"].to(dtype) * 1000

    def embedding() -> torch.Tensor:
        return embedding_of(dit, times, inputs["pooled_projections"], guidance)

    def step() -> torch.Tensor:
        velocity = model_fn_flux_image(
            dit=Conditioned(dit, embedding()),
            latents=dit.unpatchify(inputs["hidden_states"], side, side),
            timestep=times,
            prompt_emb=inputs["encoder_hidden_states"],
            pooled_prompt_emb=inputs["pooled_projections"],
            text_ids=inputs["txt_ids"].expand(batch, -1, -1),
        )
        return dit.patchify(velocity)

    return Side(name="diffsynth", model=dit, lists=BLOCK_LISTS, step=step, embedding=embedding)


def run(bench: Bench) -> list[Check]:
    """Every setting of both sides; what must hold."""
    both = list(bench.sides())
    block_seconds = [bench.resident(side) for side in both]
    for side in both:
        side.model.to("cpu")
    for side, seconds in zip(both, block_seconds, strict=True):
        bench.streamed(side, "all streamed", resident_bytes=0, block_seconds=seconds)
        staying = int(bench.options.resident_gb * GB)
        bench.streamed(side, "streamed", resident_bytes=staying, block_seconds=seconds)
    bench.own_management(both[1])
    return checks(bench)


def cosine(bench: Bench) -> float:
    """Of the two outputs."""
    one, other = (bench.outputs[name].flatten().double() for name in ("diffsynth", "diffusers"))
    return torch.nn.functional.cosine_similarity(one, other, dim=0).item()


def checks(bench: Bench) -> list[Check]:
    """Speeds and memory only on a card."""
    alike = cosine(bench)
    same = [row.same_bits for row in bench.rows if row.same_bits is not None]
    made = [
        Check(name="cosine of the outputs", value=alike, bound=LEAST_COSINE, holds=alike >= LEAST_COSINE),
        Check(name="streamed settings with the same bits", value=sum(same), bound=len(same), holds=all(same)),
    ]
    return made if bench.device.type == "cpu" else [*made, *_speed_checks(bench)]


def _speed_checks(bench: Bench) -> Iterator[Check]:
    for setting in ("all streamed", "streamed"):
        apart = abs(bench.seconds("diffsynth", setting) / bench.seconds("diffusers", setting) - 1)
        yield Check(name=f"step times apart, {setting}", value=apart, bound=MOST_APART, holds=apart <= MOST_APART)
    faster = bench.seconds("diffsynth", "own management") / bench.seconds("diffsynth", "streamed")
    yield Check(name="times faster than own management", value=faster, bound=LEAST_FASTER, holds=faster >= LEAST_FASTER)
    limit = bench.options.limit_gb
    most = max(r.measured.on_card_bytes for r in bench.rows if r.setting == "streamed") / GB
    yield Check(name="GB on the card, streamed", value=most, bound=limit, holds=most <= limit)


def told(row: Row) -> str:
    """One line."""
    took = row.measured
    same = {True: "same bits", False: "OTHER BITS", None: ""}[row.same_bits]
    return (
        f"{row.side:10} {row.setting:16} {took.median_seconds:8.4f} s"
        f" ({took.best_seconds:.4f}-{took.worst_seconds:.4f})"
        f" {took.allocated_bytes / GB:6.2f} GB, {took.on_card_bytes / GB:6.2f} on card, streams {row.streamed_gb:5.2f}"
        f" {same}"
    )


def main() -> int:
    """Measure, say what holds, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--limit-gb", type=float, default=12, help="of the card, for the last setting of each (12)")
    parser.add_argument("--resident-gb", type=float, default=8.0, help="of blocks that stay within it (8)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.error("needs CUDA, or --tiny")
    bench = Bench(options)
    made = run(bench)
    print("\n".join(map(verdict, made)))
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(_report(bench, made))))
    return 0 if all(check.holds for check in made) else 1


def _report(bench: Bench, made: Sequence[Check]) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu",
        "versions": {name: version(name) for name in ("torch", "diffusers", "diffsynth")},
        "settings": {"pixels": bench.pixels, "steps": bench.options.steps, "limit_gb": bench.options.limit_gb},
        "ceilings": bench.ceilings,
        "rows": bench.rows,
        "checks": made,
    }


if __name__ == "__main__":
    sys.exit(main())
