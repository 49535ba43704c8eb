"""Stores: a unit's bytes from the module or from files, and what is wrong with files."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from autoflux.errors import DamagedCheckpoint
from autoflux.models.weights import data_ranges, read_tensors, weight_files
from autoflux.runtime.modulation import Modulation
from autoflux.runtime.sources import HostUnits, StagedUnits
from autoflux.runtime.stores import FileStore, KeptStore, ModuleStore, Rows
from autoflux.runtime.streamer import Streamer
from autoflux.runtime.units import Atom, block_atoms, make_units
from tests.runtime.fakes import (
    LISTS,
    Chain,
    LateLane,
    arena_for,
    layer_units,
    output_of,
    read_ahead_threads,
    tiny_inputs,
    tiny_transformer,
)

SOURCES = {"host": HostUnits, "smallest stage": StagedUnits, "large stage": partial(StagedUnits, stage_bytes=1 << 22)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The tiny transformer in float32, in several shards."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_transformer().save_pretrained(folder, max_shard_size="200KB")
    assert len(weight_files(folder)) > 2
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "copy")


def empty_transformer(dtype=torch.float32):
    """Without weights, as `to_empty` leaves it: here with some that are wrong."""
    model = tiny_transformer(seed=99, dtype=dtype)
    for weight in model.parameters():
        weight.data.fill_(float("nan"))
    return model


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def read(store, unit) -> list[torch.Tensor]:
    memory = torch.full((unit.nbytes,), 255, dtype=torch.uint8)
    store.read(unit, memory)
    return [view.clone() for view in unit.views(memory)]


def test_ranges_of_data_are_where_safetensors_reads(saved):
    for file in weight_files(saved):
        content, tensors = file.read_bytes(), load_file(file)
        ranges = data_ranges(file)
        assert set(ranges) == set(tensors) == {tensor.name for tensor in read_tensors(file)}
        for name, (offset, nbytes) in ranges.items():
            assert content[offset : offset + nbytes] == tensors[name].numpy().tobytes()


def test_ranges_leave_out_what_is_no_tensor(tmp_path):
    save_file({"a": torch.arange(3), "b": torch.ones(0)}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    offset, nbytes = data_ranges(tmp_path / "x.safetensors")["a"]
    assert (tmp_path / "x.safetensors").read_bytes()[offset : offset + nbytes] == torch.arange(3).numpy().tobytes()
    assert data_ranges(tmp_path / "x.safetensors")["b"][1] == 0
    assert len(data_ranges(tmp_path / "x.safetensors")) == 2


def test_the_module_itself_is_a_store():
    chain = Chain()
    unit = layer_units(chain)[1]
    assert all(torch.equal(a, b.tensor) for a, b in zip(read(ModuleStore(), unit), unit.pieces, strict=True))


def test_a_kept_store_remembers_what_tensors_were():
    chain, plain = Chain(), Chain()
    units = layer_units(chain)
    store = KeptStore(units)
    for unit in units:
        unit.point_at(torch.zeros(unit.nbytes, dtype=torch.uint8))
    for unit, layer in zip(units, plain.layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(read(store, unit), layer.parameters(), strict=True))


def test_files_give_every_tensor(saved):
    model, plain = empty_transformer(), tiny_transformer()
    (unit,) = make_units([Atom("all", model)], 0)
    store = FileStore(model, weight_files(saved))
    for tensor, wanted in zip(read(store, unit), plain.parameters(), strict=True):
        assert torch.equal(tensor, wanted)
    store.close()
    store.close()


def test_float32_files_fill_a_bf16_module(saved):
    model, plain = empty_transformer(torch.bfloat16), tiny_transformer(dtype=torch.bfloat16)
    (unit,) = make_units([Atom("all", model)], 0)
    for tensor, wanted in zip(read(FileStore(model, weight_files(saved)), unit), plain.parameters(), strict=True):
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, wanted)


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    ],
)
def test_every_format_is_read(tmp_path, dtype):
    wanted = {"x": torch.tensor([[0, 1], [1, 0], [1, 1]]).to(dtype), "one": torch.tensor(1).to(dtype)}
    save_file(wanted, tmp_path / "x.safetensors")
    module = nn.Module()
    for name, tensor in wanted.items():
        module.register_buffer(name, torch.zeros_like(tensor))
    (unit,) = make_units([Atom("all", module)], 0)
    for found, name in zip(read(FileStore(module, [tmp_path / "x.safetensors"]), unit), wanted, strict=True):
        assert torch.equal(found.float(), wanted[name].float())


def test_files_are_only_opened_not_read_when_a_store_is_made(saved):
    before = open_files()
    store = FileStore(tiny_transformer(), weight_files(saved))
    assert open_files() == before + len(weight_files(saved))
    store.close()
    assert open_files() == before


@pytest.mark.parametrize("resident", [(), {1, 3}, range(5)])
@pytest.mark.parametrize("source", SOURCES)
def test_streaming_from_files_gives_the_same_bits(saved, source, resident):
    model, plain = empty_transformer(), tiny_transformer()
    units = make_units(block_atoms(model, LISTS), 0)
    store = FileStore(model, weight_files(saved))
    arena = arena_for(model, units, resident, ring_bytes=200_000, lane=LateLane())
    streamer = Streamer(model, units, arena, resident, store=store, make_source=SOURCES[source])
    for seed in range(3):
        inputs = tiny_inputs(seed=seed)
        assert torch.equal(output_of(model, **inputs), output_of(plain, **inputs))
    streamer.detach()
    store.close()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert not list(read_ahead_threads())


def test_one_store_serves_a_transformer_and_its_modulation(saved):
    model, plain = empty_transformer(), tiny_transformer()
    store = FileStore(model, weight_files(saved))
    modulation = Modulation.taken_from(block_atoms(model, LISTS))
    wanted = Modulation.taken_from(block_atoms(plain, LISTS))
    units = make_units(modulation.atoms(), 0)
    streamer = Streamer(
        modulation, units, arena_for(modulation, units, lane=LateLane()), store=store, make_source=StagedUnits
    )
    embeddings = torch.randn(3, 32)
    with torch.no_grad():
        assert torch.equal(modulation(embeddings), wanted(embeddings))
    streamer.detach()


@pytest.mark.parametrize("make_source", [HostUnits, StagedUnits])
def test_buffers_that_are_not_saved_keep_their_values(tmp_path, make_source):
    class Shifted(nn.Module):
        def __init__(self, shift) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16), requires_grad=False)
            self.register_buffer("shift", torch.full((16,), shift), persistent=False)

        def forward(self, x):
            return x * self.weight + self.shift

    def build():
        torch.manual_seed(0)
        return nn.ModuleDict({"layers": nn.ModuleList(Shifted(float(i)) for i in range(4))})

    def run(module):
        x = torch.ones(16)
        for layer in module["layers"]:
            x = layer(x)
        return x

    plain, module = build(), build()
    save_file(plain.state_dict(), tmp_path / "x.safetensors")
    units = layer_units(module)
    store = FileStore(module, [tmp_path / "x.safetensors"])
    streamer = Streamer(module, units, arena_for(module, units), store=store, make_source=make_source)
    for _ in range(3):
        assert torch.equal(run(module), run(plain))
    streamer.detach()
    assert torch.equal(run(module), run(plain))


def test_a_tied_weight_needs_only_one_of_its_names(tmp_path):
    chain = Chain((8, 8, 8))
    chain.layers[2].weight = chain.layers[0].weight
    state = {name: tensor.clone() for name, tensor in chain.state_dict().items() if name != "layers.0.weight"}
    save_file(state, tmp_path / "x.safetensors")
    wanted = state["layers.2.weight"]
    (unit,) = layer_units(chain, 1 << 20)
    assert torch.equal(read(FileStore(chain, [tmp_path / "x.safetensors"]), unit)[0], wanted)


def test_names_may_differ_from_those_in_the_files(tmp_path):
    chain = Chain((8, 8))
    save_file({f"other.{name}": tensor * 2 for name, tensor in chain.state_dict().items()}, tmp_path / "x.safetensors")
    renamed = {name: f"other.{name}" for name in chain.state_dict()}
    (unit,) = layer_units(chain, 1 << 20)
    found = read(FileStore(chain, [tmp_path / "x.safetensors"], renamed), unit)
    assert all(torch.equal(a, 2 * b) for a, b in zip(found, chain.parameters(), strict=True))


@st.composite
def cuts(draw):
    """How many rows a tensor has, and the places where it is cut."""
    rows = draw(st.integers(1, 12))
    places = draw(st.lists(st.integers(1, max(1, rows - 1)), max_size=4, unique=True))
    return rows, sorted(place for place in places if place < rows)


@settings(deadline=None)
@given(made=st.lists(cuts(), min_size=1, max_size=4), order=st.randoms(use_true_random=False), wide=st.booleans())
def test_a_tensor_may_be_joined_of_rows_of_several(tmp_path_factory, made, order, wide):
    file = tmp_path_factory.mktemp("joined") / "x.safetensors"
    tensors = {f"t{i}": torch.randn(rows, 3) for i, (rows, _) in enumerate(made)}
    save_file(tensors, file)
    parts = [
        Rows(f"t{i}", begin, end)
        for i, (rows, places) in enumerate(made)
        for begin, end in pairwise([0, *places, rows])
    ]
    order.shuffle(parts)
    wanted = torch.cat([tensors[part.name][part.start : part.stop] for part in parts])
    module = nn.Linear(3, len(wanted), bias=False, dtype=torch.float64 if wide else torch.float32)
    store = FileStore(module, [file], joined={"weight": parts})
    (unit,) = make_units([Atom("linear", module)], 0)
    assert torch.equal(read(store, unit)[0], wanted.to(module.weight.dtype))
    store.fill(module)
    store.close()
    assert torch.equal(module.weight, wanted.to(module.weight.dtype))


@pytest.mark.parametrize(
    "parts",
    [
        [Rows("a", 0, 4)],
        [Rows("a", 0, 4), Rows("missing", 0, 4)],
        [Rows("a", 0, 8)],
        [Rows("a", 0, 4), Rows("narrow", 0, 4)],
        [],
    ],
)
def test_rows_that_do_not_make_the_tensor_are_missed(tmp_path, parts):
    save_file({"a": torch.zeros(4, 3), "narrow": torch.zeros(4, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(DamagedCheckpoint, match="lacks the weight 'weight'"):
        FileStore(nn.Linear(3, 8, bias=False), [tmp_path / "x.safetensors"], joined={"weight": parts})


# What is wrong with files


def change(folder: Path, name: str, change_tensors) -> None:
    """Write one of the shards anew, with its tensors changed."""
    index = json.loads(next(folder.glob("*.index.json")).read_text())
    file = folder / index["weight_map"][name]
    tensors = load_file(file)
    change_tensors(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    "changed",
    [
        lambda tensors: tensors.pop("proj_out.weight"),
        lambda tensors: tensors.update({"proj_out.weight": torch.zeros(64, 31)}),
        lambda tensors: tensors.update({"proj_out.weight": torch.zeros(32, 64)}),
        lambda tensors: tensors.update({"proj_out.weight": torch.zeros(64, 32, dtype=torch.complex64)}),
    ],
    ids=["missing", "narrower", "turned", "complex"],
)
def test_a_missing_or_misshapen_tensor_is_told_at_once(copy, changed):
    change(copy, "proj_out.weight", changed)
    before = open_files()
    with pytest.raises(DamagedCheckpoint, match=r"lacks the weight 'proj_out.weight' of shape \(64, 32\)") as raised:
        FileStore(tiny_transformer(), weight_files(copy))
    assert raised.value.hint == "download the model again"
    assert open_files() == before


@pytest.mark.parametrize(
    "spoil", [Path.unlink, lambda file: file.write_bytes(b""), lambda file: os.truncate(file, 900)]
)
def test_a_file_that_cannot_be_read_is_told_at_once(copy, spoil):
    files = weight_files(copy)
    spoil(files[1])
    with pytest.raises(DamagedCheckpoint, match=files[1].name):
        FileStore(tiny_transformer(), files)


@pytest.mark.parametrize("source", SOURCES)
def test_a_file_truncated_in_use_is_an_error_and_not_the_end(copy, source):
    """The weights are read, not mapped: a mapped file that shrinks ends the process."""
    model, plain = empty_transformer(), tiny_transformer()
    units = make_units(block_atoms(model, LISTS), 0)
    files = weight_files(copy)
    contents = {file: file.read_bytes() for file in files}
    store = FileStore(model, files)

    def truncate():
        for file in files:
            os.truncate(file, 2000)

    arena = arena_for(model, units, {1}, ring_bytes=200_000)
    if source == "host":
        truncate()
        with pytest.raises(DamagedCheckpoint, match="ended early"):
            Streamer(model, units, arena, {1}, store=store, make_source=SOURCES[source])
        return
    streamer = Streamer(model, units, arena, {1}, store=store, make_source=SOURCES[source])
    assert torch.equal(output_of(model), output_of(plain))
    truncate()
    with pytest.raises(DamagedCheckpoint, match=r"\.safetensors' ended early") as raised:
        [output_of(model) for _ in range(50)]
    assert raised.value.hint == "it was changed while in use; start again"
    for file, content in contents.items():
        file.write_bytes(content)
    for _ in range(2):
        for _ in range(20):
            # What was read ahead of the repair may still be wrong, once.
            try:
                found = output_of(model)
                break
            except DamagedCheckpoint:
                continue
        assert torch.equal(found, output_of(plain))
    truncate()
    with pytest.raises(DamagedCheckpoint):
        streamer.detach()
    assert not list(read_ahead_threads())


def test_a_folder_in_the_place_of_a_file_is_an_error(tmp_path):
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(DamagedCheckpoint):
        FileStore(Chain(), [tmp_path / "x.safetensors"])
