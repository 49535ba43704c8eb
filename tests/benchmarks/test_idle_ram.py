"""What plans before have left in the process is not counted for those after them."""

from __future__ import annotations

from benchmarks.card import IdleRam


def left(idle: IdleRam) -> tuple[int, int]:
    """For a plan that does not compile, and for one that does."""
    return idle.left_bytes(compiled=False), idle.left_bytes(compiled=True)


def test_nothing_is_left_before_a_plan_was_unloaded_and_by_the_first():
    idle = IdleRam()
    assert left(idle) == (0, 0)
    idle.note(1000, compiled=False)
    assert left(idle) == (0, 0)


def test_what_compiles_is_counted_for_plans_that_do():
    idle = IdleRam()
    idle.note(1000, compiled=False)
    idle.note(1030, compiled=False)
    idle.note(1130, compiled=True)
    assert left(idle) == (130, 30)
    idle.note(1150, compiled=True)
    assert left(idle) == (150, 50)


def test_weights_that_lie_there_for_all_are_left_by_none():
    idle = IdleRam()
    idle.grow(5)
    idle.note(1000, compiled=False)
    idle.grow(500)
    assert left(idle)[0] == 0
    idle.note(1490, compiled=False)
    assert left(idle)[0] == 0
