"""What torch is told that it may take of a card: what is planned, and more where that is not enough."""

from __future__ import annotations

import logging

import pytest
import torch

from autoflux.errors import OutOfMemory
from autoflux.models.request import Order, make_requests
from autoflux.models.values import Model
from autoflux.planning.fit import PlannedVram, planned_vram
from autoflux.planning.terms import Offload
from autoflux.planning.values import Plan
from autoflux.runtime import allocator, ceiling
from autoflux.runtime.ceiling import PAGE_BYTES, SPARED_BYTES
from autoflux.runtime.session import Drawing, Session
from autoflux.testing import FakePipeline, fake_model, fake_plan

TOTAL = 20 * 10**9
PLANNED, LIMIT, CONTEXT, LARGEST = 8 * 10**9, 10 * 10**9, 10**9, 5 * 10**8


class OutOfRoom(FakePipeline):
    """Does one part of its work only once it has been given enough."""

    def __init__(self, shares: list[float], enough: float, part: str = "denoise") -> None:
        super().__init__()
        self._shares, self._enough, self._part = shares, enough, part

    def _need(self, part: str) -> None:
        if part == self._part and (self._shares or [1.0])[-1] < self._enough:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def encode(self, prompts):
        self._need("encode")
        return super().encode(prompts)

    def denoise(self, states):
        self._need("denoise")
        super().denoise(states)

    def decode(self, states):
        self._need("decode")
        return super().decode(states)


@pytest.fixture
def free() -> list[int]:
    """Bytes of the card that nobody has."""
    return [TOTAL]


@pytest.fixture
def shares(monkeypatch, free) -> list[float]:
    """Shares of the card that torch was allowed, in turn."""
    given: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], TOTAL) if device == 0 else None)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, _device: given.append(share))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: PLANNED)
    monkeypatch.setattr(ceiling, "planned_vram", planned)
    monkeypatch.setattr("autoflux.runtime.memory.give_back_unused", lambda: None)
    monkeypatch.setattr(ceiling, "give_back_unused", lambda: None)
    return given


@pytest.fixture
def pieces(monkeypatch, shares) -> list[int | str]:
    """What was taken in one piece, in bytes, and when what is unused was given back; weights take half of the plan."""
    seen: list[int | str] = []

    def empty(nbytes: int, *, dtype: torch.dtype, device: str) -> None:
        assert (dtype, device) == (torch.uint8, "cuda:0")
        seen.append(nbytes)

    monkeypatch.setenv(allocator.VARIABLE, "expandable_segments:True")
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: PLANNED // 2)
    monkeypatch.setattr(ceiling, "give_back_unused", lambda: seen.append("given back"))
    return seen


def planned(_plan: Plan, _model: Model, _width: int, _height: int, batch: int, steps: int) -> PlannedVram:
    peak = PLANNED + (batch - 1) * 10**9 + (steps > 2) * 10**8
    return PlannedVram(peak, peak, batch * LARGEST)


def plan_for_a_card() -> Plan:
    plan = fake_plan(fake_model())
    priors = plan.priors.replace(context_bytes=CONTEXT)
    return plan.replace(device="cuda:0", vram_limit_bytes=LIMIT, priors=priors)


def session_of(pipeline: FakePipeline, plan: Plan, *, keeps_to_plan: bool = True) -> Session:
    return Session(pipeline, plan, fake_model(), keeps_to_plan=keeps_to_plan)


def share_of(nbytes: int, *, tensors: int = 0) -> float:
    """Of the card, with room for so many tensors of a step."""
    return (nbytes + tensors * LARGEST - CONTEXT) / TOTAL


def drawing(nbytes: int, batch: int = 1) -> list[float]:
    """For steps and for the decode."""
    return [share_of(nbytes, tensors=batch), share_of(nbytes)]


def test_torch_may_take_what_is_planned_for_as_many_pictures_and_anything_once_the_session_is_over(shares):
    session = session_of(FakePipeline(), plan_for_a_card())
    session.generate("a", seed=1, steps=2)
    assert shares == drawing(PLANNED)
    session.generate("a", seed=1, steps=2, count=2)
    assert shares[2:] == drawing(PLANNED + 10**9, batch=2)
    session.generate("a", seed=1, steps=3)
    assert shares[4:] == drawing(PLANNED + 10**8)
    assert not session.exceeded_plan
    session.close()
    assert shares[6:] == [1.0]


def piece(nbytes: int) -> list[int | str]:
    """What is done before the steps of pictures that are planned to take so much."""
    return ["given back", (nbytes - SPARED_BYTES - CONTEXT - PLANNED // 2) // PAGE_BYTES * PAGE_BYTES]


def test_steps_have_what_is_planned_for_them_in_one_piece(pieces):
    session = session_of(FakePipeline(), plan_for_a_card())
    session.generate("a", seed=1, steps=2)
    assert pieces == piece(PLANNED)
    session.generate("a", seed=1, steps=2)
    assert pieces == 2 * piece(PLANNED), "the decode took it apart"
    pieces.clear()
    session.generate("a", seed=1, steps=2, count=2)
    assert pieces == piece(PLANNED + 10**9)


def test_a_picture_that_follows_a_cancelled_one_has_its_piece_and_a_batch_that_shrinks_keeps_it(pieces):
    session = session_of(FakePipeline(), plan_for_a_card())

    def begun(prompt: str, steps: int) -> Drawing:
        return session.begin(*make_requests(session.model, Order(prompt=prompt, seed=1, steps=steps)))

    session.advance([begun("cancelled", 2)])
    session.advance([begun("a", 2)])
    assert pieces == 2 * piece(PLANNED)
    pieces.clear()
    short, long = begun("short", 1), begun("long", 2)
    session.advance([short, long])
    session.advance([long])
    assert pieces == piece(PLANNED + 10**9)


@pytest.mark.parametrize(
    "options", [None, "expandable_segments:False", "expandable_segments:True,max_split_size_mb:64"]
)
def test_segments_that_do_not_grow_could_not_give_a_piece_back(pieces, monkeypatch, options):
    if options:
        monkeypatch.setenv(allocator.VARIABLE, options)
    else:
        monkeypatch.delenv(allocator.VARIABLE)
    session_of(FakePipeline(), plan_for_a_card()).generate("a", seed=1, steps=2)
    assert not pieces


def test_nothing_is_taken_beforehand_where_that_is_measured_or_all_is_there_or_the_plan_counted_too_little(
    pieces, shares, monkeypatch
):
    session = session_of(OutOfRoom(shares, 0.0), plan_for_a_card())
    session.measured = True
    session.generate("a", seed=1, steps=2)
    assert not pieces
    session.measured = False
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: PLANNED - CONTEXT - SPARED_BYTES)
    session.generate("a", seed=1, steps=2)
    assert pieces == ["given back"]
    session.pipeline._enough = share_of(LIMIT)
    session.generate("a", seed=1, steps=2)
    assert session.exceeded_plan
    pieces.clear()
    session.generate("a", seed=1, steps=2)
    assert not pieces


def test_what_others_have_is_no_reason_to_fail_before_it_is_needed(pieces, monkeypatch):
    def empty(_nbytes: int, **_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", empty)
    session = session_of(FakePipeline(), plan_for_a_card())
    assert session.generate("a", seed=1, steps=2)
    assert not session.exceeded_plan


def test_torch_is_told_once_for_all_steps(shares):
    session = session_of(FakePipeline(), plan_for_a_card())
    session.generate("a", seed=1, steps=9)
    assert shares == drawing(PLANNED + 10**8)


@pytest.mark.parametrize("part", ["encode", "denoise", "decode"])
@pytest.mark.parametrize("beyond", [False, True])
def test_the_ceiling_is_lifted_where_the_plan_counted_too_little(shares, caplog, part, beyond):
    pipeline = OutOfRoom(shares, 0.0, part)
    session = session_of(pipeline, plan_for_a_card())
    session.generate("a", seed=1, steps=2)
    pipeline._enough = 1.0 if beyond else share_of(LIMIT)
    with caplog.at_level(logging.WARNING):
        (picture,) = session.generate("b", seed=1, steps=2)
    assert picture.image is not None
    lifted = [share_of(LIMIT), *([1.0] if beyond else [])]
    before = drawing(PLANNED) + {"encode": [], "denoise": drawing(PLANNED)[:1], "decode": drawing(PLANNED)}[part]
    assert shares == before + lifted
    assert session.exceeded_plan
    said = ["up to 10.0 GB", "what there is"][: len(lifted)]
    assert [word in record.message for word, record in zip(said, caplog.records, strict=True)] == [True] * len(said)
    session.generate("c", seed=1, steps=2)
    assert shares == before + lifted, "it stays lifted"


def test_steps_that_may_take_as_much_already_are_given_what_there_is(shares, caplog):
    plan = plan_for_a_card().replace(vram_limit_bytes=PLANNED + LARGEST // 5)
    session_of(OutOfRoom(shares, 1.0), plan).generate("a", seed=1, steps=2)
    assert shares == [share_of(PLANNED, tensors=1), 1.0]
    assert len(caplog.records) == 1


@pytest.mark.parametrize("part", ["encode", "decode"])
def test_steps_keep_their_room_where_the_ceiling_is_lifted_by_less(shares, part):
    limit = PLANNED + LARGEST // 5
    pipeline = OutOfRoom(shares, 0.0, part)
    session = session_of(pipeline, plan_for_a_card().replace(vram_limit_bytes=limit))
    session.generate("a", seed=1, steps=2)
    pipeline._enough = share_of(limit)
    session.generate("b", seed=1, steps=2)
    shares.clear()
    session.generate("c", seed=1, steps=2)
    assert shares == [share_of(PLANNED, tensors=1), share_of(limit)]


def test_a_plan_that_may_take_no_more_than_it_counted_on_is_given_what_there_is(shares):
    plan = plan_for_a_card().replace(vram_limit_bytes=PLANNED)
    session_of(OutOfRoom(shares, 1.0), plan).generate("a", seed=1, steps=2)
    assert shares == [share_of(PLANNED, tensors=1), 1.0]


def test_where_there_is_no_more_memory_it_is_an_error_and_the_session_goes_on(shares):
    pipeline = OutOfRoom(shares, 2.0)
    session = session_of(pipeline, plan_for_a_card())
    with pytest.raises(OutOfMemory):
        session.generate("a", seed=1, steps=2)
    pipeline._enough = 0.0
    assert session.generate("a", seed=1, steps=2)


def test_where_others_have_the_memory_it_is_no_fault_of_the_plans(shares, free):
    free[0] = 10**6
    session = session_of(OutOfRoom(shares, 1.0), plan_for_a_card())
    with pytest.raises(OutOfMemory):
        session.generate("a", seed=1, steps=2)
    assert not session.exceeded_plan
    assert shares == [share_of(PLANNED, tensors=1)]


def test_a_step_that_is_done_again_leaves_alone_those_that_are_further(shares):
    class HalfWay(FakePipeline):
        def denoise(self, states):
            super().denoise(states[:1])
            if len(states) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")

    session = session_of(HalfWay(), plan_for_a_card())
    drawings = [session.begin(*make_requests(session.model, Order(prompt=name, seed=1, steps=2))) for name in "ab"]
    session.advance(drawings)
    assert [drawing.state.step for drawing in drawings] == [1, 1]


def test_a_device_without_a_number_is_the_current_one(shares):
    session_of(FakePipeline(), plan_for_a_card().replace(device="cuda")).generate("a", seed=1, steps=2)
    assert shares == drawing(PLANNED)


def test_what_is_planned_for_is_what_the_plan_predicts():
    plan, model = plan_for_a_card(), fake_model()
    picture = plan.predicted.picture
    one = planned_vram(plan, model, picture.width, picture.height, 1, picture.steps)
    more = planned_vram(plan, model, 2 * picture.width, picture.height, 4, picture.steps)
    assert 0 < one.peak < more.peak
    assert 0 < one.stepping < more.stepping
    assert 0 < one.largest_tensor < more.largest_tensor


def test_a_decode_that_takes_more_than_steps_and_their_largest_tensor_leaves_these_room_enough(shares, monkeypatch):
    planned_bytes = PlannedVram(PLANNED, PLANNED - LARGEST - 1, LARGEST)
    monkeypatch.setattr(ceiling, "planned_vram", lambda *_: planned_bytes)
    session_of(FakePipeline(), plan_for_a_card()).generate("a", seed=1, steps=2)
    assert shares == [share_of(PLANNED)], "nothing changes between them"


@pytest.mark.parametrize(
    ("changes", "keeps_to_plan"),
    [
        ({}, False),
        ({"unified_memory": True}, True),
        ({"offload": Offload.NATIVE}, True),
        ({"device": "xpu:0"}, True),
        ({"graphs": True}, True),
    ],
)
def test_what_is_not_autofluxs_own_and_what_records_graphs_is_left_alone(shares, changes, keeps_to_plan):
    plan = plan_for_a_card().replace(**changes)
    session = session_of(OutOfRoom([0.0], 1.0), plan, keeps_to_plan=keeps_to_plan)
    with pytest.raises(OutOfMemory):
        session.generate("a", seed=1, steps=2)
    session.close()
    assert not shares


def test_on_windows_a_full_card_goes_on_in_ram(shares, monkeypatch):
    monkeypatch.setattr(ceiling.sys, "platform", "win32")
    session_of(FakePipeline(), plan_for_a_card()).generate("a", seed=1, steps=2)
    assert not shares


def test_a_library_keeps_to_nothing_unless_it_is_told():
    assert not Session(FakePipeline(), fake_plan(fake_model()), fake_model()).keeps_to_plan
