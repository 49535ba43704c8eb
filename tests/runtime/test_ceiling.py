"""What torch is told that it may take of a card: what is planned, and more where that is not enough."""

from __future__ import annotations

import logging

import pytest
import torch

from autoflux.errors import OutOfMemory
from autoflux.planning.terms import Offload
from autoflux.planning.values import Plan
from autoflux.runtime import ceiling
from autoflux.runtime.session import Session
from autoflux.testing import FakePipeline, fake_model, fake_plan

TOTAL = 20 * 10**9
PLANNED, LIMIT, CONTEXT = 8 * 10**9, 10 * 10**9, 10**9


class OutOfRoom(FakePipeline):
    """Draws once it has been given enough."""

    def __init__(self, shares: list[float], enough: float) -> None:
        super().__init__()
        self._shares, self._enough = shares, enough

    def denoise(self, states):
        if (self._shares or [1.0])[-1] < self._enough:
            raise torch.OutOfMemoryError("CUDA out of memory")
        super().denoise(states)


@pytest.fixture
def shares(monkeypatch) -> list[float]:
    """Shares of the card that torch was allowed, in turn."""
    given: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (TOTAL, TOTAL))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, _device: given.append(share))
    monkeypatch.setattr(ceiling, "peak_vram_bytes", lambda _plan, _model, _w, _h, batch: PLANNED + (batch - 1) * 10**9)
    monkeypatch.setattr("autoflux.runtime.memory.give_back_unused", lambda: None)
    return given


def plan_for_a_card(**changes: object) -> Plan:
    plan = fake_plan(fake_model())
    priors = plan.priors.replace(context_bytes=CONTEXT)
    return plan.replace(device="cuda:0", vram_limit_bytes=LIMIT, priors=priors, **changes)


def session_of(pipeline: FakePipeline, plan: Plan, *, keeps_to_plan: bool = True) -> Session:
    return Session(pipeline, plan, fake_model(), keeps_to_plan=keeps_to_plan)


def share_of(nbytes: int) -> float:
    return (nbytes - CONTEXT) / TOTAL


def test_torch_may_take_what_is_planned_for_as_many_pictures_and_anything_once_the_session_is_over(shares):
    session = session_of(FakePipeline(), plan_for_a_card())
    session.generate("a", seed=1, steps=2)
    assert shares == [share_of(PLANNED)]
    session.generate("a", seed=1, steps=2, count=2)
    assert shares == [share_of(PLANNED), share_of(PLANNED + 10**9)]
    session.close()
    assert shares[-1] == 1.0


@pytest.mark.parametrize(
    ("enough", "wanted", "said"),
    [
        (share_of(LIMIT), [share_of(PLANNED), share_of(LIMIT)], ["up to 10.0 GB from now on"]),
        (1.0, [share_of(PLANNED), share_of(LIMIT), 1.0], ["up to 10.0 GB from now on", "as much as there is"]),
    ],
)
def test_the_ceiling_is_lifted_where_the_plan_counted_too_little(shares, caplog, enough, wanted, said):
    session = session_of(OutOfRoom(shares, enough), plan_for_a_card())
    with caplog.at_level(logging.WARNING):
        (picture,) = session.generate("a", seed=1, steps=2)
    assert picture.image is not None
    assert shares == wanted
    assert [word in record.message for word, record in zip(said, caplog.records, strict=True)] == [True] * len(said)
    session.generate("b", seed=1, steps=2)
    assert shares == wanted, "it stays lifted"


def test_where_there_is_no_more_memory_it_is_an_error_and_the_session_goes_on(shares):
    pipeline = OutOfRoom(shares, 2.0)
    session = session_of(pipeline, plan_for_a_card())
    with pytest.raises(OutOfMemory):
        session.generate("a", seed=1, steps=2)
    pipeline._enough = 0.0
    assert session.generate("a", seed=1, steps=2)


def test_where_graphs_are_recorded_all_that_the_plan_may_take_is_allowed(shares):
    """Nothing can be given back meanwhile."""
    session_of(FakePipeline(), plan_for_a_card(graphs=True)).generate("a", seed=1, steps=2)
    assert shares == [share_of(LIMIT)]


@pytest.mark.parametrize(
    ("changes", "keeps_to_plan"),
    [({}, False), ({"unified_memory": True}, True), ({"offload": Offload.NATIVE}, True), ({"device": "xpu:0"}, True)],
)
def test_what_is_not_autofluxs_own_is_left_alone(shares, changes, keeps_to_plan):
    plan = plan_for_a_card().replace(**changes)
    session = session_of(OutOfRoom([0.0], 1.0), plan, keeps_to_plan=keeps_to_plan)
    with pytest.raises(OutOfMemory):
        session.generate("a", seed=1, steps=2)
    session.close()
    assert not shares


def test_a_library_keeps_to_nothing_unless_it_is_told():
    assert not Session(FakePipeline(), fake_plan(fake_model()), fake_model()).keeps_to_plan
