from __future__ import annotations

from autoflux.hardware.timing import round_seconds


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


def _nothing() -> None:
    pass
