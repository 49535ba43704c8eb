"""Drawings of plans as a browser lays them out: no words over others or beyond the edge."""

from __future__ import annotations

import base64
from itertools import combinations

import pytest

from autoflux.planning.drawing import Drawing
from autoflux.planning.drawing_svg import to_svg
from tests.planning.test_drawing import CASES

pytestmark = pytest.mark.browser

WORDS = """() => [...document.querySelectorAll('text')].map(text => {
    const box = text.getBBox();
    return {words: text.textContent, left: box.x, right: box.x + box.width, top: box.y, bottom: box.y + box.height};
})"""


def _address(drawing: Drawing) -> str:
    """A page with the drawing in it, as a part of its own document."""
    page = f"<!doctype html><meta charset=utf-8>{to_svg(drawing)}"
    return "data:text/html;base64," + base64.b64encode(page.encode()).decode()


@pytest.mark.parametrize("name", CASES)
def test_words_stand_clear_of_each_other_and_of_the_edge(open_page, name):
    drawing, _ = CASES[name]
    page = open_page(_address(drawing))
    words = page.evaluate(WORDS)
    _, _, width, height = map(float, page.get_attribute("svg", "viewBox").split())
    assert len(words) > 10
    for word in words:
        assert 0 <= word["left"] < word["right"] <= width, word
        assert 0 <= word["top"] < word["bottom"] <= height, word
    overlapping = [
        (one["words"], other["words"])
        for one, other in combinations(words, 2)
        if min(one["right"], other["right"]) - max(one["left"], other["left"]) > 0
        and min(one["bottom"], other["bottom"]) - max(one["top"], other["top"]) > 2
    ]
    assert not overlapping


@pytest.mark.parametrize(("dark", "paper"), [(False, "rgb(255, 255, 255)"), (True, "rgb(17, 22, 28)")])
def test_the_paper_is_as_the_screen_is(open_page, dark, paper):
    drawing, _ = CASES["streamed"]
    page = open_page(_address(drawing), dark=dark)
    assert page.evaluate("() => getComputedStyle(document.querySelector('.paper')).fill") == paper
