from __future__ import annotations

from dataclasses import dataclass

import pytest

from autoflux.hardware.timing import (
    LAUNCHES,
    ROUNDS,
    climb,
    launch_seconds,
    quick_seconds,
    round_seconds,
    sustained_seconds,
)


def test_at_least_one_round_even_over_the_budget():
    assert len(round_seconds(_nothing, _nothing, budget_seconds=0.0)) == 1


def test_rounds_are_positive_and_no_more_than_asked():
    taken = round_seconds(_nothing, _nothing, rounds=3)
    assert 1 <= len(taken) <= 3
    assert min(taken) > 0


def test_the_device_is_waited_for_in_every_round():
    calls: list[str] = []
    round_seconds(lambda: calls.append("call"), lambda: calls.append("wait"), rounds=2)
    assert calls[-1] == "wait"
    assert calls.count("call") > 2


def test_the_first_call_does_not_count():
    calls: list[str] = []
    assert quick_seconds(lambda: calls.append("call"), _nothing) > 0
    assert len(calls) == 3


def test_sustained_seconds_are_those_of_one_call_even_without_time():
    assert 0 < sustained_seconds(_nothing, _nothing, seconds=0.02) < 0.01
    assert sustained_seconds(_nothing, _nothing, seconds=0.0) > 0


def test_launching_is_timed_before_the_device_is_waited_for():
    calls: list[str] = []
    assert launch_seconds(lambda: calls.append("call"), lambda: calls.append("wait")) > 0
    warm = ["wait", "call", "wait"]
    assert calls == [*warm, *(["wait", *["call"] * LAUNCHES] * ROUNDS)]


@dataclass(frozen=True)
class Sized:
    operations: float


SIZES = tuple(Sized(10.0**n) for n in range(4))


def test_the_largest_size_is_taken_while_it_is_quick():
    size, seconds = climb(SIZES, lambda _size: _nothing, _nothing)
    assert size == SIZES[-1]
    assert seconds > 0


def test_no_size_is_tried_that_would_take_too_long():
    tried: list[Sized] = []

    def make(size: Sized):
        tried.append(size)
        return _nothing

    size, _ = climb(SIZES, make, _nothing, largest_seconds=0.0)
    assert [size] == tried == [SIZES[0]]


def test_a_size_that_fails_ends_the_climb_at_the_one_before():
    def make(size: Sized):
        def call() -> None:
            if size.operations > 10:
                raise MemoryError

        return call

    size, _ = climb(SIZES, make, _nothing)
    assert size == SIZES[1]


def test_what_the_smallest_size_throws_is_thrown():
    def make(_size: Sized):
        raise RuntimeError("no kernel")

    with pytest.raises(RuntimeError, match="no kernel"):
        climb(SIZES, make, _nothing)


def _nothing() -> None:
    pass
