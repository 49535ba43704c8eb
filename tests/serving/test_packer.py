"""Packs that are written while there is nothing to draw: which, when, and what goes wrong."""

from __future__ import annotations

import logging
import os
import threading

import pytest

from autoflux import Model, Placement, Plan, Precision
from autoflux.models.pack_shelf import LIMIT, NO_PACK
from autoflux.runtime.auto_packing import lacking
from autoflux.serving.packer import Packer
from tests.plugins.test_packs import planned

LONG = 30
"""Seconds until a test gives up waiting for what must come."""


pytestmark = pytest.mark.usefixtures("shelf")


@pytest.fixture
def model(tiny_found) -> Model:
    return tiny_found


@pytest.fixture
def plan(model) -> Plan:
    """The transformer narrowed, the others from float32 to bfloat16."""
    return planned(model, Precision.INT8)


class Making:
    """Writes down what happens, for others to wait for."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.changed = threading.Condition()

    def __call__(self, recipe, _wait) -> None:
        self.tell(recipe.component.name)

    def tell(self, event: str) -> None:
        with self.changed:
            self.events.append(event)
            self.changed.notify_all()

    def wait_for(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.events) >= count, LONG), self.events


def components(recipes) -> list[str]:
    return [recipe.component.name for recipe in recipes]


def test_what_loading_converts_is_lacking(model, plan, shelf):
    assert components(lacking(plan, model, shelf)) == ["text_encoder", "text_encoder_2", "transformer", "vae"]
    wide = plan.replace(
        components=tuple(
            c.replace(storage=Precision.FLOAT32, arithmetic=Precision.FLOAT32, native=False) for c in plan.components
        )
    )
    assert lacking(wide, model, shelf) == [], "they are in float32 already"
    left = planned(model, Precision.INT8, placement=Placement.NATIVE)
    assert "transformer" not in components(lacking(left, model, shelf))


def test_scaled_and_quantized_weights_are_converted_too(model, plan, shelf):
    wide = planned(model, Precision.FLOAT32)
    wide = wide.replace(
        components=tuple(c.replace(storage=Precision.FLOAT32, arithmetic=Precision.FLOAT32) for c in wide.components)
    )

    def changed(**fields: object) -> Model:
        parts = (c.replace(**fields) if c.name == "transformer" else c for c in model.components)
        return model.replace(components=tuple(parts))

    assert components(lacking(wide, changed(scaled=True), shelf)) == ["transformer"]
    assert components(lacking(wide, changed(formats={"Q4_K": 10, "F32": 2}), shelf)) == ["transformer"]


def test_all_are_written_once_and_then_nothing_is_lacking(model, plan, shelf):
    packer = Packer(plan, model)
    packer.resume()
    packer.join()
    assert lacking(plan, model, shelf) == []
    assert sorted(pack.component for pack in shelf.packs()) == ["text_encoder", "text_encoder_2", "transformer", "vae"]
    transformer = next(pack for pack in shelf.packs() if pack.component == "transformer")
    assert (transformer.storage, transformer.arithmetic) == (Precision.INT8, Precision.BFLOAT16)


def test_while_something_is_drawn_no_piece_is_begun(model, plan):
    making = Making()

    def make(recipe, wait) -> None:
        def begin(event: str) -> None:
            packer.pause()  # a job comes
            making.tell(event)
            wait()

        for piece in ("first", "second"):
            begin(f"{recipe.component.name} {piece}")

    packer = Packer(plan, model, make=make)
    packer.resume()
    for begun in range(1, 9):
        making.wait_for(begun)
        assert len(making.events) == begun, "the next waits for the end of the job"
        packer.resume()
    packer.join()
    names = ["text_encoder", "text_encoder_2", "transformer", "vae"]
    assert making.events == [f"{name} {piece}" for name in names for piece in ("first", "second")]


def test_nothing_is_written_before_there_is_time(model, plan):
    making = Making()
    packer = Packer(plan, model, make=making)
    packer.pause()
    packer.join()
    assert making.events == []


def test_no_pack_means_no_pack(model, plan, shelf, monkeypatch):
    monkeypatch.setenv(NO_PACK, "1")
    packer = Packer(plan, model)
    packer.resume()
    packer.join()
    assert shelf.packs() == []


def test_no_room_is_told_once_and_leaves_nothing(model, plan, shelf, monkeypatch, caplog):
    monkeypatch.setenv(LIMIT, "0")
    packer = Packer(plan, model)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            packer.resume()
            packer.join()
            packer.pause()
    (record,) = [record for record in caplog.records if "no packs are written" in record.message]
    assert "packs may take" in record.message
    assert shelf.packs() == []
    assert not list(shelf.root.glob(".*.partial"))


def test_a_cache_that_cannot_be_written_is_told_once(model, plan, tmp_path, monkeypatch, caplog):
    occupied = tmp_path / "occupied"
    occupied.write_text("a file where the folder should be")
    monkeypatch.setenv("AUTOFLUX_CACHE_DIR", os.fspath(occupied))
    packer = Packer(plan, model)
    with caplog.at_level(logging.WARNING):
        packer.resume()
        packer.join()
    assert [r.message for r in caplog.records if "no packs are written: cannot write a pack" in r.message]


def test_packs_of_one_model_do_not_make_room_for_each_other_start_after_start(model, plan, shelf, monkeypatch, caplog):
    whole = sum(recipe.nbytes() for recipe in lacking(plan, model, shelf))
    monkeypatch.setenv(LIMIT, f"{whole - 1}B")
    for _ in range(2):
        packer = Packer(plan, model)
        packer.resume()
        packer.join()
        assert components(lacking(plan, model, shelf)) == ["vae"]
    assert "in use" in caplog.text


def test_the_least_recently_used_packs_make_room(model, plan, shelf, monkeypatch):
    other = planned(model, Precision.FLOAT8)
    packer = Packer(other, model)
    packer.resume()
    packer.join()
    used = shelf.used_bytes
    monkeypatch.setenv(LIMIT, f"{used}B")
    packer = Packer(plan, model)
    packer.resume()
    packer.join()
    held = {(pack.component, pack.storage) for pack in shelf.packs()}
    assert ("transformer", Precision.INT8) in held
    assert shelf.used_bytes <= used
