"""What a meter tells of drawing a batch. No times are compared: they are what they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoflux.models.request import Order, make_requests
from autoflux.runtime.meter import Meter, peak_ram_bytes
from autoflux.runtime.session import Drawing, Session
from autoflux.testing import FakePipeline, fake_model, fake_plan


@pytest.fixture
def session() -> Session:
    return Session(FakePipeline(), fake_plan(), fake_model())


def drawn(session: Session, meter: Meter, count: int = 2) -> list[Drawing]:
    requests = make_requests(session.model, Order(prompt="a", seed=1, count=count))
    with meter.encoding():
        drawings = [session.begin(request, afresh=True) for request in requests]
    while not drawings[0].finished:
        with meter.step():
            session.advance(drawings)
    with meter.decoding():
        session.finish(drawings)
    return drawings


def test_every_part_is_timed(session: Session):
    meter = Meter(session.plan, on=True)
    measured = meter.measured(drawn(session, meter), encoded=True)
    assert (measured.width, measured.height, measured.batch, len(measured.step_seconds)) == (128, 128, 2, 4)
    parts = (measured.begin_seconds, *measured.step_seconds, measured.finish_seconds)
    assert all(seconds > 0 for seconds in parts)
    assert measured.peak_vram_bytes is None
    assert measured.peak_ram_bytes > 10**7


def test_switched_off_it_has_measured_nothing(session: Session):
    meter = Meter(session.plan, on=False)
    assert meter.measured(drawn(session, meter), encoded=True) is None


def test_without_a_step_there_is_nothing_to_tell(session: Session):
    assert Meter(session.plan, on=True).measured([], encoded=True) is None


def test_the_peak_is_read_from_where_linux_keeps_it(tmp_path: Path):
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmHWM:\t   2048 kB\nVmRSS:\t 1024 kB\n")
    assert peak_ram_bytes(status) == 2 * 2**20


@pytest.mark.parametrize("text", ["", "VmHWM:\n", "VmHWM: many kB\n", None])
def test_where_nothing_is_told_nothing_is_made_up(tmp_path: Path, text: str | None):
    status = tmp_path / "status"
    if text is not None:
        status.write_text(text)
    peak = peak_ram_bytes(status)
    assert peak is None or peak > 10**6
