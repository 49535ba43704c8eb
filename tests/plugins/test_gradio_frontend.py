"""The gradio page without a browser: what it shows, what it orders, where its files come from."""

from __future__ import annotations

import pytest
from autoflux.plugins import gradio_views as views
from starlette.testclient import TestClient

from autoflux.errors import ErrorReport, InvalidRequest
from autoflux.models.request import Request
from autoflux.models.values import Limits
from autoflux.plugin_manager import load_plugins
from autoflux.serving.jobs import Drawn, Job, JobState, Status, WorkerState
from autoflux.testing import FakeDesk

REQUEST = Request(prompt="<script>alert(1)</script>", seed=7, steps=4, guidance=3.5, width=128, height=64)
JOB = Job(id="j", requests=(REQUEST,), created_at=0.0)
READY = Status(worker=WorkerState.READY, model="fake", device="cpu")


def drawn(seconds: float = 1.25, **more) -> Job:
    picture = Drawn(index=0, seed=7, width=128, height=64, seconds=seconds, **more)
    return JOB.replace(state=JobState.DONE, step=4, pictures=(picture,))


@pytest.mark.parametrize(
    ("job", "status", "text"),
    [
        (JOB.replace(position=2), READY, "In the queue, 2 before it"),
        (JOB.replace(position=0), READY, "In the queue, next"),
        (
            JOB.replace(position=0),
            READY.replace(worker=WorkerState.LOADING, stage="loading the transformer", progress=0.42),
            "Waiting for the model: loading the transformer, 42%",
        ),
        (JOB.replace(state=JobState.RUNNING), READY, "Reading the prompt"),
        (JOB.replace(state=JobState.RUNNING, step=3, attempt=1), READY, "Step 3 of 4<"),
        (JOB.replace(state=JobState.RUNNING, step=3, attempt=2), READY, "Step 3 of 4 (attempt 2)"),
        (JOB.replace(state=JobState.RUNNING, step=4), READY, "Developing the picture"),
        (JOB.replace(state=JobState.CANCELLED), READY, "Cancelled."),
        (
            JOB.replace(state=JobState.FAILED, error=ErrorReport(code="x", message="no <memory>", hint="less")),
            READY,
            "No &lt;memory&gt;",
        ),
    ],
)
def test_progress_says_where_the_job_is(job: Job, status: Status, text: str):
    assert text in views.progress_view(job, status)


def test_progress_of_a_finished_job_is_nothing():
    assert views.progress_view(drawn(), READY) == views.NOTHING


def test_every_picture_has_seed_time_and_its_own_file():
    html = views.gallery_view([drawn(warnings=("too <long>",))])
    assert "seed 7 · 1.2 s" in html
    assert 'href="/api/jobs/j/pictures/0.png" download="autoflux-7.png"' in html
    assert "too &lt;long&gt;" in html
    assert "<script>" not in html
    assert "2 min 5 s" in views.gallery_view([drawn(seconds=125)])
    assert "will appear here" in views.gallery_view([JOB])


def test_the_status_line_and_errors_are_escaped():
    failed = Status(worker=WorkerState.FAILED, model="<m>", error=ErrorReport(code="x", message="bad", hint="<hint>"))
    html = views.status_view(failed)
    assert "&lt;m&gt;" in html
    assert "&lt;hint&gt;" in html
    assert "drawing, 3 waiting" in views.status_view(READY.replace(running=1, queued=3))
    assert "Width is wrong" in views.error_view(InvalidRequest("width is wrong", param="width"))


def test_fields_become_an_order():
    from autoflux.plugins.gradio_form import make_order

    order = make_order(" a picture \n", 128, 64.0, 4, 3.5, 2, 7, random_seed=False)
    assert (order.prompt, order.width, order.height, order.steps) == ("a picture", 128, 64, 4)
    assert (order.guidance, order.count, order.seed) == (3.5, 2, 7)
    empty = make_order(None, None, None, None, None, None, 7, random_seed=True)
    assert (empty.prompt, empty.width, empty.steps, empty.count, empty.seed) == ("", None, None, 1, None)


def test_size_presets_keep_to_the_limits():
    from autoflux.plugins.gradio_form import size_presets

    presets = size_presets(1024, 1024, Limits())
    assert next(iter(presets)) == "1024x1024"
    assert presets["1360x768 (16:9)"] == (1360, 768)
    assert all(side % 16 == 0 for size in presets.values() for side in size)
    assert list(size_presets(64, 64, Limits(min_side=64, max_side=64))) == ["64x64"]


@pytest.fixture(scope="module")
def page():
    with FakeDesk() as desk:
        app = load_plugins(entry_points=False).frontends.get("gradio").build(desk)
        with TestClient(app, base_url="http://127.0.0.1") as client:
            yield client


def test_the_page_is_served_and_calls_nobody(page: TestClient):
    assert page.get("/").status_code == 200
    config = page.get("/config").json()
    assert config["analytics_enabled"] is False
    assert config["title"] == "autoflux · fake"
    assert "fonts.googleapis" not in page.get("/theme.css").text


def test_its_functions_cannot_be_called_as_an_api(page: TestClient):
    described = page.get("/gradio_api/info").json()
    assert described["named_endpoints"] == {}


def test_it_says_what_to_install():
    frontend = load_plugins(entry_points=False).frontends.get("gradio")
    assert frontend.missing() is None
    assert frontend.description
