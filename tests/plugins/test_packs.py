"""Pictures from packed weights, against those of weights that are read and narrowed while loading."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from autoflux.plugins import diffusers_loading
from safetensors.torch import load_file, save_file

from autoflux import ContradictoryWishes, DamagedPack, Model, Offload, Placement, Plan, Precision, Waiting
from autoflux.api import open_session
from autoflux.models.finding import find
from autoflux.models.pack_shelf import Shelf
from autoflux.models.packs import INDEX, WEIGHTS, Pack, Recipe, recipes
from autoflux.plugin_manager import load_plugins
from autoflux.runtime.packing import pack_component
from autoflux.testing import fake_plan
from tests.refusals import refuse

PROMPT = "two large green squares above the small yellow star"
PRECISIONS = [Precision.BFLOAT16, Precision.INT8, Precision.FLOAT8]
BACKENDS = ["diffusers", "diffsynth"]


pytestmark = pytest.mark.usefixtures("shelf")


def planned(
    model: Model, storage: Precision, *, backend="diffusers", placement=Placement.STREAMED, native=False, **held
) -> Plan:
    """Everything in one placement, and only the transformer's blocks in `storage`."""
    parts = tuple(
        part.replace(
            storage=storage if part.name == "transformer" else Precision.BFLOAT16,
            arithmetic=Precision.BFLOAT16,
            native=native and part.name == "transformer",
            placement=placement,
            **held,
        )
        for part in fake_plan(model).components
    )
    return fake_plan(model).replace(backend=backend, offload=Offload.STREAM, components=parts, ring_bytes=400_000)


def drawn(plan: Plan, model: Model) -> np.ndarray:
    with open_session(plan, model, load_plugins()) as session:
        return np.asarray(session.generate(PROMPT, seed=5, steps=2)[0].image)


def packed(model: Model, shelf: Shelf, storage: Precision) -> dict[str, Pack]:
    made = [pack_component(recipe, model, shelf) for recipe in recipes(model, storage, Precision.BFLOAT16)]
    return {pack.component: pack for pack in made}


def spoil_sources(folder: Path) -> None:
    """Replace every weight of the model by others without changing headers, sizes and times."""
    for file in folder.rglob("*.safetensors"):
        before = file.stat()
        save_file({name: tensor * 0 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
        assert file.stat().st_size == before.st_size
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("storage", PRECISIONS)
def test_packed_weights_draw_the_same_picture_wherever_they_wait(tiny_copy, shelf, storage, backend):
    model = find(str(tiny_copy), {})
    wanted = drawn(planned(model, storage, backend=backend), model)
    packed(model, shelf, storage)
    spoil_sources(tiny_copy)
    for waiting in Waiting:
        plan = planned(model, storage, backend=backend, waiting=waiting)
        assert np.array_equal(drawn(plan, model), wanted), waiting
        hoisted = plan.replace(hoist_modulation=True, park_for_decode=True)
        assert np.array_equal(drawn(hoisted, model), wanted), waiting


@pytest.mark.parametrize("placement", [Placement.DEVICE, Placement.VISITING])
@pytest.mark.parametrize("storage", PRECISIONS)
def test_packed_weights_that_stay_whole_draw_the_same_picture(tiny_copy, shelf, storage, placement):
    model = find(str(tiny_copy), {})
    wanted = drawn(planned(model, storage), model)
    packed(model, shelf, storage)
    spoil_sources(tiny_copy)
    assert np.array_equal(drawn(planned(model, storage, placement=placement), model), wanted)


@pytest.mark.parametrize("storage", [Precision.INT8, Precision.FLOAT8])
def test_multiplied_in_8_bits_it_is_the_same_picture_too(tiny_copy, shelf, storage):
    model = find(str(tiny_copy), {})
    plan = planned(model, storage, native=True)
    wanted = drawn(plan, model)
    assert not np.array_equal(wanted, drawn(planned(model, storage), model))
    packed(model, shelf, storage)
    spoil_sources(tiny_copy)
    assert np.array_equal(drawn(plan, model), wanted)


def test_text_encoders_are_tried_while_the_transformer_comes_from_its_pack(tiny_copy, shelf, monkeypatch):
    tried: list[Plan] = []
    monkeypatch.setattr(diffusers_loading, "encode_once", lambda _pipe, plan: tried.append(plan))
    model = find(str(tiny_copy), {})
    plan = planned(model, Precision.INT8, resident=(0, 1))
    drawn(plan, model)
    assert not tried, "nothing else is to be waited for"
    packed(model, shelf, Precision.INT8)
    drawn(plan, model)
    assert tried == [plan]


def test_eight_bits_wait_on_the_disk_only_in_a_pack(tiny_copy, shelf):
    model = find(str(tiny_copy), {})
    plan = planned(model, Precision.INT8, waiting=Waiting.DISK)
    with pytest.raises(ContradictoryWishes, match="wait on the disk"):
        drawn(plan, model)
    packed(model, shelf, Precision.INT8)
    assert drawn(plan, model).shape == (64, 64, 3)


def test_a_pack_of_another_precision_is_not_used(tiny_copy, shelf):
    model = find(str(tiny_copy), {})
    wanted = drawn(planned(model, Precision.BFLOAT16), model)
    pack = packed(model, shelf, Precision.INT8)["transformer"]
    flip(shelf.folder(pack.key) / WEIGHTS, pack.nbytes // 2)
    assert np.array_equal(drawn(planned(model, Precision.BFLOAT16), model), wanted)
    assert shelf.find(pack.key)


def test_packs_are_left_alone_when_they_are_not_wanted(tiny_copy, shelf, monkeypatch):
    model = find(str(tiny_copy), {})
    pack = packed(model, shelf, Precision.INT8)["transformer"]
    flip(shelf.folder(pack.key) / WEIGHTS, pack.nbytes // 2)
    monkeypatch.setenv("AUTOFLUX_NO_PACK", "1")
    drawn(planned(model, Precision.INT8), model)
    assert shelf.find(pack.key)


def flip(file: Path, at: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(at)
        (byte,) = opened.read(1)
        opened.seek(at)
        opened.write(bytes([byte ^ 0x10]))


@pytest.mark.parametrize("where", ["first", "middle", "last"])
@pytest.mark.parametrize("component", ["transformer", "text_encoder_2"])
def test_a_flipped_bit_is_found_and_the_models_own_files_are_read(tiny_copy, shelf, caplog, component, where):
    model = find(str(tiny_copy), {})
    plan = planned(model, Precision.INT8)
    wanted = drawn(plan, model)
    packs = packed(model, shelf, Precision.INT8)
    pack = packs[component]
    begin = pack.tensors[0].offset
    flip(shelf.folder(pack.key) / WEIGHTS, {"first": begin, "middle": pack.nbytes // 2, "last": pack.nbytes - 1}[where])
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(drawn(plan, model), wanted)
    assert [r.message for r in caplog.records if "are damaged" in r.message and component in r.message]
    assert shelf.find(pack.key) is None
    assert not shelf.folder(pack.key).exists()
    assert {p.key for p in shelf.packs()} == {p.key for p in packs.values()} - {pack.key}


def respell(folder: Path, old: str, new: str, count: int = -1) -> None:
    """Change what the index of a pack says."""
    made = (folder / INDEX).read_text()
    assert old in made
    (folder / INDEX).write_text(made.replace(old, new, count))


SPOILED = {
    "a format of another size": lambda folder: respell(folder, '"format": "BF16"', '"format": "F32"', 1),
    "an unknown format": lambda folder: respell(folder, '"format": "BF16"', '"format": "ZZ"', 1),
    "formats of the same size": lambda folder: respell(folder, '"format": "BF16"', '"format": "F16"'),
    "an index that cannot be read": lambda folder: (folder / INDEX).write_text("{"),
    "truncated": lambda folder: os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 10),
    "without weights": lambda folder: (folder / WEIGHTS).unlink(),
}


@pytest.mark.parametrize("how", SPOILED)
def test_what_is_no_pack_any_more_is_dropped_with_one_warning(tiny_copy, shelf, how, caplog):
    model = find(str(tiny_copy), {})
    plan = planned(model, Precision.INT8)
    wanted = drawn(plan, model)
    packs = packed(model, shelf, Precision.INT8)
    key = packs["transformer"].key
    SPOILED[how](shelf.folder(key))
    with caplog.at_level(logging.WARNING):
        assert {pack.key for pack in shelf.packs()} == {pack.key for pack in packs.values()} - {key}
        assert not caplog.records, "only who wants to load it is told"
        assert shelf.holds(key)
        for _ in range(2):
            assert np.array_equal(drawn(plan, model), wanted)
    (told,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert str(shelf.folder(key)) in told
    assert "dropped, and the model's own files are read instead" in told
    assert not shelf.folder(key).exists()


def test_the_models_own_files_are_read_where_packs_cannot_be_and_they_stay(tiny_copy, shelf, caplog, monkeypatch):
    model = find(str(tiny_copy), {})
    plan = planned(model, Precision.INT8)
    wanted = drawn(plan, model)
    packs = packed(model, shelf, Precision.INT8)
    with monkeypatch.context() as refused, caplog.at_level(logging.WARNING):
        refuse(refused, WEIGHTS, errno.EACCES)
        assert np.array_equal(drawn(plan, model), wanted)
    assert [r.message for r in caplog.records if "cannot be read" in r.message]
    assert {p.key for p in shelf.packs()} == {p.key for p in packs.values()}


def test_a_bit_that_flips_in_what_is_streamed_from_the_disk_ends_with_a_message(tiny_copy, shelf):
    model = find(str(tiny_copy), {})
    plan = planned(model, Precision.INT8, waiting=Waiting.DISK)
    pack = packed(model, shelf, Precision.INT8)["transformer"]
    narrow = next(t for t in pack.tensors if t.name == "single_transformer_blocks.2.proj_out.weight")
    flip(shelf.folder(pack.key) / WEIGHTS, narrow.offset)
    with pytest.raises(DamagedPack, match="'transformer'") as raised:
        drawn(plan, model)
    assert "start again" in raised.value.hint
    assert shelf.find(pack.key) is None


def test_a_changed_model_is_not_drawn_from_its_old_pack(tiny_copy, shelf):
    old = find(str(tiny_copy), {})
    packed(old, shelf, Precision.INT8)
    before = drawn(planned(old, Precision.INT8), old)
    file = next((tiny_copy / "transformer").glob("*.safetensors"))
    save_file({name: tensor * 0.5 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    new = find(str(tiny_copy), {})
    assert new.revision == old.revision, "the header is the same"
    after = drawn(planned(new, Precision.INT8), new)
    assert not np.array_equal(before, after)
    keys = {pack.component: pack.key for pack in shelf.packs()}
    assert Recipe(new.component("transformer"), Precision.INT8, Precision.BFLOAT16).key() != keys["transformer"]
    assert Recipe(new.component("vae"), Precision.BFLOAT16, Precision.BFLOAT16).key() == keys["vae"]


def test_a_session_keeps_its_packs_from_removal(tiny_copy, shelf):
    model = find(str(tiny_copy), {})
    packs = packed(model, shelf, Precision.INT8)
    with open_session(planned(model, Precision.INT8, waiting=Waiting.DISK), model, load_plugins()) as session:
        assert not shelf.remove(packs["transformer"].key)
        session.generate(PROMPT, seed=5, steps=1)
    del session
    assert shelf.remove(packs["transformer"].key)
