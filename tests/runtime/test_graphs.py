"""Blocks replayed from recordings: the same results, whatever order inputs come in, and nothing left afterwards."""

from __future__ import annotations

import logging
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from autoflux.runtime.graphs import BlockGraphs
from autoflux.runtime.modulation import Modulation
from autoflux.runtime.units import block_atoms
from tests.runtime.fakes import LISTS, Chain, output_of, tiny_inputs, tiny_transformer

STEPS = (1.0, 0.7, 0.35, 0.05)


class Undone(TorchDispatchMode):
    """Takes back what is written into memory that was there before."""

    def __init__(self) -> None:
        super().__init__()
        self._before = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.copy_.default:
            self._before.append((args[0], args[0].clone()))
        return function(*args, **(kwargs or {}))

    def __exit__(self, *error):
        super().__exit__(*error)
        for tensor, before in reversed(self._before):
            tensor.copy_(before)


class FakeTape:
    """Does the recorded work again when it is replayed; recording it leaves everything, as on a card, as it was."""

    def __init__(self, fails_at: int | None = None) -> None:
        self._alive = []
        self.recorded = self.replayed = self.rewound = 0
        self._fails_at = fails_at

    def record(self, work):
        self.recorded += 1
        if self.recorded == self._fails_at:
            raise RuntimeError("operation not permitted while capturing")
        with Undone():
            work()

        def replay():
            self.replayed += 1
            work()

        self._alive.append(weakref.ref(replay))
        return replay

    def rewind(self):
        self.rewound += 1
        assert not any(replay() for replay in self._alive), "its memory is still held"


@pytest.fixture
def tape():
    return FakeTape()


def blocks_of(model):
    return [atom.module for atom in block_atoms(model, LISTS)]


def at(time, seed=0, batch=1):
    return tiny_inputs(batch, seed=seed, times=(time,) * batch)


def test_steps_have_the_same_bits_and_only_the_first_is_launched(tape):
    plain, model = tiny_transformer(), tiny_transformer()
    graphs = BlockGraphs(blocks_of(model), tape)
    for seed, time in enumerate(STEPS):
        assert torch.equal(output_of(model, **at(time, seed)), output_of(plain, **at(time, seed)))
    assert (tape.recorded, tape.replayed) == (5, 15)
    graphs.undo()
    assert torch.equal(output_of(model), output_of(plain))
    assert tape.replayed == 15


def test_what_blocks_read_from_the_same_memory_in_each_step_is_read_anew(tape):
    plain, model = tiny_transformer(), tiny_transformer()
    modulation = Modulation.taken_from(block_atoms(model, LISTS))
    with torch.no_grad():
        given = [at(time) for time in STEPS]
        embeddings = [
            model.time_text_embed(one["timestep"] * 1000, one["guidance"] * 1000, one["pooled_projections"])
            for one in given
        ]
        rows = modulation(torch.cat(embeddings))
    BlockGraphs(blocks_of(model), tape)
    for step, one in enumerate(given):
        modulation.select(rows[step : step + 1])
        assert torch.equal(output_of(model, **one), output_of(plain, **one))
    assert tape.replayed == 15


def test_another_size_ends_all_recordings(tape):
    plain, model = tiny_transformer(), tiny_transformer()
    BlockGraphs(blocks_of(model), tape)
    for batch in (1, 1, 2, 2, 2, 1, 1):
        assert torch.equal(output_of(model, **at(0.5, batch=batch)), output_of(plain, **at(0.5, batch=batch)))
    assert (tape.recorded, tape.replayed, tape.rewound) == (15, 20, 2)


def test_sizes_in_turns_are_never_recorded(tape):
    model = tiny_transformer()
    BlockGraphs(blocks_of(model), tape)
    for batch in (1, 2) * 3:
        output_of(model, **at(0.5, batch=batch))
    assert tape.recorded == 0


def test_what_was_forgotten_is_recorded_anew(tape):
    plain, model = tiny_transformer(), tiny_transformer()
    graphs = BlockGraphs(blocks_of(model), tape)
    for turn in range(2):
        for time in STEPS:
            assert torch.equal(output_of(model, **at(time)), output_of(plain, **at(time)))
        graphs.forget()
        assert (tape.recorded, tape.rewound) == (5 * (turn + 1), turn + 1)


@pytest.mark.parametrize("fails_at", [1, 4])
def test_what_cannot_be_recorded_is_launched(fails_at, caplog):
    tape = FakeTape(fails_at)
    plain, model = tiny_transformer(), tiny_transformer()
    BlockGraphs(blocks_of(model), tape)
    with caplog.at_level(logging.WARNING):
        for time in STEPS:
            assert torch.equal(output_of(model, **at(time)), output_of(plain, **at(time)))
    (told,) = [record.getMessage() for record in caplog.records]
    assert told == "blocks are not replayed from CUDA graphs but launched: operation not permitted while capturing"
    assert (tape.recorded, tape.rewound) == (fails_at, 1)


def test_an_error_of_a_block_comes_through_and_leaves_it_usable(tape):
    chain, plain = Chain((16, 16)), Chain((16, 16))
    BlockGraphs(chain.layers, tape)
    with pytest.raises(RuntimeError, match="shapes"):
        chain(torch.ones(1, 5))
    x = torch.ones(1, 16)
    for _ in range(3):
        assert torch.equal(chain(x), plain(x))


def test_undoing_puts_back_what_was_in_the_place_of_forward(tape):
    chain = Chain((16, 16))
    first, second = chain.layers
    first.forward = compiled = first.forward
    graphs = BlockGraphs(chain.layers, tape)
    graphs.undo()
    assert vars(first)["forward"] is compiled
    assert "forward" not in vars(second)


class Swapping(nn.Module):
    """Gives one input back as it is, in the place of the other, and a sum of both."""

    def forward(self, a, b, *, factor=1.0):
        return b, (a + factor * b), None


def test_inputs_given_back_are_not_mixed_up(tape):
    """Also of one shape, where each could lie in the other's place."""
    block, plain = Swapping(), Swapping()
    BlockGraphs([block], tape)
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    x, y = a, b
    for _ in range(6):
        a, b, nothing = block(a, b, factor=0.5)
        x, y, _ = plain(x, y, factor=0.5)
        assert nothing is None
        assert torch.equal(a, x)
        assert torch.equal(b, y)
    assert tape.replayed == 5


def test_another_value_that_is_no_tensor_is_another_shape(tape):
    block, plain = Swapping(), Swapping()
    BlockGraphs([block], tape)
    a, b = torch.ones(2), torch.ones(2)
    for factor in (0.5, 0.5, 2.0, 2.0, 2.0):
        assert torch.equal(block(a, b, factor=factor)[1], plain(a, b, factor=factor)[1])
    assert tape.rewound == 1


class Copies(TorchDispatchMode):
    """Counts how often one tensor is copied."""

    def __init__(self, tensor) -> None:
        super().__init__()
        self._tensor = tensor
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.copy_.default:
            self.count += args[1] is self._tensor
        return function(*args, **(kwargs or {}))


def test_a_tensor_given_to_all_blocks_is_copied_once(tape):
    class Adding(nn.Module):
        def forward(self, hidden, positions):
            return hidden + positions.sum()

    blocks = [Adding() for _ in range(4)]
    BlockGraphs(blocks, tape)
    positions = torch.ones(3)
    with Copies(positions) as copies:
        for _ in range(4):
            hidden = torch.ones(2)
            for block in blocks:
                hidden = block(hidden, positions)
            assert hidden.tolist() == [13.0, 13.0]
    assert (tape.replayed, copies.count) == (12, 1)
