"""The engine on a real device, where copies and computing do overlap. By hand: `pytest -m gpu tests/runtime`."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch

from autoflux.models.values import Precision
from autoflux.planning.schedule import aligned
from autoflux.runtime.graphs import BlockGraphs, CudaTape
from autoflux.runtime.sources import HostUnits, StagedUnits
from autoflux.runtime.streaming import Holding, StreamedModule, StreamedTransformer, arena_for
from autoflux.runtime.telemetry import SILENT, Recording
from autoflux.runtime.units import block_atoms, make_units
from tests.runtime.fakes import LISTS

pytestmark = pytest.mark.gpu

CARD = torch.device("cuda")


def transformer():
    """Blocks of 60 and 25 MB, whose copies take about as long as they compute."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=64,
        num_layers=3,
        num_single_layers=6,
        attention_head_dim=128,
        num_attention_heads=7,
        joint_attention_dim=256,
        pooled_projection_dim=64,
        guidance_embeds=True,
    )
    return model.to(torch.bfloat16).eval().requires_grad_(requires_grad=False)


def inputs_of(tokens: int, seed: int):
    generator = torch.Generator(CARD).manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, device=CARD, dtype=torch.bfloat16)

    return {
        "hidden_states": noise(1, tokens, 64),
        "encoder_hidden_states": noise(1, 64, 256),
        "pooled_projections": noise(1, 64),
        "timestep": torch.full((1,), 0.5, device=CARD, dtype=torch.bfloat16),
        "guidance": torch.full((1,), 3.5, device=CARD),
        "img_ids": torch.zeros(tokens, 3, device=CARD),
        "txt_ids": torch.zeros(64, 3, device=CARD),
        "return_dict": False,
    }


def embedding_of(model, inputs):
    times = inputs["timestep"] * 1000
    guidance = inputs["guidance"].to(torch.bfloat16) * 1000
    return model.time_text_embed(times, guidance, inputs["pooled_projections"])


@pytest.mark.parametrize("source", [HostUnits, StagedUnits])
@pytest.mark.parametrize("resident", [(), (0, 4, 5)])
@pytest.mark.parametrize("ring_units", [1.0, 1.4, 3.0])
@torch.no_grad()
def test_every_pass_has_the_bits_of_the_resident_transformer(source, resident, ring_units):
    model = transformer().to(CARD)
    given = [inputs_of(tokens, seed) for seed, tokens in enumerate((16, 1024, 16, 256))]
    expected = [model(**one)[0] for one in given]
    model.to("cpu")
    part = StreamedModule(model, block_atoms(model, LISTS), resident=resident, wraps=True)
    arena = arena_for([part], int(ring_units * part.largest_streamed), CARD, parks=True)
    part.attach(arena, make_source=source)
    held = torch.cuda.memory_allocated()
    for turn in range(12):
        # Nothing waits for the device between passes, and memory of what stays is used by others now and then.
        outputs = [model(**one)[0] for one in given]
        assert all(torch.equal(one, wanted) for one, wanted in zip(outputs, expected, strict=True))
        if turn % 4 == 3:
            arena.park()
            torch.full((arena.resident.numel(),), 0xFF, dtype=torch.uint8, device=CARD)
            arena.unpark()
    del outputs
    assert torch.cuda.memory_allocated() <= held + 2**21
    part.detach()
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert torch.equal(model.to(CARD)(**given[1])[0], expected[1])


@torch.no_grad()
def test_hoisted_and_watched_passes_have_the_same_bits_and_one_ring_serves_all():
    model = transformer().to(CARD)
    given = inputs_of(1024, 1)
    expected = model(**given)[0]
    model.to("cpu")
    made = StreamedTransformer(model, LISTS, Holding(), CARD)
    made.attach(arena_for(made.parts, 0, CARD))
    for _ in range(5):
        made.select(made.modulation([embedding_of(model, given)] * 3)[1:2])
        assert torch.equal(model(**given)[0], expected)
    streamer = made.blocks.streamer
    recording = Recording(streamer.lane)
    streamer.record(recording)
    for _ in range(2):
        assert torch.equal(model(**given)[0], expected)
    times = recording.times()
    streamer.record(SILENT)
    assert len(times) == 2 * len(streamer.streamed)
    assert all(t.copy_ended <= t.compute_began <= t.compute_ended for t in times)
    made.detach()


@pytest.mark.parametrize("resident", [(), (0, 4, 5), range(9)])
@pytest.mark.parametrize(
    ("storage", "compiled"),
    [(Precision.BFLOAT16, False), (Precision.FLOAT8, False), (Precision.INT8, False), (Precision.FLOAT8, True)],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_blocks_replayed_from_graphs_have_the_same_bits_and_leave_nothing(storage, compiled, resident, mode, caplog):
    model = transformer()
    with mode():
        sizes = [inputs_of(tokens, seed) for seed, tokens in enumerate((256, 1024))]
    narrow = storage != Precision.BFLOAT16
    held = Holding(frozenset(resident), storage=storage, native=narrow, compiled=compiled)
    outputs = []
    for graphs in (False, True):
        made = StreamedTransformer(model, LISTS, replace(held, graphs=graphs), CARD)
        made.attach(arena_for(made.parts, 0, CARD))
        steps = [(size, time) for size in sizes for time in (0.9, 0.6, 0.3, 0.1)]
        with mode():
            outputs.append([stepped(made, model, given, time) for given, time in steps])
            allocated = torch.cuda.memory_allocated()
            made.forget_graphs()
            outputs[-1] += [stepped(made, model, sizes[0], time) for time in (0.8, 0.7, 0.2)]
        made.detach()
    assert "not replayed" not in caplog.text
    for launched, replayed in zip(*outputs, strict=True):
        # Of each size, something else may be compiled for the first time and later.
        assert torch.equal(launched, replayed) or (compiled and relative(launched, replayed) < 0.05)
    assert all(torch.isfinite(output).all() for output in outputs[0])
    assert not any("forward" in vars(block.module) for block in block_atoms(model, LISTS))
    gc.collect()
    assert torch.cuda.memory_allocated() < allocated


def relative(found, wanted):
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


def stepped(made, model, inputs, time):
    """A step at that time, with what it reads in memory of its own, as each step of a picture has."""
    given = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    given["timestep"].fill_(time)
    made.select(made.modulation([embedding_of(model, given)]))
    return model(**given)[0].clone()


@torch.inference_mode()
def test_what_no_graph_holds_is_launched_with_a_warning(caplog):
    """A block that asks the device for a number waits for it, which no recording can."""

    class Asking(torch.nn.Module):
        def forward(self, x):
            return x * 2 if x.sum().item() > 0 else x

    block = Asking()
    BlockGraphs([block], CudaTape(CARD))
    for number in (1.0, -1.0, 2.0, 3.0):
        x = torch.full((4,), number, device=CARD)
        assert torch.equal(block(x), x * 2 if number > 0 else x)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert torch.ones(1, device=CARD).item() == 1


@torch.inference_mode()
def test_what_fits_no_input_is_returned_from_memory_of_its_own():
    class Slicing(torch.nn.Module):
        def forward(self, x):
            return x[:1], x[1:] + 1, 2

    block = Slicing()
    BlockGraphs([block], CudaTape(CARD))
    for start in range(4):
        first, others, count = block(torch.arange(start, start + 3.0, device=CARD))
        assert (first.tolist(), others.tolist(), count) == ([start], [start + 2, start + 3], 2)


@pytest.mark.parametrize("storage", [Precision.FLOAT8, Precision.INT8])
@torch.no_grad()
def test_compiled_narrow_blocks_stay_close_to_wide_ones(storage):
    model = transformer().to(CARD)
    given = inputs_of(1024, 1)
    expected = model(**given)[0].float()
    made = StreamedTransformer(model.to("cpu"), LISTS, Holding(storage=storage, native=True, compiled=True), CARD)
    made.attach(arena_for(made.parts, 0, CARD))
    made.select(made.modulation([embedding_of(model, given)]))
    found = model(**given)[0].float()
    assert torch.isfinite(found).all()
    assert (found - expected).norm() / expected.norm() < 0.12
    made.detach()


@torch.no_grad()
def test_pinned_memory_is_exactly_what_is_streamed_and_is_given_back():
    model = transformer()
    units = make_units(block_atoms(model, LISTS), 0)
    part = StreamedModule(model, block_atoms(model, LISTS), wraps=True)
    part.attach(arena_for([part], 0, CARD))
    assert part.streamer.pinned_bytes == sum(unit.nbytes for unit in units) == part.streamer.streamed_bytes
    assert part.streamer.pinned_bytes <= 1.001 * sum(aligned(unit.nbytes) for unit in units)
    part.drop()
    del part, model, units
    gc.collect()
    torch.cuda.empty_cache()
    # A failed registration would surface here.
    assert torch.ones(1, device=CARD).item() == 1
