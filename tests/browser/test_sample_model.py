"""The whole way with the real sample model: prompt in the page, picture out of the transformer."""

from __future__ import annotations

import io

import httpx
import pytest
from PIL import Image
from playwright.sync_api import expect

from tests.serving.running import running

pytestmark = pytest.mark.browser

PATIENCE_MILLISECONDS = 240_000


def share(image: Image.Image, strongest: int) -> float:
    """The share of pixels in which that channel (0 red, 2 blue) clearly outweighs the two others."""
    pixels = list(image.convert("RGB").resize((64, 64)).getdata())
    clear = [p for p in pixels if p[strongest] > 1.5 * max(p[other] for other in range(3) if other != strongest)]
    return len(clear) / len(pixels)


def test_a_red_circle_on_a_blue_background(open_page):
    with running("-m", "autoflux", "serve", "--port", "0", "--device", "cpu", "--backend", "diffusers") as server:
        page = open_page(server.url)
        page.wait_for_selector("#af-prompt textarea", timeout=PATIENCE_MILLISECONDS)
        page.uncheck("#af-random input")
        page.fill("#af-seed input", "7")
        page.fill("#af-prompt textarea", "a red circle on a blue background")
        page.press("#af-prompt textarea", "Enter")
        expect(page.locator("figure img")).to_be_visible(timeout=PATIENCE_MILLISECONDS)
        address = server.url + str(page.locator("figure img").get_attribute("src"))
        image = Image.open(io.BytesIO(httpx.get(address).content))
        assert "a red circle on a blue background" in image.info["parameters"]
        assert 0.03 < share(image, strongest=0) < 0.7
        assert share(image, strongest=2) > 0.25
        assert server.interrupt() == 130
        assert "Traceback" not in server.output
