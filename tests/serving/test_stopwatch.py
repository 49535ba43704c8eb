"""Starts that are timed, with real worker processes of a fake backend."""

from __future__ import annotations

import pytest

from autoflux.errors import DamagedCheckpoint, InvalidRequest, OutOfMemory
from autoflux.models.request import Order
from autoflux.serving.messages import Ended, Finished, Loading, Ready, Started, Stepped
from autoflux.serving.stopwatch import TimedService
from autoflux.testing import BEHAVIOUR_VARIABLE, FAIL, Behaviour, fake_prepare

PREPARED = fake_prepare(lambda _stage: None)


@pytest.fixture(autouse=True)
def _fake(monkeypatch):
    monkeypatch.setenv("AUTOFLUX_PLUGINS", "autoflux.testing")


@pytest.mark.parametrize("when_ready", [True, False])
def test_an_order_is_accepted_at_once_or_when_all_is_loaded(when_ready):
    times = TimedService(PREPARED).time_start(Order(prompt="a"), when_ready=when_ready)
    assert (times.accepted_seconds >= times.ready_seconds) == when_ready
    assert 0 < times.ready_seconds < times.first_picture_seconds
    assert times.encoder_seconds == 0, "the fake reads none"
    assert times.peak_ram_bytes > 10_000_000
    assert times.peak_vram_bytes == 0


@pytest.mark.parametrize("when_ready", [True, False])
def test_what_cannot_be_loaded_is_told(when_ready, monkeypatch):
    monkeypatch.setenv(BEHAVIOUR_VARIABLE, Behaviour(broken=True).to_json())
    with pytest.raises(DamagedCheckpoint, match="the fake weights are damaged"):
        TimedService(PREPARED).time_start(Order(prompt="a"), when_ready=when_ready)


def test_what_cannot_be_drawn_is_told():
    with pytest.raises(OutOfMemory):
        TimedService(PREPARED).time_start(Order(prompt=FAIL), when_ready=False)
    with pytest.raises(InvalidRequest):
        TimedService(PREPARED).time_start(Order(prompt="a", width=7), when_ready=False)


def test_the_encoders_time_is_that_between_their_first_stage_and_the_next_other_one():
    def stage(text):
        return Loading(stage=text, progress=0.0)

    def picture():
        job = service.submit(Order(prompt="a"))
        yield Started(job_id=job.id, attempt=1)
        yield Stepped(job_id=job.id, attempt=1, step=1)
        yield Finished(job_id=job.id, attempt=1, index=0, png=b"", seconds=1.0)
        yield Ended(job_id=job.id, attempt=1)

    service = TimedService(PREPARED)
    said = [
        stage("starting"),
        stage("loading text encoder"),
        stage("loading text encoder 2"),
        stage("loading transformer"),
        stage("loading vae"),
        Ready(device="cpu"),
        *picture(),
    ]
    service._said = [(float(second), message) for second, message in enumerate(said)]
    times = service._times(accepted=0.5)
    assert (times.encoder_seconds, times.ready_seconds, times.first_picture_seconds) == (2.0, 5.0, 8.0)
    loading = [message.stage for message in said if isinstance(message, Loading)]
    wanted = [*loading, "ready", "drawing", "step 1 done", "picture"]
    assert [stage.name for stage in times.stages] == wanted
    assert [stage.seconds for stage in times.stages] == [float(second) for second in range(len(wanted))]
