"""Compiled blocks: what brings their weights stays outside, and nothing is left when it is undone."""

from __future__ import annotations

import threading

import pytest
import torch

from autoflux.runtime.compiling import compile_blocks
from autoflux.runtime.modulation import Modulation
from autoflux.runtime.streamer import Streamer
from autoflux.runtime.units import block_atoms, make_units
from tests.runtime.fakes import LISTS, Chain, LateLane, arena_for, output_of, tiny_inputs, tiny_transformer


@pytest.fixture(autouse=True)
def _compile_anew():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Counting:
    """A backend that compiles nothing and counts what it is given."""

    def __init__(self) -> None:
        self.graphs: list[list[str]] = []

    def __call__(self, graph, _examples):
        self.graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward


def test_hooks_stay_outside():
    """They could not be inside: `fullgraph` refuses to compile a lock, and a hook that is traced runs only once."""
    chain, plain, x = Chain((16, 16, 16)), Chain((16, 16, 16)), torch.ones(1, 16)
    seen = []
    lock = threading.Lock()

    def hook(*_):
        with lock:
            seen.append(torch.compiler.is_compiling())

    for layer in chain.layers:
        layer.register_forward_pre_hook(hook)
        layer.register_forward_hook(hook)
    backend = Counting()
    compile_blocks(chain.layers, backend=backend)
    for _ in range(3):
        assert torch.equal(chain(x), plain(x))
    assert backend.graphs
    assert seen == [False] * 18


def test_inputs_of_many_kinds_are_no_error():
    chain, backend = Chain((16, 16)), Counting()
    compile_blocks(chain.layers, backend=backend)
    for dimensions in range(1, 13):
        assert chain(torch.ones((1,) * dimensions + (16,))).dim() == dimensions + 1
    assert len(backend.graphs) == 12


def test_undoing_leaves_no_attribute():
    chain = Chain((16, 16))
    before = [dict(vars(layer)) for layer in chain.layers]
    undo = compile_blocks(chain.layers, backend="eager")
    assert all("forward" in vars(layer) for layer in chain.layers)
    undo()
    assert [dict(vars(layer)) for layer in chain.layers] == before
    assert "forward" not in vars(chain.layers[0])
    assert torch.equal(chain(torch.ones(1, 16)), Chain((16, 16))(torch.ones(1, 16)))


def test_options_reach_the_compiler():
    def breaks(module):
        original = type(module).forward

        class Broken(type(module)):
            def forward(self, x):
                torch._dynamo.graph_break()
                return original(self, x)

        module.__class__ = Broken

    chain, x = Chain((16,)), torch.ones(1, 16)
    breaks(chain.layers[0])
    undo = compile_blocks(chain.layers, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        chain(x)
    undo()
    compile_blocks(chain.layers, backend="eager", fullgraph=False)
    assert chain(x).shape == (1, 16)


def test_streamed_compiled_blocks_give_the_same_bits_and_share_a_compilation():
    resident = {1, 3}
    model, plain = tiny_transformer(), tiny_transformer()
    blocks = block_atoms(model, LISTS)
    units = make_units(blocks, 0)
    streamer = Streamer(model, units, arena_for(model, units, resident, lane=LateLane()), resident)
    backend = Counting()
    undo = compile_blocks((block.module for block in blocks), backend=backend)
    for seed in range(3):
        inputs = tiny_inputs(seed=seed)
        assert torch.equal(output_of(model, **inputs), output_of(plain, **inputs))
    # One for double blocks, and two for single ones: the first gets tensors that lie otherwise in memory.
    assert len(backend.graphs) == 3
    assert not any("copy_" in target for graph in backend.graphs for target in graph)
    undo()
    streamer.detach()
    assert not any("forward" in vars(block.module) for block in blocks)
    assert torch.equal(output_of(model), output_of(plain))


def test_steps_with_hoisted_modulation_compile_once():
    model, plain = tiny_transformer(), tiny_transformer()
    blocks = block_atoms(model, LISTS)
    modulation = Modulation.taken_from(blocks)
    units = make_units(blocks, 0)
    streamer = Streamer(model, units, arena_for(model, units, lane=LateLane()))
    backend = Counting()
    undo = compile_blocks((block.module for block in blocks), backend=backend)
    for time in (0.9, 0.5, 0.2):
        inputs = tiny_inputs(times=(time,))
        with torch.no_grad():
            embedding = model.time_text_embed(
                inputs["timestep"] * 1000, inputs["guidance"] * 1000, inputs["pooled_projections"]
            )
            modulation.select(modulation(embedding))
        assert torch.equal(output_of(model, **inputs), output_of(plain, **inputs))
    assert len(backend.graphs) == 3
    undo()
    streamer.detach()
    modulation.restore()
    assert torch.equal(output_of(model), output_of(plain))
