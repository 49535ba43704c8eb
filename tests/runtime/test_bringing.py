"""Weights brought to a device for good: in parts, in order, and nothing under way when it fails."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from autoflux.errors import DamagedPack
from autoflux.runtime.bringing import bring, parts_of
from autoflux.runtime.units import rest_of
from tests.runtime.fakes import CPU, LateLane


class Numbers(nn.Module):
    """Tensors of these many numbers, each full of its own."""

    def __init__(self, counts: list[int]) -> None:
        super().__init__()
        for i, count in enumerate(counts):
            self.register_buffer(f"t{i}", torch.full((count,), float(i + 1)))


class Filling:
    """Writes what the tensors are full of; fails at the tensor of that number."""

    def __init__(self, module: nn.Module, fails_at: int | None = None) -> None:
        self.numbers = {id(t): float(i + 1) for i, t in enumerate(module.buffers())}
        self.fails_at = fails_at

    def read(self, unit, target) -> None:
        for view, piece in zip(unit.views(target), unit.pieces, strict=True):
            if self.numbers[id(piece.tensor)] == self.fails_at:
                raise DamagedPack("broken", hint="none")
            view.fill_(self.numbers[id(piece.tensor)])

    def close(self) -> None: ...


@given(counts=st.lists(st.integers(1, 3000), min_size=1, max_size=30), most=st.integers(1, 20_000))
def test_parts_are_the_whole_in_order_and_no_larger_than_asked(counts, most):
    whole = rest_of(Numbers(counts), ())
    parts = list(parts_of(whole, most))
    assert [p.tensor for part in parts for p in part.unit.pieces] == [p.tensor for p in whole.pieces]
    assert sum(part.unit.nbytes for part in parts) == whole.nbytes
    begins = [(part.begin + p.offset) for part in parts for p in part.unit.pieces]
    assert begins == [p.offset for p in whole.pieces]
    for part in parts:
        used = part.unit.pieces[-1].offset + part.unit.pieces[-1].nbytes
        assert used <= most or len(part.unit.pieces) == 1
    for one, other in pairwise(parts):
        joined = other.begin + other.unit.pieces[0].nbytes - one.begin
        assert joined > most  # no part could have taken the next tensor


def brought(counts: list[int], fails_at: int | None = None) -> tuple[Numbers, torch.Tensor]:
    module = Numbers(counts)
    whole = rest_of(module, ())
    memory = torch.zeros(whole.nbytes, dtype=torch.uint8)
    parts = list(parts_of(whole, 4096))
    targets = [(part.unit, memory[part.begin : part.begin + part.unit.nbytes]) for part in parts]
    bring(Filling(module, fails_at), targets, CPU, LateLane())
    whole.point_at(memory)
    return module, memory


@pytest.mark.parametrize("count", [1, 3, 4, 5, 40])
def test_everything_arrives_whatever_the_number_of_buffers(count):
    module, _ = brought([700] * count)
    for i, tensor in enumerate(module.buffers()):
        assert torch.equal(tensor, torch.full((700,), float(i + 1)))


def test_what_the_store_raises_is_raised():
    with pytest.raises(DamagedPack):
        brought([700] * 40, fails_at=17)


class PartlyThere(Filling):
    """Has the first tensors on the device already, and gives each of them away once."""

    def __init__(self, module: nn.Module, there: int) -> None:
        super().__init__(module)
        self.there = {key for key, number in self.numbers.items() if number <= there}
        self.read_from: list[float] = []

    def read(self, unit, target) -> None:
        self.read_from += [self.numbers[id(piece.tensor)] for piece in unit.pieces]
        super().read(unit, target)

    def point_ahead(self, unit, device) -> bool:
        raise AssertionError("what is brought has its place")

    def copy_ahead(self, unit, target) -> bool:
        keys = {id(piece.tensor) for piece in unit.pieces}
        if not keys <= self.there:
            return False
        self.there -= keys
        super().read(unit, target)
        return True

    def forget_ahead(self) -> None:
        self.there.clear()

    def buffer_ahead(self, unit) -> None: ...


def test_what_is_there_is_not_read_by_any_of_several_that_are_brought_in_turn():
    """As blocks and modulation are, from one store."""
    module = Numbers([700] * 9)
    store = PartlyThere(module, there=7)
    whole = rest_of(module, ())
    memory = torch.zeros(whole.nbytes, dtype=torch.uint8)
    targets = [(part.unit, memory[part.begin : part.begin + part.unit.nbytes]) for part in parts_of(whole, 2048)]
    for some in (targets[:4], targets[4:]):
        bring(store, some, CPU, LateLane())
    whole.point_at(memory)
    assert all(torch.equal(t, torch.full((700,), float(i + 1))) for i, t in enumerate(module.buffers()))
    assert sorted(store.read_from) == [8.0, 9.0]
