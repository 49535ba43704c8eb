"""The gradio page as a person uses it, in a browser."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from autoflux.testing import FAIL
from tests.serving.running import Running, fake_server

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def server():
    with fake_server("gradio", behaviour='{"step_seconds": 0.05}') as server:
        server.until("ready")
        yield server


@pytest.fixture(autouse=True)
def _patience():
    expect.set_options(timeout=60_000)


def opened(open_page, server: Running, **options) -> Page:
    page = open_page(server.url, **options)
    expect(page.locator("#af-prompt textarea")).to_be_visible()
    return page


def ask(page: Page, prompt: str, *, steps: int | None = None) -> None:
    if steps:
        page.fill("#af-steps input[type=number]", str(steps))
        page.keyboard.press("Tab")
    page.fill("#af-prompt textarea", prompt)
    page.press("#af-prompt textarea", "Enter")


def test_a_page_opened_too_early_becomes_the_real_one(open_page):
    with fake_server("gradio", behaviour='{"load_seconds": 3}') as server:
        page = open_page(server.url)
        expect(page.get_by_role("heading", name="autoflux is starting")).to_be_visible()
        expect(page.locator("#af-prompt textarea")).to_be_visible()
        ask(page, "a picture that was ordered before the model was there")
        expect(page.locator("figure img")).to_be_visible()
        expect(page.locator(".af-status")).to_contain_text("fake · cpu · ready")


@pytest.mark.parametrize("look", [{}, {"dark": True}, {"width": 390}], ids=["light", "dark", "phone"])
def test_a_prompt_becomes_a_picture_with_its_seed(open_page, server: Running, tmp_path: Path, look: dict):
    page = opened(open_page, server, **look)
    page.screenshot(path=tmp_path / "empty.png", full_page=True)
    ask(page, "a red circle on a blue background", steps=30)
    expect(page.locator(".af-card")).to_contain_text(re.compile(r"Step \d+ of 30"))
    page.screenshot(path=tmp_path / "drawing.png", full_page=True)
    expect(page.locator("figure img")).to_be_visible()
    seed = page.input_value("#af-seed input")
    expect(page.locator("figcaption")).to_contain_text(f"seed {seed}")
    expect(page.locator("#af-progress .af-card")).to_have_count(0)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "it scrolls sideways"


def test_the_file_is_saved_as_it_was_drawn(open_page, server: Running):
    page = opened(open_page, server)
    page.uncheck("#af-random input")
    page.fill("#af-seed input", "77")
    ask(page, "a <b>bold</b> picture")
    with page.expect_download() as saving:
        page.get_by_role("link", name="Save").click()
    assert saving.value.suggested_filename == "autoflux-77.png"
    image = Image.open(io.BytesIO(Path(saving.value.path()).read_bytes()))
    assert image.info["parameters"].startswith("a <b>bold</b> picture\nSteps: 4, ")
    assert "Seed: 77" in image.info["parameters"]
    expect(page.locator(".af-prompt")).to_have_text("a <b>bold</b> picture")


def test_cancelling_stops_the_own_job_and_no_other(open_page, server: Running):
    mine, other = opened(open_page, server), opened(open_page, server)
    ask(mine, "mine", steps=100)
    expect(mine.locator(".af-card")).to_contain_text("Step")
    ask(other, "other")
    expect(other.locator(".af-card")).to_contain_text("In the queue, 1 before it")
    expect(mine.locator("#af-draw")).to_be_disabled()
    mine.click("#af-cancel")
    expect(mine.locator(".af-card")).to_have_text("Cancelled.")
    expect(other.locator("figure img")).to_be_visible()
    expect(mine.locator("figure")).to_have_count(0)
    expect(mine.locator("#af-draw")).to_be_enabled()


def test_what_cannot_be_done_is_said_on_the_page(open_page, server: Running):
    page = opened(open_page, server)
    page.fill("#af-width input", "100")
    ask(page, "a picture")
    expect(page.get_by_role("alert")).to_contain_text("Width must be a multiple of 16 pixels, got 100")
    expect(page.get_by_role("alert")).to_contain_text("Try 96 or 112")
    page.fill("#af-width input", "128")
    ask(page, " ")
    expect(page.get_by_role("alert")).to_contain_text("The prompt is empty")
    ask(page, FAIL)
    expect(page.get_by_role("alert")).to_contain_text("The device ran out of memory")
    expect(page.get_by_role("alert")).to_contain_text("Ask for a smaller picture")
    ask(page, "a picture")
    expect(page.locator("figure img")).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)


def test_size_presets_examples_and_several_pictures(open_page, server: Running):
    page = opened(open_page, server)
    page.get_by_text("a yellow square on a green background").click()
    expect(page.locator("#af-prompt textarea")).to_have_value("a yellow square on a green background")
    page.click("#af-shape input")
    page.get_by_role("option", name="(16:9)").click()
    expect(page.locator("#af-width input")).not_to_have_value("128")
    width, height = page.input_value("#af-width input"), page.input_value("#af-height input")
    page.fill("#af-pictures input[type=number]", "3")
    page.keyboard.press("Tab")
    page.click("#af-draw")
    expect(page.locator("figure img")).to_have_count(3)
    assert page.locator("figure img").first.get_attribute("width") == width
    assert page.locator("figure img").first.get_attribute("height") == height


def test_leaving_in_the_middle_disturbs_nothing(open_page, server: Running):
    page = opened(open_page, server)
    ask(page, "left alone", steps=40)
    expect(page.locator(".af-card")).to_contain_text("Step")
    page.goto("about:blank")
    jobs = server.get("/api/jobs")
    left = next(job for job in jobs if job["requests"][0]["prompt"] == "left alone")
    server.job(left["id"], "done")
    assert "Traceback" not in server.output


def test_a_worker_that_dies_is_seen_and_the_picture_still_comes(open_page, server: Running):
    page = opened(open_page, server)
    ask(page, "a picture", steps=60)
    expect(page.locator(".af-card")).to_contain_text(re.compile(r"Step [1-9]"))
    (worker,) = server.workers()
    worker.kill()
    expect(page.get_by_role("alert")).to_contain_text("The worker process was killed")
    expect(page.locator("#af-progress")).to_contain_text("Waiting for the model")
    expect(page.locator("figure img")).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)
