"""The application: where frontends are, and what their places answer while they are built."""

from __future__ import annotations

import contextlib
import threading

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from autoflux import AutofluxError, Desk, PluginFailure
from autoflux.plugin_manager import load_plugins
from autoflux.serving.app import check_names, make_app
from autoflux.testing import FakeDesk
from tests.serving.running import eventually


class Page:
    """A frontend that is built when the test says so."""

    description = "for tests"

    def __init__(self, name: str = "page", error: Exception | None = None):
        self.name, self.error = name, error
        self.may_build = threading.Event()
        self.events = []

    def missing(self) -> str | None:
        return None

    def build(self, desk: Desk):
        self.may_build.wait()
        if self.error:
            raise self.error

        @contextlib.asynccontextmanager
        async def lifespan(_app):
            self.events.append("up")
            yield
            self.events.append("down")

        def show(request: Request) -> PlainTextResponse:
            return PlainTextResponse(f"{self.name} of {desk.model.name} below {request.scope['root_path']!r}")

        return Starlette(routes=[Route("/", show)], lifespan=lifespan)


@pytest.fixture
def desk():
    with FakeDesk() as desk:
        yield desk


def client(desk: Desk, *frontends: Page, on_failed=None) -> TestClient:
    api = load_plugins(entry_points=False).frontends.get("api")
    app = make_app(desk, api, frontends, on_failed=on_failed)
    return TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False)


def test_a_page_says_that_it_starts_until_it_is_built(desk: FakeDesk):
    page = Page()
    with client(desk, page) as http:
        waiting = http.get("/", headers={"accept": "text/html"})
        assert (waiting.status_code, waiting.headers["retry-after"]) == (503, "1")
        assert "autoflux is starting" in waiting.text
        assert "refresh" in waiting.text
        program = http.get("/anything", headers={"accept": "application/json"})
        assert (program.status_code, program.json()["error"]["code"]) == (503, "starting")
        assert http.get("/api/status").status_code == 200
        page.may_build.set()
        eventually(lambda: http.get("/").status_code == 200)
        assert http.get("/").text == "page of fake below ''"
        assert page.events == ["up"]
    assert page.events == ["up", "down"]


def test_the_first_frontend_is_at_the_root_and_others_at_their_names(desk: FakeDesk):
    first, second = Page("first"), Page("second")
    first.may_build.set()
    second.may_build.set()
    with client(desk, first, second) as http:
        eventually(lambda: http.get("/").status_code == http.get("/second/").status_code == 200)
        assert http.get("/").text == "first of fake below ''"
        assert http.get("/second").text == "second of fake below '/second'"


def test_a_frontend_that_cannot_be_built_is_reported(desk: FakeDesk):
    told: list[AutofluxError] = []
    page = Page(error=RuntimeError("no luck"))
    page.may_build.set()
    with client(desk, page, on_failed=told.append):
        eventually(lambda: told)
    assert isinstance(told[0], PluginFailure)
    assert told[0].message == "the frontend 'page' could not be started: RuntimeError: no luck"


def test_an_application_without_a_lifespan_will_do(desk: FakeDesk):
    async def plain(scope, receive, send):
        assert scope["type"] == "http"
        await PlainTextResponse("plain")(scope, receive, send)

    page = Page()
    page.build = lambda _desk: plain
    with client(desk, page) as http:
        eventually(lambda: http.get("/").text == "plain")


def test_the_server_may_end_while_a_frontend_is_built(desk: FakeDesk):
    page = Page()
    with client(desk, page):
        pass
    page.may_build.set()


def test_without_a_page_the_root_points_to_the_api(desk: FakeDesk):
    with client(desk) as http:
        assert http.get("/").json()["error"]["hint"] == "the API is at /api/status"


@pytest.mark.parametrize("pages", [0, 1])
def test_the_api_answers_without_the_slash_as_with_it(desk: FakeDesk, pages: int):
    with client(desk, *(Page() for _ in range(pages))) as http:
        for method in ("GET", "POST"):
            bare, folder = (http.request(method, path, follow_redirects=False) for path in ("/api", "/api/"))
            assert (bare.status_code, bare.json()) == (folder.status_code, folder.json())
            assert bare.json()["error"]["code"] == "not_found"


def test_health_tells_programs_whether_jobs_are_accepted(desk: FakeDesk):
    with client(desk) as http:
        eventually(lambda: http.get("/health").json()["state"] == "ready")
        desk.stop()
        stopped = http.get("/health")
    assert (stopped.status_code, stopped.json()["state"]) == (503, "stopped")


@pytest.mark.parametrize("name", ["api", "health", "a/b", "", "a b"])
def test_a_frontend_needs_a_name_that_can_be_a_path(name: str):
    with pytest.raises(PluginFailure):
        check_names([Page(name)])
