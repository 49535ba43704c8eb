"""Units: which tensors are copied together, where they lie, and that they read and write what they say."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autoflux.errors import ContradictoryWishes
from autoflux.planning.schedule import ALIGNMENT, aligned
from autoflux.runtime.units import Atom, block_atoms, make_units, rest_of
from tests.runtime.fakes import LISTS, Chain, layer_units, tiny_transformer

EVERY_DTYPE = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int8,
    torch.int64,
    torch.bool,
]


def mixed() -> nn.Module:
    """Tensors of every format, of no dimension, of no element, and one that lies across its memory."""
    module = nn.Module()
    for i, dtype in enumerate(EVERY_DTYPE):
        module.register_buffer(f"b{i}", torch.arange(3 * (i + 1)).reshape(3, i + 1).to(dtype))
    module.register_buffer("scalar", torch.tensor(5.0))
    module.register_buffer("empty", torch.empty(0, 3))
    module.turned = nn.Parameter(torch.arange(12.0).reshape(3, 4).t())
    return module


def test_blocks_are_found_in_order():
    model = tiny_transformer()
    atoms = block_atoms(model, LISTS)
    assert [atom.name for atom in atoms] == [
        "transformer_blocks.0",
        "transformer_blocks.1",
        "single_transformer_blocks.0",
        "single_transformer_blocks.1",
        "single_transformer_blocks.2",
    ]
    assert all(model.get_submodule(atom.name) is atom.module for atom in atoms)


def test_each_block_is_a_unit_and_the_rest_is_one():
    model = tiny_transformer()
    units = make_units(block_atoms(model, LISTS), 0)
    rest = rest_of(model, units)
    assert [unit.name for unit in units] == [atom.name for atom in block_atoms(model, LISTS)]
    pieces = [piece.tensor for unit in (*units, rest) for piece in unit.pieces]
    assert len(pieces) == len({id(tensor) for tensor in pieces})
    assert {id(tensor) for tensor in pieces} == {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    assert id(model.x_embedder.weight) in {id(piece.tensor) for piece in rest.pieces}


def test_nothing_is_left_when_the_whole_model_is_a_unit():
    model = tiny_transformer()
    assert rest_of(model, make_units([Atom("model", model)], 0)) is None


@settings(deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.integers(0, 4000))
def test_consecutive_atoms_are_joined_as_long_as_they_fit(widths, block_bytes):
    layers = nn.ModuleList(nn.Linear(width, 1) for width in widths)
    units = make_units(block_atoms(nn.ModuleDict({"layers": layers}), ["layers"]), block_bytes)
    assert [atom.module for unit in units for atom in unit.atoms] == list(layers)
    for unit in units:
        assert unit.nbytes <= block_bytes or len(unit.atoms) == 1
    for unit, following in pairwise(units):
        first = make_units(following.atoms[:1], 0)[0]
        assert unit.nbytes + first.nbytes > block_bytes


def test_names_of_units():
    chain = Chain((16, 16, 16))
    assert [unit.name for unit in layer_units(chain)] == ["layers.0", "layers.1", "layers.2"]
    assert [unit.name for unit in layer_units(chain, 1 << 20)] == ["layers.0 to layers.2"]


def test_atoms_without_tensors_are_left_out():
    atoms = [Atom("a", nn.SiLU()), Atom("b", nn.Linear(2, 2)), Atom("c", nn.Dropout())]
    assert [unit.name for unit in make_units(atoms, 0)] == ["b"]
    assert make_units(atoms[:1], 0) == []


def test_pieces_begin_at_multiples_of_the_alignment_and_never_overlap():
    module = mixed()
    (unit,) = make_units([Atom("mixed", module)], 0)
    end = 0
    for piece in unit.pieces:
        assert piece.offset % ALIGNMENT == 0
        assert piece.offset >= end
        end = piece.offset + piece.nbytes
    assert unit.nbytes == sum(aligned(tensor.nbytes) for tensor in (*module.parameters(), *module.buffers()))


def test_what_is_written_is_what_is_viewed():
    module = mixed()
    (unit,) = make_units([Atom("mixed", module)], 0)
    memory = torch.full((unit.nbytes + 512,), 255, dtype=torch.uint8)
    wanted = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    unit.write(memory)
    assert (memory[unit.nbytes :] == 255).all()
    for view, piece in zip(unit.views(memory), unit.pieces, strict=True):
        assert view.dtype == piece.tensor.dtype
        assert view.shape == piece.tensor.shape
    unit.point_at(memory)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
        assert tensor.is_contiguous()
    assert all(piece.tensor.untyped_storage().data_ptr() == memory.data_ptr() for piece in unit.pieces)


def test_pointing_elsewhere_changes_what_the_module_computes_with():
    chain = Chain((4, 4))
    unit = layer_units(chain)[0]
    memory = torch.zeros(unit.nbytes, dtype=torch.uint8)
    weight = chain.layers[0].weight
    unit.point_at(memory)
    assert chain.layers[0].weight is weight
    assert torch.equal(chain.layers[0](torch.ones(1, 4)), torch.zeros(1, 4))
    unit.views(memory)[1].fill_(2.0)
    assert torch.equal(chain.layers[0](torch.ones(1, 4)), torch.full((1, 4), 2.0))


def test_a_tensor_in_two_units_is_refused_and_in_one_is_not():
    chain = Chain((4, 4, 4))
    chain.layers[2].bias = chain.layers[0].bias
    with pytest.raises(ContradictoryWishes, match=r"'layers\.0' and 'layers\.2' share a weight"):
        layer_units(chain)
    assert len(layer_units(chain, 1 << 20)[0].pieces) == 5


@given(
    widths=st.lists(st.integers(1, 40), min_size=2, max_size=12),
    block_bytes=st.integers(0, 20_000),
    alone=st.sets(st.integers(0, 11)),
)
def test_what_stays_is_a_unit_by_itself_and_nothing_is_joined_across_it(widths, block_bytes, alone):
    atoms = block_atoms(Chain(widths), ["layers"])
    alone = {i for i in alone if i < len(atoms)}
    units = make_units(atoms, block_bytes, alone=alone)
    assert [atom.name for unit in units for atom in unit.atoms] == [atom.name for atom in atoms]
    by_themselves = {atoms[i].name for i in alone}
    assert all(len(unit.atoms) == 1 for unit in units if unit.atoms[0].name in by_themselves)
    assert not any(atom.name in by_themselves for unit in units for atom in unit.atoms[1:])
