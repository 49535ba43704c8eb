"""The API: jobs over HTTP and JSON, and what it refuses."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image
from starlette.testclient import TestClient

from autoflux.plugin_manager import load_plugins
from autoflux.testing import FAIL, Behaviour, FakeDesk, draw


@pytest.fixture
def desk():
    with FakeDesk(Behaviour(step_seconds=0.005), max_queued=2) as desk:
        yield desk


@pytest.fixture
def http(desk: FakeDesk) -> TestClient:
    app = load_plugins(entry_points=False).frontends.get("api").build(desk)
    return TestClient(app, root_path="/api", raise_server_exceptions=False)


def test_an_order_becomes_a_picture(http: TestClient, desk: FakeDesk):
    ordered = http.post("/jobs", json={"prompt": "a", "seed": 3, "count": 2})
    job = ordered.json()
    assert (ordered.status_code, ordered.headers["location"]) == (201, f"/api/jobs/{job['id']}")
    assert [request["seed"] for request in job["requests"]] == [3, 4]
    requests = desk.wait(job["id"]).requests
    done = http.get(f"/jobs/{job['id']}").json()
    assert (done["state"], done["step"], done["steps"]) == ("done", 8, 8)
    assert done["pictures"][1]["url"] == f"/api/jobs/{job['id']}/pictures/1.png"
    picture = http.get(f"/jobs/{job['id']}/pictures/1.png")
    assert picture.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(picture.content)).tobytes() == draw(requests[1]).tobytes()
    assert [listed["id"] for listed in http.get("/jobs").json()] == [job["id"]]


def test_events_tell_every_change_and_end_explicitly(http: TestClient):
    job_id = http.post("/jobs", json={"prompt": "a"}).json()["id"]
    stream = http.get(f"/jobs/{job_id}/events")
    assert stream.headers["content-type"].startswith("text/event-stream")
    events = [event.split("\ndata: ") for event in stream.text.strip().split("\n\n")]
    assert {name for name, _ in events[:-1]} == {"event: job"}
    assert json.loads(events[-2][1])["state"] == "done"
    assert events[-1] == ["event: end", '{"state":"done"}']


def test_a_job_is_cancelled(http: TestClient, desk: FakeDesk):
    job_id = http.post("/jobs", json={"prompt": "a", "steps": 1000}).json()["id"]
    assert http.delete(f"/jobs/{job_id}").status_code == 200
    assert desk.wait(job_id).state == "cancelled"
    assert http.delete(f"/jobs/{job_id}").json()["state"] == "cancelled"


def test_status_plan_and_hardware(http: TestClient):
    assert http.get("/status").json()["model"] == "fake"
    assert http.get("/plan").json()["backend"] == "fake"
    assert http.get("/hardware").json()["fingerprint"] == "fake"


def test_a_full_queue_says_when_to_come_again(http: TestClient):
    for _ in range(3):
        http.post("/jobs", json={"prompt": "a", "steps": 1000})
    full = http.post("/jobs", json={"prompt": "a"})
    assert (full.status_code, full.json()["error"]["code"], full.headers["retry-after"]) == (429, "queue_full", "5")


def test_a_stopped_service_is_unavailable(http: TestClient, desk: FakeDesk):
    desk.stop()
    assert http.post("/jobs", json={"prompt": "a"}).status_code == 503


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b"null", None),
        (b"\xff\xfe", None),
        (b'{"prompt": "a", "prompt_": 1}', "prompt_"),
        (b'{"seed": 1}', "prompt"),
        (b'{"prompt": 1}', "prompt"),
        (b'{"prompt": "a", "steps": "4"}', "steps"),
        (b'{"prompt": "a", "steps": true}', "steps"),
        (b'{"prompt": "a", "steps": 4.5}', "steps"),
        (b'{"prompt": "a", "steps": 0}', "steps"),
        (b'{"prompt": "a", "seed": -1}', "seed"),
        (b'{"prompt": "a", "seed": 99999999999999999999999999}', "seed"),
        (b'{"prompt": "a", "guidance": NaN}', None),
        (b'{"prompt": "a", "guidance": Infinity}', None),
        (b'{"prompt": "a", "guidance": 1e999}', "guidance"),
        (b'{"prompt": "a", "width": 100}', "width"),
        (b'{"prompt": "a", "count": 65}', "count"),
        (b'{"prompt": "a", "count": null}', "count"),
        (b'{"prompt": "  "}', "prompt"),
        (b'{"prompt": "\\ud800"}', None),
    ],
)
def test_malformed_orders_are_refused_with_the_field_named(http: TestClient, body: bytes, param: str | None):
    answer = http.post("/jobs", content=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_request", param), error
    assert http.get("/jobs").json() == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is empty"),
        (b" \n", "the body is empty"),
        (b"\xff\xfe", "the body is not valid UTF-8 text"),
        (b'{"prompt": "\xed\xa0\x80"}', "the body is not valid UTF-8 text"),
        (b'{"prompt": "\\ud800"}', "the body is not valid JSON text: a string has a lone surrogate"),
        (b'{"prompt": "a\\udc00b"}', "the body is not valid JSON text: a string has a lone surrogate"),
        (b'{"prompt": "\\ud83d\\ude00', "the body is not valid JSON text: truncated"),
        (b'{"prompt": "\\\\ud800', "the body is not valid JSON text: truncated"),
        (b"prompt=a", "the body is not valid JSON text: invalid character (byte 0)"),
    ],
)
def test_a_body_that_is_no_json_is_refused_with_the_reason(http: TestClient, body: bytes, message: str):
    error = http.post("/jobs", content=body).json()["error"]
    assert error["message"] == message
    assert '{"prompt": "a red circle"}' in error["hint"]


def test_a_surrogate_pair_is_one_character(http: TestClient):
    job = http.post("/jobs", content=b'{"prompt": "\\ud83d\\ude00"}').json()
    assert job["requests"][0]["prompt"] == "\N{GRINNING FACE}"


def test_a_body_that_is_too_large_is_refused_while_it_is_read(http: TestClient):
    sent = 0

    def chunks():
        nonlocal sent
        for _ in range(64):
            sent += 1
            yield b" " * 65536

    answer = http.post("/jobs", content=chunks())
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")


@pytest.mark.parametrize(
    "path", ["/jobs/no", "/jobs/no/events", "/jobs/no/pictures/0.png", "/jobs/no/pictures/x.png", "/x"]
)
def test_what_is_not_there(http: TestClient, path: str):
    answer = http.get(path)
    assert answer.status_code == 404
    assert set(answer.json()["error"]) == {"code", "message", "hint", "param"}


def test_other_methods_are_refused(http: TestClient):
    answer = http.put("/jobs", json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")


def test_a_failed_job_says_why(http: TestClient, desk: FakeDesk):
    job_id = http.post("/jobs", json={"prompt": FAIL}).json()["id"]
    assert desk.wait(job_id).state == "failed"
    assert http.get(f"/jobs/{job_id}").json()["error"]["code"] == "out_of_memory"
