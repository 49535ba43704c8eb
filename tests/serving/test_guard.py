"""Who may talk to the server."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from autoflux.serving.guard import Guard


async def greet(socket: WebSocket):
    await socket.accept()
    await socket.send_text("hello")
    await socket.close()


def client(bound_host: str = "127.0.0.1", *allowed: str) -> TestClient:
    page = Route(
        "/", lambda _: PlainTextResponse("page", headers={"referrer-policy": "origin"}), methods=["GET", "POST"]
    )
    return TestClient(Guard(Starlette(routes=[page, WebSocketRoute("/ws", greet)]), bound_host, allowed))


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:6006", "127.0.0.1:8080", "[::1]:6006", "LOCALHOST", "nas.lan"]
)
def test_own_names_are_accepted(host: str):
    assert client("127.0.0.1", "nas.lan").get("/", headers={"host": host}).text == "page"


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "192.168.1.5", "", "[::1", "localhost@evil"]
)
def test_foreign_names_are_refused(host: str):
    answer = client().get("/", headers={"host": host})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "forbidden_host"
    assert "--allow-host" in answer.json()["error"]["hint"]


def test_a_server_on_all_addresses_accepts_any_number_but_no_foreign_name():
    assert client("0.0.0.0").get("/", headers={"host": "192.168.1.5:6006"}).text == "page"
    assert client("0.0.0.0").get("/", headers={"host": "evil.example"}).status_code == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "http://127.0.0.1:1", "null", "http://[::1"])
def test_requests_of_other_pages_change_nothing(origin: str):
    headers = {"host": "127.0.0.1:6006", "origin": origin}
    answer = client().post("/", headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden_origin")
    assert client().get("/", headers=headers).text == "page"


def test_own_pages_and_programs_may_post():
    assert client().post("/", headers={"host": "127.0.0.1:8", "origin": "http://127.0.0.1:8"}).text == "page"
    assert client().post("/", headers={"host": "127.0.0.1:8"}).text == "page"


def test_web_sockets_are_guarded_too():
    headers = {"host": "127.0.0.1:8"}
    with client().websocket_connect("/ws", headers={**headers, "origin": "http://127.0.0.1:8"}) as socket:
        assert socket.receive_text() == "hello"
    for bad in ({"host": "evil.example"}, {**headers, "origin": "http://evil.example"}):
        with pytest.raises(WebSocketDisconnect), client().websocket_connect("/ws", headers=bad):
            pass


def test_answers_carry_security_headers_unless_the_page_sets_its_own():
    headers = client().get("/", headers={"host": "localhost"}).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert "default-src 'self'" in headers["content-security-policy"]
    assert headers["referrer-policy"] == "origin"
