"""The order of layers, found without computing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from autoflux.runtime.order import layer_atoms
from autoflux.runtime.units import make_units
from tests.runtime.fakes import hooks_of, output_of, tiny_inputs, tiny_transformer


def called_layers(model) -> list[str]:
    """What really runs, in order, of all that has weights."""
    called = []
    hooks = [
        child.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name, child in model.named_modules()
        if any(True for _ in child.parameters(recurse=False))
    ]
    output_of(model)
    for hook in hooks:
        hook.remove()
    return called


def test_a_transformers_layers_in_the_order_they_run():
    model = tiny_transformer()
    weights = copy.deepcopy(model.state_dict())
    atoms = layer_atoms(model, lambda: model(**tiny_inputs()))
    assert [atom.name for atom in atoms] == called_layers(model)
    assert all(model.get_submodule(atom.name) is atom.module for atom in atoms)
    assert atoms[0].name == "x_embedder"
    assert atoms[-1].name == "proj_out"
    streamed = {id(piece.tensor) for unit in make_units(atoms, 0) for piece in unit.pieces}
    assert streamed == {id(weight) for weight in model.parameters()}
    assert not hooks_of(model)
    for name, tensor in model.state_dict().items():
        assert type(tensor) is torch.Tensor
        assert torch.equal(tensor, weights[name])


class Twice(nn.Module):
    """One layer runs twice, one never, and one inside a layer with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 4)
        self.first = nn.Linear(4, 4)
        self.again = nn.Linear(4, 4)
        self.never = nn.Linear(4, 4)
        self.outer = Outer()
        self.plain = nn.SiLU()
        self.norm = nn.BatchNorm1d(4, affine=False)

    def forward(self, x):
        x = self.norm(self.again(self.first(x)))
        return self.last(self.plain(self.outer(self.again(x))))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x) * self.scale


def test_layers_that_cannot_be_brought_once_a_pass_are_left_out():
    module = Twice().eval()
    atoms = layer_atoms(module, lambda: module(torch.ones(2, 4)))
    assert [atom.name for atom in atoms] == ["first", "norm", "outer.inner", "last"]


def test_nothing_is_computed():
    module = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 1 << 16), nn.BatchNorm1d(1 << 16), nn.Linear(1 << 16, 4))
    before = module[2].running_mean.clone()
    # Activations of 4 TB would not fit.
    atoms = layer_atoms(module, lambda: module(torch.zeros(1 << 24, dtype=torch.long)))
    assert [atom.name for atom in atoms] == ["0", "1", "2", "3"]
    assert torch.equal(module[2].running_mean, before)


def test_an_error_in_the_run_leaves_no_hook():
    module = Twice()

    def run():
        module.first(torch.ones(1, 4))
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        layer_atoms(module, run)
    assert not hooks_of(module)
