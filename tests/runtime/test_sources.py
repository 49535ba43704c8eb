"""Sources: every unit on the host, or read ahead into a stage by a thread; its order, its errors and its end."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoflux.runtime.sources import HostUnits, StagedUnits
from autoflux.runtime.stores import KeptStore, ModuleStore
from tests.runtime.fakes import CPU, Chain, NeverMark, layer_units, read_ahead_threads

LONG = 10
"""Seconds until a test gives up waiting for what must come."""


class Shelf:
    """A store that knows what each unit holds and writes down what is read; it can be made to wait or to raise."""

    def __init__(self, units) -> None:
        self.numbers = {id(unit): k for k, unit in enumerate(units)}
        self.read_so_far: list[int] = []
        self.fails_at: set[int] = set()
        self.open = threading.Event()
        self.open.set()
        self.changed = threading.Condition()

    def read(self, unit, target) -> None:
        k = self.numbers[id(unit)]
        assert target.numel() >= unit.nbytes
        with self.changed:
            self.read_so_far.append(k)
            self.changed.notify_all()
        assert self.open.wait(LONG)
        if k in self.fails_at:
            raise OSError(f"no unit {k}")
        target.fill_(k + 1)

    def wait_for(self, count: int) -> list[int]:
        """What was read, once it is that many."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.read_so_far) >= count, LONG), self.read_so_far
            return list(self.read_so_far)

    def settled(self, count: int) -> list[int]:
        """What was read a while after it was that many."""
        self.wait_for(count)
        time.sleep(0.03)
        return list(self.read_so_far)


class Gate(NeverMark):
    """A mark that the device passes when the test says so."""

    def __init__(self) -> None:
        self.passed = threading.Event()

    def synchronize(self) -> None:
        assert self.passed.wait(LONG)


def equal_units(count=4, width=16):
    return layer_units(Chain((width,) * count))


@pytest.fixture(autouse=True)
def _no_thread_stays():
    yield
    assert not list(read_ahead_threads())


@pytest.fixture
def staged():
    """Make a source that is closed at the end."""
    made = []

    def make(units, store, stage_units=0):
        size = stage_units * max((unit.nbytes for unit in units), default=0)
        made.append(StagedUnits(units, CPU, store, stage_bytes=size))
        return made[-1]

    yield make
    for source in made:
        source.close()


def bring(source, k) -> None:
    """What a streamer does with a unit; its bytes must be the shelf's."""
    assert (source.get(k) == k + 1).all(), k
    source.sent(k, NeverMark())


def bring_all(source, order) -> None:
    for k in order:
        source.expect(k)
        bring(source, k)


# Everything on the host


def test_host_units_hold_every_unit_exactly_once():
    chain = Chain()
    units = layer_units(chain)
    wanted = [[piece.tensor.clone() for piece in unit.pieces] for unit in units]
    source = HostUnits(units, CPU, ModuleStore())
    assert source.pinned_bytes == sum(unit.nbytes for unit in units)
    for k, unit in enumerate(units):
        memory = source.get(k)
        assert memory.numel() == unit.nbytes
        assert all(torch.equal(a, b) for a, b in zip(unit.views(memory), wanted[k], strict=True))
        assert {p.tensor.untyped_storage().data_ptr() for p in unit.pieces} == {memory.data_ptr()}


def test_a_failing_store_reaches_the_maker_of_host_units():
    units = equal_units()
    shelf = Shelf(units)
    shelf.fails_at = {2}
    with pytest.raises(OSError, match="no unit 2"):
        HostUnits(units, CPU, shelf)


# Read ahead


@pytest.mark.parametrize("stage_units", [0, 3, 4, 9, 40])
@pytest.mark.parametrize("widths", [(16,) * 4, (16, 24, 8, 40), (16,), (40, 8)])
def test_units_come_in_order_pass_after_pass(staged, widths, stage_units):
    units = layer_units(Chain(widths))
    source = staged(units, Shelf(units), stage_units)
    for _ in range(5):
        for k in range(len(units)):
            source.expect(k)
            bring(source, k)


def test_the_stage_holds_the_largest_unit_twice_and_no_more_than_asked():
    units = layer_units(Chain((16, 24, 8, 40)))
    largest = max(unit.nbytes for unit in units)
    for asked in (0, 5 * largest):
        source = StagedUnits(units, CPU, Shelf(units), stage_bytes=asked)
        assert max(2 * largest, asked) <= source.pinned_bytes <= max(2 * (largest + 4096), asked)
        source.close()


def test_reading_runs_ahead_as_far_as_the_stage_reaches_and_no_further(staged):
    units = equal_units(6, 64)  # of more than a page, so that a stage for three has no room for a fourth
    shelf = Shelf(units)
    source = staged(units, shelf, 3)
    assert shelf.settled(3) == [0, 1, 2]
    source.get(0)
    assert shelf.settled(3) == [0, 1, 2], "unit 0 has not left yet"
    source.sent(0, NeverMark())
    assert shelf.settled(4) == [0, 1, 2, 3]


def test_a_place_is_not_written_before_its_copy_has_left(staged):
    units = equal_units(4, 64)
    shelf = Shelf(units)
    source = staged(units, shelf)  # two places
    marks = [Gate() for _ in range(4)]
    shelf.wait_for(2)
    waiting = source.get(0)
    source.sent(0, marks[0])
    assert shelf.settled(2) == [0, 1]
    assert (waiting == 1).all()
    marks[0].passed.set()
    shelf.wait_for(3)
    source.get(1)
    source.sent(1, marks[1])
    marks[1].passed.set()
    assert shelf.wait_for(4) == [0, 1, 2, 3]
    assert (source.get(2) == 3).all()


@settings(max_examples=40, deadline=None)
@given(
    widths=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    stage=st.integers(0, 60_000),
    jumps=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), max_size=8),
)
def test_any_unit_may_be_expected_next(widths, stage, jumps):
    units = layer_units(Chain(tuple(widths)))
    source = StagedUnits(units, CPU, Shelf(units), stage_bytes=stage)
    try:
        for start, count in jumps:
            source.expect(start % len(units))
            for k in range(start, start + count):
                bring(source, k % len(units))
    finally:
        source.close()


def test_a_restart_in_the_middle_of_a_read(staged):
    units = equal_units(4, 64)
    shelf = Shelf(units)
    shelf.open.clear()
    source = staged(units, shelf)
    shelf.wait_for(1)
    source.expect(2)  # while unit 0 is being read
    shelf.open.set()
    for k in (2, 3, 0, 1, 2):
        bring(source, k)
    assert shelf.read_so_far[:3] == [0, 2, 3]


def test_a_restart_waits_for_copies_under_way(staged):
    units = equal_units(4, 64)
    source = staged(units, Shelf(units))
    source.get(0)
    mark = Gate()
    source.sent(0, mark)
    restarted = threading.Thread(target=source.expect, args=(3,))
    restarted.start()
    restarted.join(0.1)
    assert restarted.is_alive(), "what it copies from may be overwritten"
    mark.passed.set()
    restarted.join(LONG)
    bring(source, 3)


def test_expecting_what_comes_anyway_reads_nothing_again(staged):
    units = equal_units(4, 64)
    shelf = Shelf(units)
    source = staged(units, shelf, 3)
    for k in (0, 1, 2, 3, 0):
        source.expect(k)
        bring(source, k)
    assert shelf.settled(8) == [0, 1, 2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize("stage_units", [0, 3, 40])
@pytest.mark.parametrize("broken", range(4))
def test_an_error_of_the_store_reaches_who_asks_and_the_next_use_works(staged, broken, stage_units):
    units = equal_units()
    shelf = Shelf(units)
    shelf.fails_at = {broken}
    source = staged(units, shelf, stage_units)
    for _ in range(2):
        with pytest.raises(OSError, match=f"no unit {broken}"):
            bring_all(source, range(4))
    shelf.fails_at = set()
    source.expect(broken)
    with contextlib.suppress(OSError):  # it may have been read ahead before it was mended
        source.get(broken)
    bring_all(source, [*range(broken, 4), *range(4)])


def test_an_error_from_before_a_restart_is_forgotten(staged):
    units = equal_units(4, 64)
    shelf = Shelf(units)
    shelf.fails_at = {1}
    source = staged(units, shelf)
    assert shelf.settled(2) == [0, 1]
    shelf.fails_at = set()
    source.expect(3)
    for k in (3, 0, 1, 2):
        bring(source, k)


def test_reading_stops_at_an_error_until_someone_asks(staged):
    units = equal_units(4, 64)
    shelf = Shelf(units)
    shelf.fails_at = {0}
    staged(units, shelf)
    assert shelf.settled(1) == [0]


def test_closing_while_reading_waits_for_the_read_and_ends_the_thread():
    units = equal_units()
    shelf = Shelf(units)
    shelf.open.clear()
    source = StagedUnits(units, CPU, shelf)
    shelf.wait_for(1)
    closing = threading.Thread(target=source.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive(), "the memory is still being written"
    shelf.open.set()
    closing.join(LONG)
    assert not closing.is_alive()
    assert not list(read_ahead_threads())
    source.close()


def test_asking_after_the_end_is_an_error_and_no_wait():
    units = equal_units()
    source = StagedUnits(units, CPU, Shelf(units))
    source.close()
    with pytest.raises(RuntimeError, match=r"'layers\.1' was asked for after the end"):
        source.get(1)


def test_who_waits_for_a_unit_is_released_by_the_end():
    units = equal_units()
    shelf = Shelf(units)
    shelf.open.clear()
    source = StagedUnits(units, CPU, shelf)
    told = []

    def ask():
        with pytest.raises(RuntimeError, match="after the end"):
            source.get(0)
        told.append(True)

    asking = threading.Thread(target=ask)
    asking.start()
    shelf.wait_for(1)
    closing = threading.Thread(target=source.close)
    closing.start()
    asking.join(LONG)
    shelf.open.set()
    closing.join(LONG)
    assert told


def test_no_units_take_no_thread_and_no_memory():
    source = StagedUnits([], CPU, ModuleStore())
    assert source.pinned_bytes == 0
    assert not list(read_ahead_threads())
    source.close()


@pytest.mark.parametrize("store", [lambda units: ModuleStore(), KeptStore])
def test_a_modules_own_weights_are_kept_while_it_points_elsewhere(staged, store):
    chain, plain = Chain(), Chain()
    units = layer_units(chain)
    source = staged(units, store(units))
    for unit in units:
        unit.point_at(torch.full((unit.nbytes,), 255, dtype=torch.uint8))
    for _ in range(2):
        for k, unit in enumerate(units):
            found = unit.views(source.get(k))
            assert all(torch.equal(a, b) for a, b in zip(found, plain.layers[k].parameters(), strict=True))
            source.sent(k, NeverMark())
