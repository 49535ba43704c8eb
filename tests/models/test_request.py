"""Orders become requests, or an error that names the field."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from autoflux.errors import InvalidRequest
from autoflux.models.inventory import take_stock
from autoflux.models.request import MAX_SEED, Order, make_requests


@pytest.fixture(scope="module")
def model(tiny_model: Path):
    return take_stock(tiny_model)


def test_what_is_not_said_comes_from_the_model(model):
    (request,) = make_requests(model, Order(prompt="a star"))
    assert (request.steps, request.width, request.height, request.guidance) == (2, 64, 64, 3.5)
    assert 0 <= request.seed <= MAX_SEED


def test_a_missing_seed_is_drawn_by_chance(model):
    seeds = {make_requests(model, Order(prompt="a star"))[0].seed for _ in range(8)}
    assert len(seeds) > 1


def test_several_pictures_differ_in_the_seed_only(model):
    requests = make_requests(model, Order(prompt="a star", seed=7, count=3))
    assert [r.seed for r in requests] == [7, 8, 9]
    assert {r.replace(seed=0) for r in requests} == {requests[0].replace(seed=0)}


@pytest.mark.parametrize(
    ("field", "order"),
    [
        ("prompt", {"prompt": ""}),
        ("prompt", {"prompt": "a \udcff"}),
        ("prompt", {"prompt": " \n\t "}),
        ("prompt", {"prompt": "x" * 100_000}),
        ("seed", {"seed": -1}),
        ("seed", {"seed": MAX_SEED + 1}),
        ("seed", {"seed": MAX_SEED, "count": 2}),
        ("steps", {"steps": 0}),
        ("steps", {"steps": -1}),
        ("steps", {"steps": 10**6}),
        ("guidance", {"guidance": math.nan}),
        ("guidance", {"guidance": math.inf}),
        ("guidance", {"guidance": -0.1}),
        ("width", {"width": 0}),
        ("width", {"width": 65}),
        ("height", {"height": 10**9}),
        ("height", {"height": -64}),
        ("count", {"count": 0}),
        ("count", {"count": 10**6}),
    ],
)
def test_what_the_model_cannot_do_is_refused_by_field(model, field, order):
    with pytest.raises(InvalidRequest) as caught:
        make_requests(model, Order(**({"prompt": "a star"} | order)))
    assert caught.value.param == field


def test_a_size_that_is_no_multiple_comes_with_the_nearest_ones(model):
    with pytest.raises(InvalidRequest) as caught:
        make_requests(model, Order(prompt="a star", width=100))
    assert caught.value.hint == "try 96 or 112"
