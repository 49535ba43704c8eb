"""What a meter tells of drawing a batch. No times are compared: they are what they are."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from autoflux.hardware import load
from autoflux.hardware.load import Moment
from autoflux.models.request import Order, make_requests
from autoflux.planning.values import PhaseBytes
from autoflux.runtime import meter as meter_module
from autoflux.runtime.meter import Meter
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


def test_where_graphs_are_replayed_two_steps_are_unlike_the_others(session: Session):
    for graphs, unsettled in ((False, 1), (True, 2)):
        meter = Meter(session.plan.replace(graphs=graphs), on=True)
        measured = meter.measured(drawn(session, meter), encoded=True)
        assert measured.settled == measured.step_seconds[unsettled:]


@pytest.mark.parametrize(("idle", "own", "share"), [(4.0, 4.0, 1.0), (0.0, 4.0, 0.5)])
def test_what_others_left_of_the_processors_is_told(session: Session, monkeypatch, idle, own, share):
    moments = iter([Moment(0.0, 0.0, 0.0, 0.0), Moment(4.0, idle, own, 8.0)])
    monkeypatch.setattr(load, "moment", lambda: next(moments))
    monkeypatch.setattr(meter_module, "read_host", lambda: SimpleNamespace(cores=2))
    meter = Meter(session.plan, on=True)
    assert meter.measured(drawn(session, meter), encoded=True).processor_share == share


def test_a_batch_that_is_too_short_for_the_system_s_clocks_says_nothing_of_others(session: Session, monkeypatch):
    moments = iter([Moment(0.0, 0.0, 0.0, 0.0), Moment(0.1, 0.0, 0.1, 0.2)])
    monkeypatch.setattr(load, "moment", lambda: next(moments))
    meter = Meter(session.plan, on=True)
    assert meter.measured(drawn(session, meter), encoded=True).processor_share is None


class Event:
    """On a clock that goes on by a quarter of a second from one to the next."""

    made = 0

    def __init__(self, device: str, *, enable_timing: bool) -> None:
        assert (device, enable_timing) == ("the device cuda:0", True)

    def record(self, stream: str) -> None:
        assert stream == "the stream of the device cuda:0"
        Event.made += 1
        self.milliseconds = 250 * Event.made

    def elapsed_time(self, end: Event) -> float:
        return float(end.milliseconds - self.milliseconds)


class CountingTorch:
    """What the meter asks of torch: each part has its own peak, and once torch has held memory it keeps it."""

    Event = Event

    def __init__(self, peaks: list[int], reserved: int) -> None:
        self.accelerator = self
        self.peaks, self.reserved, self.waited = iter(peaks), reserved, 0

    def device(self, name: str) -> str:
        return f"the device {name}"

    def current_stream(self, device: str) -> str:
        return f"the stream of {device}"

    def empty_cache(self) -> None:
        self.emptied = True

    def synchronize(self, device: str) -> None:
        assert device == "cuda:0"
        self.waited += 1

    def reset_peak_memory_stats(self, device: str) -> None:
        self.peak = next(self.peaks)

    def max_memory_allocated(self, device: str) -> int:
        return self.peak

    def max_memory_reserved(self, device: str) -> int:
        return self.reserved


def test_peaks_are_tensors_what_is_held_beyond_them_and_the_context(monkeypatch: pytest.MonkeyPatch):
    torch = CountingTorch([300, 500, 900, 500, 500, 400], reserved=1000)
    monkeypatch.setitem(sys.modules, "torch", torch)
    plan = fake_plan()
    session = Session(FakePipeline(), plan, fake_model())
    meter = Meter(plan.replace(device="cuda:0", priors=plan.priors.replace(context_bytes=7)), on=True)
    measured = meter.measured(drawn(session, meter), encoded=True)
    assert measured.peak_vram_bytes == PhaseBytes(encode=1007, denoise=1007, decode=507)
    assert measured.step_seconds == (0.25,) * 4, "on the device's own clock"
    assert torch.waited == 4, "around encoding and decoding, not between steps"
    assert torch.emptied


def test_a_unified_chip_is_waited_for_and_not_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    meter = Meter(fake_plan().replace(device="mps"), on=True)
    session = Session(FakePipeline(), fake_plan(), fake_model())
    assert meter.measured(drawn(session, meter), encoded=True).peak_vram_bytes is None


def test_switched_off_it_has_measured_nothing(session: Session):
    meter = Meter(session.plan, on=False)
    assert meter.measured(drawn(session, meter), encoded=True) is None


def test_without_a_step_there_is_nothing_to_tell(session: Session):
    assert Meter(session.plan, on=True).measured([], encoded=True) is None
