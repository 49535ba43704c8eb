"""Modulation computed before the loop: the same bits as in it, and nothing left of it afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from autoflux.runtime.modulation import LookUp, Modulation
from autoflux.runtime.sources import StagedUnits
from autoflux.runtime.streamer import Streamer
from autoflux.runtime.units import block_atoms, make_units
from tests.runtime.fakes import (
    LISTS,
    LateLane,
    output_of,
    poisoned_arena,
    staying_bytes,
    tiny_inputs,
    tiny_transformer,
)

STEPS = (1.0, 0.7, 0.35, 0.05)
NAMES = [
    *(f"transformer_blocks.{i}.{norm}.linear" for i in range(2) for norm in ("norm1", "norm1_context")),
    *(f"single_transformer_blocks.{i}.norm.linear" for i in range(3)),
]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture
def plain(dtype):
    return tiny_transformer(dtype=dtype)


@pytest.fixture
def model(dtype):
    return tiny_transformer(dtype=dtype)


@torch.no_grad()
def embedding_of(model, inputs):
    """What the transformer computes of time, guidance and pooled prompt."""
    return model.time_text_embed(inputs["timestep"] * 1000, inputs["guidance"] * 1000, inputs["pooled_projections"])


def step_inputs(dtype, *times, seed=0):
    return tiny_inputs(len(times), seed=seed, dtype=dtype, times=times)


@torch.no_grad()
def rows_of(modulation, model, dtype, seed=0):
    """The modulation of all steps of one picture."""
    return modulation(torch.cat([embedding_of(model, step_inputs(dtype, time, seed=seed)) for time in STEPS]))


def test_every_modulation_linear_of_the_blocks_is_taken(model):
    wanted = {name: model.get_submodule(name) for name in NAMES}
    modulation = Modulation.taken_from(block_atoms(model, LISTS))
    atoms = modulation.atoms()
    assert [atom.name for atom in atoms] == NAMES
    assert [atom.module.linear for atom in atoms] == list(wanted.values())
    assert modulation.width == sum(linear.out_features for linear in wanted.values())
    assert all(isinstance(model.get_submodule(name), LookUp) for name in NAMES)
    assert isinstance(model.norm_out.linear, nn.Linear), "it is outside the blocks"
    kept = {id(weight) for weight in model.parameters()}
    assert not kept & {id(weight) for weight in modulation.parameters()}


def test_every_step_gives_the_same_bits(plain, model, dtype):
    modulation = Modulation.taken_from(block_atoms(model, LISTS))
    rows = rows_of(modulation, model, dtype)
    assert rows.shape == (len(STEPS), modulation.width)
    assert rows.dtype == dtype
    for row, time in zip(rows.split(1), STEPS, strict=True):
        modulation.select(row)
        inputs = step_inputs(dtype, time)
        assert torch.equal(output_of(model, **inputs), output_of(plain, **inputs))


def test_another_steps_modulation_gives_another_output(plain, model, dtype):
    modulation = Modulation.taken_from(block_atoms(model, LISTS))
    rows = rows_of(modulation, model, dtype)
    inputs = step_inputs(dtype, STEPS[0])
    modulation.select(rows[1:2])
    assert not torch.equal(output_of(model, **inputs), output_of(plain, **inputs))


def picture(batch, number):
    """One picture of a batch as a batch of one."""
    return {
        name: value[number : number + 1]
        if isinstance(value, torch.Tensor) and name not in ("img_ids", "txt_ids")
        else value
        for name, value in batch.items()
    }


@pytest.mark.parametrize("at", [(0, 3), (2, 2), (3, 1, 0), (1, 0, 3, 2)])
def test_a_batch_of_pictures_at_different_steps(plain, model, dtype, at):
    batch = tiny_inputs(len(at), dtype=dtype, times=[STEPS[step] for step in at])
    modulation = Modulation.taken_from(block_atoms(model, LISTS))
    alone = [embedding_of(plain, picture(batch, i)) for i in range(len(at))]

    def as_alone(linear, _given, _made):
        # A batch of rows rounds otherwise than each row by itself, which is what a picture gets without others.
        return torch.cat([linear.forward(functional.silu(embedding)) for embedding in alone])

    for name in NAMES:
        plain.get_submodule(name).register_forward_hook(as_alone)
    with torch.no_grad():
        modulation.select(torch.cat([modulation(embedding) for embedding in alone]))
    assert torch.equal(output_of(model, **batch), output_of(plain, **batch))


def test_a_batch_is_about_what_it_is_without_hoisting(plain, model, dtype):
    batch = tiny_inputs(4, dtype=dtype)
    modulation = Modulation.taken_from(block_atoms(model, LISTS))
    with torch.no_grad():
        modulation.select(torch.cat([modulation(embedding_of(plain, picture(batch, i))) for i in range(4)]))
    found, wanted = output_of(model, **batch).float(), output_of(plain, **batch).float()
    assert (found - wanted).norm() < (1e-5 if dtype == torch.float32 else 0.05) * wanted.norm()


def test_a_picture_does_not_feel_which_others_are_in_the_batch(model, dtype):
    modulation = Modulation.taken_from(block_atoms(model, LISTS))
    mine = rows_of(modulation, model, dtype)
    others = rows_of(modulation, model, dtype, seed=5)
    with torch.no_grad():
        together = modulation(
            torch.cat([embedding_of(model, step_inputs(dtype, t, seed=s)) for t in STEPS for s in (0, 5)])
        )
    assert torch.equal(together[0::2], mine)
    assert torch.equal(together[1::2], others)


def test_restore_leaves_the_module_as_it_was(plain, model, dtype):
    def told(module):
        modules = {name: (id(child), sorted(vars(child))) for name, child in module.named_modules()}
        return modules, [(name, id(tensor)) for name, tensor in module.state_dict(keep_vars=True).items()]

    before = told(model)
    weights = copy.deepcopy(model.state_dict())
    for _ in range(2):
        modulation = Modulation.taken_from(block_atoms(model, LISTS))
        modulation.select(rows_of(modulation, model, dtype)[:1])
        output_of(model, **step_inputs(dtype, STEPS[0]))
        assert told(model) != before
        modulation.restore()
        assert told(model) == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    inputs = step_inputs(dtype, 0.5)
    assert torch.equal(output_of(model, **inputs), output_of(plain, **inputs))


@pytest.mark.parametrize("staged", [False, True])
def test_streamed_with_its_transformer_through_one_ring(plain, model, dtype, staged):
    modulation = Modulation.taken_from(block_atoms(model, LISTS))
    blocks, linears = make_units(block_atoms(model, LISTS), 0), make_units(modulation.atoms(), 0)
    held = staying_bytes(model, blocks, {1})
    ring = max(unit.nbytes for unit in (*blocks, *linears))
    arena = poisoned_arena(resident_bytes=held, ring_bytes=ring, lane=LateLane())
    options = {"make_source": StagedUnits} if staged else {}
    streamers = [
        Streamer(model, blocks, arena, {1}, **options),
        Streamer(modulation, linears, arena, wraps=False, **options),
    ]
    for seed in range(2):
        rows = rows_of(modulation, model, dtype, seed)
        streamers[0].prefetch()
        for row, time in zip(rows.split(1), STEPS, strict=True):
            modulation.select(row)
            inputs = step_inputs(dtype, time, seed=seed)
            assert torch.equal(output_of(model, **inputs), output_of(plain, **inputs))
    for streamer in streamers:
        streamer.detach()
    modulation.restore()
    assert torch.equal(output_of(model, **inputs), output_of(plain, **inputs))


def test_blocks_without_modulation_have_nothing_to_take():
    layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)), nn.TransformerEncoderLayer(8, 2, 16)])
    modulation = Modulation.taken_from(block_atoms(nn.ModuleDict({"layers": layers}), ["layers"]))
    assert modulation.atoms() == []
    assert modulation.width == 0
    modulation.select(torch.empty(1, 0))
    modulation.restore()
