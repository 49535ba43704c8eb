"""All parts of the engine together: a transformer prepared, attached, run and given back."""

from __future__ import annotations

import mmap

import pytest
import torch

from autoflux.errors import DamagedCheckpoint
from autoflux.models.values import Precision
from autoflux.planning.footprint import WIDE_BLOCKS
from autoflux.planning.schedule import aligned
from autoflux.planning.terms import Placement
from autoflux.runtime.order import layer_atoms
from autoflux.runtime.quantized import QuantizedLinear, quantize_linears
from autoflux.runtime.residence import Residence
from autoflux.runtime.stores import AheadStore, KeptStore
from autoflux.runtime.streaming import (
    Holding,
    StreamedModule,
    StreamedTransformer,
    arena_for,
    load_narrow,
    narrow_blocks,
)
from autoflux.runtime.units import Unit, block_atoms, make_units, rest_of, sequence_atoms
from tests.runtime.fakes import CPU, LISTS, tiny_inputs, tiny_transformer


def embedding_of(model, inputs) -> torch.Tensor:
    return model.time_text_embed(inputs["timestep"] * 1000, inputs["guidance"] * 1000, inputs["pooled_projections"])


@torch.no_grad()
def run(made: StreamedTransformer, model, inputs) -> torch.Tensor:
    if made.holding.hoist:
        made.select(made.modulation([embedding_of(model, inputs)]))
    return model(**inputs)[0]


@pytest.mark.parametrize("holding", [Holding(hoist=False), Holding(), Holding(resident=frozenset({0, 3}))])
@pytest.mark.parametrize("block_bytes", [0, 200_000, 1 << 30])
def test_the_output_is_that_of_the_plain_transformer_and_everything_is_put_back(holding, block_bytes):
    model, inputs = tiny_transformer(), tiny_inputs()
    with torch.no_grad():
        expected = model(**inputs)[0]
    names = list(model.state_dict())
    resident = holding.resident if block_bytes == 0 else frozenset()
    made = StreamedTransformer(
        model, LISTS, Holding(resident=resident, hoist=holding.hoist, block_bytes=block_bytes), CPU
    )
    arena = arena_for(made.parts, 0, CPU)
    made.attach(arena)
    for _ in range(2):
        assert torch.equal(run(made, model, inputs), expected)
    made.detach()
    assert list(model.state_dict()) == names
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], expected)


def test_modulation_that_stays_is_not_copied_again_and_computes_the_same():
    model, inputs = tiny_transformer(), tiny_inputs()
    with torch.no_grad():
        expected = model(**inputs)[0]
    plain = StreamedTransformer(tiny_transformer(), LISTS, Holding(), CPU)
    made = StreamedTransformer(model, LISTS, Holding(resident=frozenset(range(5)), keep_modulation=True), CPU)
    blocks, modulation = made.parts
    assert modulation.largest_streamed == 0
    assert plain.parts[1].largest_streamed > 0
    arena = arena_for(made.parts, 400_000, CPU)
    assert arena.ring.memory.numel() == 0, "nothing passes through it"
    assert arena.nbytes == blocks.staying_bytes + modulation.staying_bytes
    made.attach(arena)
    for _ in range(2):
        assert torch.equal(run(made, model, inputs), expected)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("storage", [Precision.INT8, Precision.FLOAT8])
def test_narrow_weights_are_streamed_narrow_and_compute_as_they_do_in_place(storage, native):
    plain, model, inputs = tiny_transformer(), tiny_transformer(), tiny_inputs()
    for lists in LISTS:
        for block in plain.get_submodule(lists):
            quantize_linears(block, storage, native=native, keep=lambda name, _linear: "norm" in name)
    with torch.no_grad():
        expected = plain(**inputs)[0]
    wide = StreamedTransformer(tiny_transformer(), LISTS, Holding(), CPU)
    made = StreamedTransformer(model, LISTS, Holding(storage=storage, native=native), CPU)
    assert made.blocks.largest_streamed < 0.5 * wide.blocks.largest_streamed
    made.attach(arena_for(made.parts, 0, CPU))
    assert torch.equal(run(made, model, inputs), expected)
    kinds = {type(m) for n, m in model.named_modules() if n.endswith(("to_q", "proj_mlp"))}
    assert kinds == {QuantizedLinear}


def test_the_smallest_setting_holds_one_layer():
    model, inputs = tiny_transformer(), tiny_inputs()
    with torch.no_grad():
        expected = model(**inputs)[0]
    atoms = layer_atoms(model, lambda: model(**{k: _fake(v) for k, v in inputs.items()}))
    made = StreamedTransformer(model, LISTS, Holding(hoist=False), CPU, atoms=atoms)
    arena = arena_for(made.parts, 0, CPU)
    largest = max(sum(aligned(p.numel() * p.element_size()) for p in atom.module.parameters()) for atom in atoms)
    assert arena.nbytes == largest
    made.attach(arena)
    assert torch.equal(run(made, model, inputs), expected)


def test_an_arena_has_room_for_what_stays_of_all_and_the_largest_that_passes():
    first = StreamedModule(torch.nn.ModuleList([torch.nn.Linear(64, 64), torch.nn.Linear(64, 8)]), [])
    second_module = torch.nn.ModuleList([torch.nn.Linear(64, 64), torch.nn.Linear(64, 8)])
    second = StreamedModule(second_module, sequence_atoms(second_module), resident={1})
    arena = arena_for([first, second], 100, CPU)
    assert arena.resident.numel() == first.staying_bytes + second.staying_bytes
    assert arena.ring.memory.numel() == second.largest_streamed == aligned(4 * 64 * 64) + aligned(4 * 64)
    assert arena_for([first], 100, CPU).ring.memory.numel() == 0


class AlreadyThere(KeptStore):
    """Has one unit on the device, in memory of its own."""

    def __init__(self, units, there) -> None:
        super().__init__(units)
        self.there = there

    def point_ahead(self, unit, device) -> bool:
        if unit.name != self.there:
            return False
        for piece in unit.pieces:
            piece.tensor.data = piece.tensor.data.clone()
        return True

    def copy_ahead(self, unit, target) -> bool:
        return False

    def forget_ahead(self) -> None: ...

    def buffer_ahead(self, unit) -> None: ...


@pytest.mark.parametrize("there", ["single_transformer_blocks.1", "rest"])
def test_what_stays_and_is_there_already_takes_no_room_and_computes_the_same(there):
    model, inputs = tiny_transformer(), tiny_inputs()
    with torch.no_grad():
        expected = model(**inputs)[0]
    made = StreamedModule(model, block_atoms(model, LISTS), resident={0, 3}, wraps=True)
    store = AlreadyThere([*made.units, rest_of(model, made.units)], there)
    assert isinstance(store, AheadStore)
    whole = made.staying_bytes
    made.place_ahead(store, CPU)
    (placed,) = [unit for unit in [*made.units, rest_of(model, made.units)] if unit.name == there]
    assert made.staying_bytes == whole - placed.nbytes
    made.attach(arena_for([made], 0, CPU), store=store)
    assert made.streamer.resident_bytes == whole
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(**inputs)[0], expected)
    made.detach()
    assert made.staying_bytes == whole
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], expected)


def _fake(value):
    return torch.empty_like(value) if isinstance(value, torch.Tensor) else value


class WatchedStore:
    """A store that knows which memory it wrote each unit to."""

    def __init__(self, network) -> None:
        self.kept = KeptStore([whole_of(network)])
        self.written: dict[int, int] = {}
        """Address and bytes of memory that units of several tensors were written to."""
        self.closed = False

    def read(self, unit, target) -> None:
        self.kept.read(unit, target)
        if unit.atoms:
            memory = target.untyped_storage()
            self.written[memory.data_ptr()] = memory.nbytes()

    def close(self) -> None:
        self.closed = True


def whole_of(network) -> Unit:
    found = rest_of(network, [])
    assert found is not None
    return found


@pytest.mark.parametrize("storage", [Precision.INT8, Precision.FLOAT8])
def test_weights_are_read_and_narrowed_block_by_block(storage):
    network, wanted = tiny_transformer(), tiny_transformer()
    narrow_blocks(block_atoms(wanted, LISTS), storage, native=False, device=CPU)
    largest = max(unit.nbytes for unit in make_units(block_atoms(network, LISTS), 0))
    store = WatchedStore(network)
    wide = whole_of(network).nbytes
    for parameter in network.parameters():
        parameter.data = torch.full_like(parameter, torch.nan)
    load_narrow(network, block_atoms(network, LISTS), store, storage, native=False, device=CPU)
    assert network.state_dict().keys() == wanted.state_dict().keys()
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor.float(), wanted.state_dict()[name].float()), name
    # Wide are two blocks at most, never the whole, and nothing is left where they were.
    assert 1 <= len(store.written) <= WIDE_BLOCKS
    assert max(store.written.values()) < largest + 2 * mmap.PAGESIZE
    assert sum(store.written.values()) < wide
    kept = {tensor.untyped_storage().data_ptr() for tensor in network.state_dict().values()}
    assert not kept & store.written.keys()


def test_what_cannot_be_read_ends_narrowing():
    class Broken(WatchedStore):
        def read(self, unit, target) -> None:
            raise DamagedCheckpoint("broken", hint="none")

    network = tiny_transformer()
    with pytest.raises(DamagedCheckpoint):
        load_narrow(network, block_atoms(network, LISTS), Broken(network), Precision.INT8, native=False, device=CPU)


def test_what_the_processor_computes_stays_in_ram():
    elsewhere = torch.device("meta")
    layer, other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    residence, on_device = Residence(layer, Placement.HOST, elsewhere), Residence(other, Placement.DEVICE, elsewhere)
    assert (residence.device, on_device.device) == (CPU, elsewhere)
    with residence.on_device() as module:
        assert module(torch.ones(4)).device == CPU
    assert other.weight.device == elsewhere
