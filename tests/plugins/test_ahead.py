"""Weights and pinned memory that are there before the networks: the same pictures, and nothing asked for in vain."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from autoflux import Model, Placement, Plan, Precision, Waiting
from autoflux.api import open_session
from autoflux.models.finding import find
from autoflux.models.packs import WEIGHTS, Packed
from autoflux.plugin_manager import load_plugins
from autoflux.runtime import ahead, allocator, bringing, packed, portions, sources
from autoflux.runtime.ahead import Brought, bringing_ahead, weights_ahead
from autoflux.runtime.lanes import DirectLane, Mark
from autoflux.runtime.pack_file import open_pack
from autoflux.runtime.pinned import PinnedAhead, PinnedBuffer, exact_buffer, offered
from autoflux.runtime.portions import Portion, portion
from autoflux.runtime.ring import Arena
from autoflux.runtime.streaming import arena_for
from autoflux.runtime.units import Unit
from tests.plugins.test_packs import BACKENDS, PRECISIONS, drawn, flip, planned, spoil_sources
from tests.plugins.test_packs import packed as pack_all

pytestmark = pytest.mark.usefixtures("shelf")

CPU = torch.device("cpu")


@pytest.fixture
def model(tiny_copy) -> Model:
    return find(str(tiny_copy), {})


def sizes_asked_for(plan: Plan, model: Model, monkeypatch) -> Counter[int]:
    """Of the buffers that units get when the plan is opened."""
    asked: list[int] = []

    def noted(nbytes: int, device: torch.device) -> PinnedBuffer:
        asked.append(nbytes)
        return exact_buffer(nbytes, device)

    monkeypatch.setattr(sources, "exact_buffer", noted)
    drawn(plan, model)
    return Counter(asked)


def told_beforehand(plan: Plan, model: Model) -> Counter[int]:
    portions = []
    for component in model.components:
        opened = open_pack(component, plan.component(component.name))
        assert opened
        portions.append(portion(opened.pack, component, plan))
        opened.close()
    return Counter(unit.nbytes for held in portions for unit in held.pinned)


@pytest.mark.parametrize("storage", PRECISIONS)
@pytest.mark.parametrize("hoists", [True, False])
def test_memory_is_told_beforehand_in_the_sizes_that_are_asked_for(model, shelf, storage, hoists, monkeypatch):
    """By diffusers: DiffSynth joins tensors, and so pads less, but not in FLUX.1, whose widths need no padding."""
    pack_all(model, shelf, storage)
    for resident in ((), (0, 2)):
        plan = planned(model, storage, resident=resident).replace(hoist_modulation=hoists)
        told, asked = told_beforehand(plan, model), sizes_asked_for(plan, model, monkeypatch)
        assert told
        assert told <= asked, "something would be pinned that nobody takes"
        blocks = sum(len(blocks.blocks) for part in model.components for blocks in part.block_lists)
        assert sum(told.values()) >= blocks - len(model.components) * len(resident)


@pytest.mark.parametrize("storage", PRECISIONS)
def test_components_that_stay_take_what_was_brought(model, tiny_copy, shelf, storage, monkeypatch):
    plan = planned(model, storage, placement=Placement.DEVICE)
    wanted = drawn(plan, model)
    pack_all(model, shelf, storage)
    spoil_sources(tiny_copy)
    monkeypatch.setattr(packed, "bring", None)
    monkeypatch.setattr(packed, "in_order", None)  # nothing is read once more
    with bringing_ahead(plan, model) as begun:
        assert begun
        assert np.array_equal(drawn(plan, model), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_that_stay_are_copied_from_what_was_brought(model, shelf, backend):
    pack_all(model, shelf, Precision.INT8)
    plan = planned(model, Precision.INT8, backend=backend, resident=(0, 2)).replace(hoist_modulation=True)
    component = model.component("transformer")
    opened = open_pack(component, plan.component("transformer"))
    assert opened
    staying = {tensor.name for tensor in portion(opened.pack, component, plan).staying}
    assert any(name.startswith("transformer_blocks.0.attn") for name in staying)
    assert not any("transformer_blocks.1." in name or "norm1.linear" in name for name in staying)
    with bringing_ahead(plan, model):
        there = weights_ahead(opened.pack.key).tensors.copy()
        assert there.keys() == staying
        assert not weights_ahead(opened.pack.key).tensors, "they are taken once"
    held = {packed.name: packed for packed in opened.pack.tensors}
    data = opened.weights.read_bytes()
    for name, memory in there.items():
        assert bytes(memory.numpy()) == data[held[name].offset : held[name].offset + held[name].nbytes]
    opened.close()
    assert not weights_ahead(opened.pack.key).tensors, "nothing is brought any more"


def test_what_nobody_asked_for_is_forgotten_once_all_parts_have_their_weights(model, shelf, monkeypatch):
    given: list[Brought] = []

    def noted(key: str) -> Brought:
        given.append(weights_ahead(key))
        return given[-1]

    pack_all(model, shelf, Precision.INT8)
    # One that joins tensors, and so cannot leave them where they are.
    plan = planned(model, Precision.INT8, backend="diffsynth", resident=(0, 2))
    plan = plan.replace(hoist_modulation=True, keep_modulation=True)
    monkeypatch.setattr(packed, "weights_ahead", noted)
    forgotten: list[int] = []
    forget = packed.PackStore.forget_ahead

    def counted(store: packed.PackStore) -> None:
        forgotten.append(sum(len(brought.tensors) for brought in given))
        forget(store)

    monkeypatch.setattr(packed.PackStore, "forget_ahead", counted)
    with bringing_ahead(plan, model), open_session(plan, model, load_plugins()):
        assert max(forgotten) > 0
        assert not any(brought.tensors for brought in given)


@pytest.mark.parametrize("parks", [False, True])
def test_blocks_that_stay_are_left_where_they_were_brought_unless_they_leave_for_a_decode(
    model, tiny_copy, shelf, parks, monkeypatch
):
    plan = planned(model, Precision.INT8, resident=(0, 2))
    plan = plan.replace(hoist_modulation=True, keep_modulation=True, park_for_decode=parks)
    wanted = drawn(plan, model)
    pack_all(model, shelf, Precision.INT8)
    spoil_sources(tiny_copy)
    rooms: list[int] = []

    def noted(*args, **options) -> Arena:
        made = arena_for(*args, **options)
        rooms.append(made.resident.numel())
        return made

    monkeypatch.setattr("autoflux.runtime.placement.arena_for", noted)
    with bringing_ahead(plan, model):
        assert np.array_equal(drawn(plan, model), wanted)
    assert np.array_equal(drawn(plan, model), wanted), "as well if nothing was brought"
    opened = open_pack(model.component("transformer"), plan.component("transformer"))
    assert opened
    staying = sum(tensor.nbytes for tensor in portion(opened.pack, model.component("transformer"), plan).staying)
    opened.close()
    assert (staying == 0) == parks
    assert rooms[1] - rooms[0] >= staying, "nothing that stays is held twice"


@pytest.mark.parametrize("backend", BACKENDS)
def test_modulation_that_stays_is_brought_as_blocks_are_that_stay(model, shelf, backend):
    plan = planned(model, Precision.INT8, backend=backend, resident=(0, 2))
    plan = plan.replace(hoist_modulation=True, keep_modulation=True)
    wanted = drawn(plan, model)
    pack_all(model, shelf, Precision.INT8)
    component = model.component("transformer")
    opened = open_pack(component, plan.component("transformer"))
    assert opened
    held = portion(opened.pack, component, plan)
    opened.close()
    assert any("transformer_blocks.1.norm1.linear" in tensor.name for tensor in held.staying)
    assert not any("norm" in tensor.name and "linear" in tensor.name for unit in held.pinned for tensor in unit.tensors)
    with bringing_ahead(plan, model):
        assert np.array_equal(drawn(plan, model), wanted)


@pytest.mark.parametrize("storage", PRECISIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_modulation_waits_in_the_memory_it_was_read_into(model, tiny_copy, shelf, storage, backend, monkeypatch):
    plan = planned(model, storage, backend=backend, resident=(0, 2)).replace(hoist_modulation=True)
    wanted = drawn(plan, model)
    pack_all(model, shelf, storage)
    spoil_sources(tiny_copy)
    read: list[str] = []

    def noted(store: packed.PackStore, unit: Unit, target: torch.Tensor) -> None:
        read.append(unit.name)
        reading(store, unit, target)

    reading = packed.PackStore.read
    monkeypatch.setattr(packed.PackStore, "read", noted)
    with bringing_ahead(plan, model):
        assert np.array_equal(drawn(plan, model), wanted)
    assert read
    assert not any(".norm" in name for name in read), "it was read once more"
    read.clear()
    assert np.array_equal(drawn(plan, model), wanted)
    assert any(".norm" in name for name in read)


def test_units_that_lie_in_another_way_are_read_again(model, tiny_copy, shelf, monkeypatch):
    plan = planned(model, Precision.BFLOAT16).replace(hoist_modulation=True)
    wanted = drawn(plan, model)
    pack_all(model, shelf, Precision.BFLOAT16)
    spoil_sources(tiny_copy)
    monkeypatch.setattr(portions, "_weight_first", lambda tensor: tensor.name.endswith(".weight"))
    given: list[ahead.Brought] = []

    def noted(key: str) -> ahead.Brought:
        given.append(weights_ahead(key))
        return given[-1]

    monkeypatch.setattr(packed, "weights_ahead", noted)
    with bringing_ahead(plan, model):
        assert np.array_equal(drawn(plan, model), wanted)
    assert given
    assert not any(brought.units or brought.tensors for brought in given), "nobody needs it any more"


def test_a_unit_is_copied_only_if_all_of_it_is_there(model, shelf):
    made = pack_all(model, shelf, Precision.BFLOAT16)["vae"]
    opened = shelf.open(made.key)
    data = opened.weights.read_bytes()
    there = {
        t.name: torch.frombuffer(bytearray(data[t.offset : t.offset + t.nbytes]), dtype=torch.uint8)
        for t in made.tensors[:2]
    }
    network = torch.nn.ParameterDict()
    for tensor in made.tensors[:3]:
        owner = network
        *path, last = tensor.name.split(".")
        for word in path:
            if word not in owner._modules:
                owner.add_module(word, torch.nn.Module())
            owner = owner._modules[word]
        owner.register_parameter(
            last, torch.nn.Parameter(torch.empty(tensor.shape, dtype=torch.bfloat16), requires_grad=False)
        )
    store = packed.PackStore(network, opened, coming=lambda: ahead.Brought(there, {}))
    whole = packed.rest_of(network, ())
    parts = list(bringing.parts_of(whole, 1))
    targets = [torch.full((part.unit.nbytes,), 255, dtype=torch.uint8) for part in parts]
    copied = [store.copy_ahead(part.unit, target) for part, target in zip(parts, targets, strict=True)]
    assert sorted(copied) == [False, True, True]
    assert not any(store.copy_ahead(part.unit, target) for part, target in zip(parts, targets, strict=True))
    for part, target, was_there in zip(parts, targets, copied, strict=True):
        read = torch.full_like(target, 255)
        store.read(part.unit, read)
        assert torch.equal(read, target) == was_there
    store.close()


@pytest.mark.parametrize("how", ["flipped", "cut"])
def test_damage_is_left_to_those_who_read_it_again(model, shelf, how, caplog):
    plan = planned(model, Precision.INT8, placement=Placement.DEVICE)
    wanted = drawn(plan, model)
    pack = pack_all(model, shelf, Precision.INT8)["text_encoder_2"]
    file = shelf.folder(pack.key) / WEIGHTS
    if how == "flipped":
        flip(file, pack.nbytes - 1)
        with bringing_ahead(plan, model):
            assert not weights_ahead(pack.key).tensors
    with bringing_ahead(plan, model):
        if how == "cut":
            with file.open("r+b") as opened:
                opened.truncate(pack.tensors[-1].offset)
        assert np.array_equal(drawn(plan, model), wanted)
    assert how == "cut" or shelf.find(pack.key) is None


def test_nobody_waits_for_what_is_given_up(model, shelf, monkeypatch):
    pack = pack_all(model, shelf, Precision.BFLOAT16)["text_encoder_2"]
    plan = planned(model, Precision.BFLOAT16, placement=Placement.DEVICE)

    def exhausted(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patched:
        patched.setattr(ahead.torch, "empty", exhausted)
        with bringing_ahead(plan, model):
            assert weights_ahead(pack.key) == ({}, {})
    assert shelf.remove(pack.key), "it is not in use any more"


def test_what_nobody_takes_is_let_go(model, shelf):
    made = pack_all(model, shelf, Precision.BFLOAT16)
    plan = planned(model, Precision.BFLOAT16, placement=Placement.DEVICE)
    with pytest.raises(RuntimeError, match="broken"), bringing_ahead(plan, model):
        raise RuntimeError("broken")
    assert all(shelf.remove(pack.key) for pack in made.values())
    assert not weights_ahead(made["vae"].key).tensors


def test_there_is_nothing_ahead_without_packs_and_for_what_is_not_read(model, shelf):
    plan = planned(model, Precision.BFLOAT16, placement=Placement.DEVICE)
    with bringing_ahead(plan, model) as begun:
        assert not begun
    made = pack_all(model, shelf, Precision.BFLOAT16)
    with bringing_ahead(plan, model, unread=("text_encoder_2",)):
        assert not weights_ahead(made["text_encoder_2"].key).tensors
        assert weights_ahead(made["vae"].key).tensors
    on_disk = planned(model, Precision.BFLOAT16, waiting=Waiting.DISK)
    with bringing_ahead(on_disk, model) as begun:
        assert not begun


def test_a_pack_that_is_gone_is_left_to_those_who_read_it_again(model, shelf, monkeypatch):
    made = pack_all(model, shelf, Precision.BFLOAT16)
    plan = planned(model, Precision.BFLOAT16, placement=Placement.DEVICE)
    file = shelf.folder(made["vae"].key) / WEIGHTS

    def gone(path: Path, *, once: bool) -> object:
        if path == file:
            raise FileNotFoundError
        return opened(path, once=once)

    opened = ahead.PackFile
    monkeypatch.setattr(ahead, "PackFile", gone)
    with bringing_ahead(plan, model):
        assert not weights_ahead(made["vae"].key).tensors
        assert weights_ahead(made["text_encoder"].key).tensors


@pytest.mark.parametrize(("free", "limit", "fits"), [(100, None, True), (99, None, False), (500, 99, False)])
def test_blocks_that_stay_come_ahead_only_where_they_fit_twice(model, monkeypatch, free, limit, fits):
    plan = planned(model, Precision.BFLOAT16).replace(device="cuda:0", vram_limit_bytes=limit)
    peak = plan.predicted.peak_vram_bytes.replace(encode=60, denoise=0, decode=0)
    plan = plan.replace(predicted=plan.predicted.replace(peak_vram_bytes=peak))
    held = portion_of(40)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (free, 1000))
    assert ahead._fits_twice(held, plan) == fits


def test_blocks_that_will_lie_as_they_came_need_room_once(model, shelf, monkeypatch):
    pack_all(model, shelf, Precision.BFLOAT16)
    plan = planned(model, Precision.BFLOAT16, resident=(0, 2))
    monkeypatch.setattr(ahead, "_fits_twice", lambda *_: False)
    key = pack_key(model, plan)
    for as_packed in (True, False):
        with bringing_ahead(plan, model, as_packed=as_packed):
            assert bool(weights_ahead(key).tensors) == as_packed
    backends = load_plugins().backends
    assert backends.get("diffusers").as_packed
    assert not getattr(backends.get("diffsynth"), "as_packed", False), "it joins what packs have apart"


@pytest.mark.parametrize(
    ("changes", "options", "as_brought"),
    [
        ({}, "expandable_segments:False", True),
        ({"park_for_decode": True}, "expandable_segments:True", False),
        ({"device": "cuda:0"}, "expandable_segments:True", True),
        ({"device": "cuda:0"}, "expandable_segments:False", False),
        ({"device": "cuda:0"}, "expandable_segments:True,max_split_size_mb:64", False),
    ],
)
def test_what_stays_is_left_where_it_came_if_that_takes_no_more(model, monkeypatch, changes, options, as_brought):
    monkeypatch.setenv(allocator.VARIABLE, options)
    assert portions.holds_as_brought(planned(model, Precision.INT8).replace(**changes)) == as_brought


def test_what_came_of_the_transformer_is_let_go_where_another_pack_is_damaged(model, shelf, monkeypatch):
    plan = planned(model, Precision.INT8, resident=(0, 2))
    wanted = drawn(plan, model)
    made = pack_all(model, shelf, Precision.INT8)
    flip(shelf.folder(made["text_encoder_2"].key) / WEIGHTS, made["text_encoder_2"].nbytes - 1)
    held: list[int] = []

    def noted(*args, **options) -> Arena:
        held.append(sum(len(bringing.brought.tensors) for bringing in ahead._current._bringing.values()))
        return arena_for(*args, **options)

    monkeypatch.setattr("autoflux.runtime.placement.arena_for", noted)
    with bringing_ahead(plan, model):
        assert np.array_equal(drawn(plan, model), wanted)
    assert held[-1] == 0, "it is read from the model's files"


def test_what_is_brought_waits_for_what_still_computes_with_the_memory(model, shelf, monkeypatch):
    done: list[str] = []

    class Noting(DirectLane):
        def set_computed(self, mark: Mark) -> None:
            done.append(f"computed {id(mark)}")

        def copies_wait(self, mark: Mark) -> None:
            assert done[-1] == f"computed {id(mark)}"
            done.append("waited")

        def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
            assert done[-1] in {"waited", "copied"}
            done.append("copied")
            super().copy(target, source)

        def set_copied(self, mark: Mark) -> None:
            done.append("set")

    pack_all(model, shelf, Precision.INT8)
    monkeypatch.setattr(ahead, "lane_for", lambda _device: Noting())
    monkeypatch.setattr(ahead, "READERS", (1, 1))
    plan = planned(model, Precision.INT8, resident=(0, 2))
    with bringing_ahead(plan, model):
        assert weights_ahead(pack_key(model, plan)).tensors
    assert "copied" in done


def pack_key(model: Model, plan: Plan) -> str:
    opened = open_pack(model.component("transformer"), plan.component("transformer"))
    assert opened
    opened.close()
    return opened.pack.key


def portion_of(nbytes: int) -> Portion:
    return Portion(staying=(Packed(name="x", format="U8", shape=(nbytes,), offset=0, nbytes=nbytes),))


def test_without_a_card_nothing_is_brought_to_it(model, shelf, monkeypatch):
    pack_all(model, shelf, Precision.BFLOAT16)
    plan = planned(model, Precision.BFLOAT16, placement=Placement.DEVICE).replace(device="cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with bringing_ahead(plan, model) as begun:
        assert not begun


def test_weights_do_not_wait_for_what_compiles():
    """Which takes a second to import, and which to copy needs as little as libraries that compute."""
    script = "import sys, autoflux.runtime.ahead; print('torch' in sys.modules, 'torch._dynamo' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert ran.stdout.split() == ["True", "False"]


def test_buffers_are_pinned_once_and_in_turn():
    pool = PinnedAhead([10, 20, 10], CPU)
    with offered(pool):
        taken = [exact_buffer(nbytes, CPU) for nbytes in (10, 20, 10, 10, 30)]
    assert [buffer.nbytes for buffer in taken] == [10, 20, 10, 10, 30]
    assert len({id(buffer) for buffer in taken}) == len(taken)
    pool.close()
    assert pool.take(10) is None


def test_pinning_ends_where_no_more_can_be_pinned(monkeypatch):
    monkeypatch.setattr("autoflux.runtime.pinned._host_bytes", lambda nbytes, _device: (torch.zeros(nbytes), False))
    pool = PinnedAhead([10] * 50, CPU, threads=1)
    for thread in pool._threads:
        thread.join()
    assert len(pool._ready) == 1
    pool.close()


def test_nobody_waits_for_memory_that_is_not_to_be_had(monkeypatch):
    def exhausted(nbytes: int, device: torch.device) -> PinnedBuffer:
        raise MemoryError

    monkeypatch.setattr("autoflux.runtime.pinned.PinnedBuffer", exhausted)
    pool = PinnedAhead([10, 20], CPU)
    assert pool.take(20) is None
    assert pool.take(10) is None
    pool.close()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("storage", PRECISIONS)
def test_on_a_card_what_comes_ahead_draws_the_same_picture(model, shelf, storage, backend, monkeypatch):
    taken: list[int] = []

    def noted(key: str) -> ahead.Brought:
        found = weights_ahead(key)
        taken.append(len(found.tensors))
        return found

    pack_all(model, shelf, storage)
    every = tuple(range(sum(len(blocks.blocks) for blocks in model.component("transformer").block_lists)))
    for placement, resident, keep in (
        (Placement.STREAMED, every, True),
        (Placement.STREAMED, every, False),
        (Placement.STREAMED, (0, 2), False),
        (Placement.DEVICE, (), False),
    ):
        if placement == Placement.DEVICE and storage != Precision.BFLOAT16:
            continue
        plan = planned(model, storage, backend=backend, placement=placement, resident=resident)
        hoists = placement == Placement.STREAMED
        plan = plan.replace(device="cuda:0", hoist_modulation=hoists, keep_modulation=keep)
        monkeypatch.setattr(packed, "weights_ahead", lambda _key: Brought({}, {}))
        wanted = drawn(plan, model)
        monkeypatch.setattr(packed, "weights_ahead", noted)
        assert np.array_equal(drawn(plan, model), wanted)
        assert any(taken)
