"""The whole way with the real sample model: prompt in the page, picture out of the transformer."""

from __future__ import annotations

import io

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

import autoflux
from autoflux import Wishes
from benchmarks.adherence import SAME_COLOUR
from benchmarks.shape_vision import PROTOTYPES, border_colours, find, lab_of
from tests.serving.running import running

pytestmark = pytest.mark.browser

PATIENCE_MILLISECONDS = 240_000
PROMPT = "a red circle on a blue background"


def test_the_page_shows_the_picture_that_this_prompt_and_seed_stand_for(open_page):
    with running("-m", "autoflux", "serve", "--port", "0", "--device", "cpu", "--backend", "diffusers") as server:
        page = open_page(server.url)
        page.wait_for_selector("#af-prompt textarea", timeout=PATIENCE_MILLISECONDS)
        page.uncheck("#af-random input")
        page.fill("#af-seed input", "7")
        page.fill("#af-prompt textarea", PROMPT)
        page.press("#af-prompt textarea", "Enter")
        expect(page.locator("figure img")).to_be_visible(timeout=PATIENCE_MILLISECONDS)
        address = server.url + str(page.locator("figure img").get_attribute("src"))
        shown = Image.open(io.BytesIO(httpx.get(address).content))
        assert server.interrupt() == 130
    with autoflux.load("sample", wishes=Wishes(device="cpu")) as session:
        (expected,) = session.generate(PROMPT, seed=7)
    assert PROMPT in shown.info["parameters"]
    pixels = np.asarray(shown)
    assert np.array_equal(pixels, np.asarray(expected.image))
    assert [(thing.colour, thing.shape) for thing in find(pixels)] == [("red", "circle")]
    assert np.linalg.norm(border_colours(pixels) - lab_of(PROTOTYPES["blue"]), axis=1).max() < SAME_COLOUR
