"""Seconds a step and memory of FLUX.1-dev's transformer under autoflux's streaming engine (random weights).

python -m benchmarks.streaming                    # every setting, one process, a table and JSON
python -m benchmarks.streaming --tiny             # the same code on a small transformer, which a CPU can run
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import torch

from autoflux.models.values import Precision
from autoflux.planning.schedule import Unit as Load
from autoflux.planning.schedule import aligned, choose_resident
from autoflux.runtime.order import layer_atoms
from autoflux.runtime.ring import Arena
from autoflux.runtime.streamer import Streamer
from autoflux.runtime.streaming import Holding, StreamedModule, StreamedTransformer, arena_for
from autoflux.runtime.telemetry import SILENT, Recording
from autoflux.runtime.units import block_atoms, make_units, sequence_atoms
from benchmarks.ceilings import measure_ceilings
from benchmarks.full_size import (
    BLOCK_LISTS,
    FLUX_DEV,
    FLUX_TINY,
    T5_TINY,
    T5_XXL,
    Measurement,
    best_device,
    measure,
    text_encoder,
    text_inputs,
    transformer,
    transformer_inputs,
)

GB = 1e9
STEP_TFLOP = {1024: (59.5, 14.9)}
"""Linear and attention, FLUX.1-dev, one picture of 1024x1024 with 512 text tokens."""
T5_TFLOP = 4.8
"""One prompt of 512 tokens."""
UNHOISTED_SHARE = 2 / 3
"""Of a double block, what is not modulation."""
ALL = 1 << 50


class Row(msgspec.Struct, kw_only=True):
    """One setting and what it took."""

    name: str
    settings: dict[str, Any]
    median_seconds: float
    best_seconds: float
    worst_seconds: float
    allocated_gb: float
    reserved_gb: float
    on_card_gb: float
    batch: int = 1
    streamed_gb: float = 0.0
    pinned_gb: float = 0.0
    weights_gb: float = 0.0
    identical: bool | None = None
    largest_difference: float | None = None
    bound_seconds: float | None = None
    setup_seconds: float = 0.0
    watched_seconds: float | None = None
    """A step with telemetry on."""

    @property
    def ratio(self) -> float | None:
        return self.median_seconds / self.bound_seconds if self.bound_seconds else None


class Bench:
    """One built transformer, measured in one setting after the other."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = best_device()
        self.size = FLUX_TINY if options.tiny else FLUX_DEV
        self.pixels = 128 if options.tiny else 1024
        self.text_tokens = 16 if options.tiny else 512
        self.rows: list[Row] = []
        self.ceilings = measure_ceilings(self.device, tiny=options.tiny)
        self.times: tuple[list[float], float] = ([], 0.0)
        """Seconds of each block and of the rest of a step, as they were when all weights were there."""
        self.model = transformer(self.size, device=self.device)
        self.inputs = self.inputs_for(1)

    def inputs_for(self, batch: int) -> dict[str, torch.Tensor]:
        return transformer_inputs(
            self.size, device=self.device, pixels=self.pixels, text_tokens=self.text_tokens, batch=batch
        )

    def step(self, inputs: dict[str, torch.Tensor] | None = None) -> Callable[[], torch.Tensor]:
        given = inputs or self.inputs
        return lambda: self.model(**given, return_dict=False)[0]

    def embedding(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the transformer computes from timestep, guidance and pooled prompt, as its forward does."""
        dtype = inputs["hidden_states"].dtype
        times, guidance = inputs["timestep"].to(dtype) * 1000, inputs["guidance"].to(dtype) * 1000
        return self.model.time_text_embed(times, guidance, inputs["pooled_projections"])

    def forget(self) -> None:
        """Give back what the setting before has left with torch's allocator."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def add(self, name: str, measured: Measurement, **more: Any) -> None:
        row = Row(
            name=name,
            settings=more.pop("settings", {}),
            median_seconds=measured.median_seconds,
            best_seconds=measured.best_seconds,
            worst_seconds=measured.worst_seconds,
            allocated_gb=measured.allocated_bytes / GB,
            reserved_gb=measured.reserved_bytes / GB,
            on_card_gb=measured.on_card_bytes / GB,
            **more,
        )
        self.rows.append(row)
        print(told(row), flush=True)

    def resident(self, name: str, *, batch: int = 1, compiled: bool = False) -> torch.Tensor:
        """Measure everything on the device, as diffusers does it, the baseline; returns its output, the reference."""
        inputs = self.inputs_for(batch)
        self.model.to(self.device)
        if compiled:
            self.model.compile_repeated_blocks(fullgraph=True)
        measured = measure(self.step(inputs), steps=self.options.steps)
        with torch.no_grad():
            output = self.step(inputs)()
        self.add(name, measured, batch=batch, bound_seconds=self.arithmetic_seconds("bfloat16", batch))
        if compiled:
            for block in block_atoms(self.model, BLOCK_LISTS):
                block.module._compiled_call_impl = None  # noqa: SLF001 — there is no public way back
        return output

    @contextmanager
    def held(
        self, holding: Holding, *, ring_bytes: int, resident_bytes: int = 0, layers: bool = False
    ) -> Iterator[tuple[StreamedTransformer, Arena]]:
        """The transformer under the engine, those blocks resident that make the fastest pass in `resident_bytes`."""
        atoms = layer_atoms(self.model, self._traced) if layers else None
        made = StreamedTransformer(self.model, BLOCK_LISTS, holding, self.device, atoms=atoms)
        link = self.ceilings.link_gb_per_s * GB
        if sum(aligned(unit.nbytes) for unit in made.blocks.units) <= resident_bytes:
            made.blocks.resident = frozenset(range(len(made.blocks.units)))
            ring_bytes = 0  # the modulation's largest unit: more brings nothing
        elif resident_bytes:
            seconds, pause = self.times
            loads = [Load(unit.nbytes, taken) for unit, taken in zip(made.blocks.units, seconds, strict=True)]
            made.blocks.resident = choose_resident(loads, resident_bytes, ring_bytes, link, pause=pause)
        arena = arena_for(made.parts, ring_bytes, self.device)
        made.attach(arena)
        try:
            yield made, arena
        finally:
            made.detach()

    def _traced(self) -> torch.Tensor:
        inputs = {name: torch.empty_like(tensor, device="cpu") for name, tensor in self.inputs.items()}
        output: torch.Tensor = self.model(**inputs, return_dict=False)[0]
        return output

    def streamed(
        self,
        name: str,
        holding: Holding,
        reference: torch.Tensor | None,
        *,
        ring_bytes: int,
        resident_bytes: int = 0,
        batch: int = 1,
        layers: bool = False,
    ) -> torch.Tensor:
        """Measure one setting; returns its output."""
        self.forget()
        inputs = self.inputs_for(batch)
        began = time.perf_counter()
        with self.held(holding, ring_bytes=ring_bytes, resident_bytes=resident_bytes, layers=layers) as (made, arena):
            setup = time.perf_counter() - began
            more: dict[str, Any] = {}
            with torch.no_grad():
                if holding.hoist:
                    made.select(made.modulation(self.embedding(inputs).split(1)))
                output = self.step(inputs)()
            measured = measure(self.step(inputs), steps=self.options.steps)
            streamer = made.blocks.streamer
            if not streamer.streamed:
                self.times = self.timed_blocks(made.blocks)
            if name in self.options.watched:
                more["watched_seconds"] = self.watched(streamer, inputs)
            streamed = streamer.streamed_bytes
            precision = holding.storage.value if holding.native else "bfloat16"
            arithmetic = self.arithmetic_seconds(precision, batch)
            self.add(
                name,
                measured,
                batch=batch,
                settings=msgspec.to_builtins(replace(holding, resident=sorted(made.blocks.resident))),
                streamed_gb=streamed / GB,
                pinned_gb=streamer.pinned_bytes / GB,
                weights_gb=arena.nbytes / GB,
                identical=None if reference is None else bool(torch.equal(output, reference)),
                largest_difference=None if reference is None else relative(output, reference),
                bound_seconds=max(arithmetic or 0, streamed / GB / self.ceilings.link_gb_per_s) or None,
                setup_seconds=setup,
                **more,
            )
        return output

    def watched(self, streamer: Streamer, inputs: dict[str, torch.Tensor]) -> float:
        """Seconds of a step with telemetry on."""
        streamer.record(Recording(streamer.lane))
        seconds = measure(self.step(inputs), steps=self.options.steps).median_seconds
        streamer.record(SILENT)
        return seconds

    def timed_blocks(self, part: StreamedModule) -> tuple[list[float], float]:
        """Seconds of each block in a step and of what is beside them, all weights being there."""
        streamer = part.streamer
        recording = Recording(streamer.lane)
        streamer.record(recording)
        total = measure(self.step(), steps=2, warm=0).median_seconds
        streamer.record(SILENT)
        last = recording.times()[-len(part.units) :]
        blocks = [unit.compute_ended - unit.compute_began for unit in last]
        return blocks, max(0.0, total - sum(blocks))

    def text_encoders(self, ring_units: Iterable[int]) -> None:
        """T5-XXL streamed whole through rings of so many of its blocks."""
        size = T5_TINY if self.options.tiny else T5_XXL
        model = text_encoder(size, device=self.device).to("cpu")  # random numbers are slow on a processor
        inputs = text_inputs(size, device=self.device, text_tokens=self.text_tokens)
        for units in ring_units:
            self.text_encoder(model, inputs, ring_units=units)

    def text_encoder(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *, ring_units: int) -> None:
        """T5-XXL, once an encode: nothing is copied ahead for the next."""
        self.forget()
        part = StreamedModule(model, sequence_atoms(model))
        arena = arena_for([part], ring_units * max(unit.nbytes for unit in part.units), self.device)
        began = time.perf_counter()
        part.attach(arena)
        setup = time.perf_counter() - began
        measured = measure(lambda: model(**inputs)[0], steps=self.options.steps, awaited=True)
        streamed = part.streamer.streamed_bytes
        arithmetic = T5_TFLOP / self.ceilings.tflops["bfloat16"] if self.ceilings.tflops else 0
        self.add(
            f"T5 encode, bf16, streamed, ring of {ring_units}",
            measured,
            streamed_gb=streamed / GB,
            pinned_gb=part.streamer.pinned_bytes / GB,
            weights_gb=arena.nbytes / GB,
            bound_seconds=max(arithmetic, streamed / GB / self.ceilings.link_gb_per_s),
            setup_seconds=setup,
        )
        part.detach()

    def arithmetic_seconds(self, precision: str, batch: int) -> float | None:
        if self.pixels not in STEP_TFLOP or precision not in self.ceilings.tflops:
            return None
        linear, attention = STEP_TFLOP[self.pixels]
        return batch * (linear / self.ceilings.tflops[precision] + attention / self.ceilings.tflops["bfloat16"])


def relative(output: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    return ((output.float() - reference.float()).norm() / reference.float().norm()).item()


def told(row: Row) -> str:
    """One line of the table."""
    same = {True: "same bits", False: f"differs {row.largest_difference or 0:.1e}", None: ""}[row.identical]
    ratio = f"{row.ratio:.3f} x bound {row.bound_seconds:.4f}" if row.ratio else ""
    return (
        f"{row.name:44s} {row.median_seconds:7.4f} s ({row.best_seconds:.4f}-{row.worst_seconds:.4f})"
        f" {row.allocated_gb:6.2f} GB, {row.reserved_gb:6.2f} reserved, {row.on_card_gb:6.2f} on card,"
        f" streams {row.streamed_gb:5.2f} pins {row.pinned_gb:5.2f} holds {row.weights_gb:5.2f};"
        f" {ratio} {same} setup {row.setup_seconds:.1f} s"
    ) + (f" watched {row.watched_seconds:.4f} s" if row.watched_seconds else "")


def run(bench: Bench) -> None:
    """Every setting, those that narrow the weights last."""
    reference = bench.resident("resident, bf16, eager")
    batch_four = bench.resident("resident, bf16, eager, batch 4", batch=4)
    compiled_reference = bench.resident("resident, bf16, compiled", compiled=True)
    bench.model.to("cpu")
    whole = max(unit.nbytes for unit in make_units(block_atoms(bench.model, BLOCK_LISTS), 0))
    largest_layer = max(aligned(p.numel() * p.element_size()) for p in bench.model.parameters())
    plain, ring = Holding(hoist=False), int(2.01 * whole * UNHOISTED_SHARE)
    bench.streamed("bf16, nothing hoisted, all streamed", plain, reference, ring_bytes=2 * whole)
    bench.streamed("bf16, all streamed, batch 4", plain, batch_four, ring_bytes=2 * whole, batch=4)
    bench.streamed("smallest", plain, reference, ring_bytes=int(largest_layer * 1.01), layers=True)
    hoisted = Holding()
    bench.streamed("bf16, hoisted, all streamed", hoisted, reference, ring_bytes=ring)
    compiled_hoisted = replace(hoisted, compiled=True)
    held = bench.streamed(
        "bf16, hoisted, compiled, all resident",
        compiled_hoisted,
        compiled_reference,
        ring_bytes=ring,
        resident_bytes=ALL,
    )
    some = int(bench.options.resident_gb * GB)
    bench.streamed("bf16, hoisted, compiled, <= 12 GB", compiled_hoisted, held, ring_bytes=ring, resident_bytes=some)
    few = int(bench.options.narrow_resident_gb * GB)
    for storage in bench.options.narrow:
        narrow = replace(compiled_hoisted, storage=storage, native=bench.options.native)
        name = f"{storage}, hoisted, compiled"
        for held, resident_bytes in (("resident", ALL), ("<= 5 GB", few)):
            bench.streamed(
                f"{name}, {held}", narrow, compiled_reference, ring_bytes=ring // 2, resident_bytes=resident_bytes
            )
    bench.model = None
    bench.text_encoders((1, 2))


def main() -> None:
    """Measure everything and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--resident-gb", type=float, default=9.2)
    parser.add_argument("--narrow-resident-gb", type=float, default=3.0)
    parser.add_argument("--narrow", type=Precision, nargs="+", default=[Precision.FLOAT8])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.watched = ("bf16, hoisted, all streamed",)
    options.native = torch.cuda.is_available()
    bench = Bench(options)
    print(bench.ceilings, flush=True)
    try:
        run(bench)
    finally:
        if options.json:
            report = {
                "device": torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu",
                "versions": {name: version(name) for name in ("torch", "diffusers")},
                "ceilings": bench.ceilings,
                "rows": bench.rows,
            }
            options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report)))


if __name__ == "__main__":
    main()
