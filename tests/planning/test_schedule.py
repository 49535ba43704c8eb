"""Where units lie in the ring, how long a pass takes, and which units stay."""

from __future__ import annotations

import random
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoflux.planning.schedule import (
    ALIGNMENT,
    CONTENTION,
    SLOWER_LINK,
    Unit,
    aligned,
    bound_seconds,
    choose_resident,
    contended_seconds,
    filled,
    lay_out,
    pass_seconds,
    trace_pass,
)

MB, GB = 10**6, 10**9
FLUX = [Unit(680 * MB, 3e-3)] * 19 + [Unit(283 * MB, 3e-3)] * 38
"""FLUX.1-dev's blocks in bf16."""

UNHURRIED = settings(deadline=None)
"""Other work on the machine fails no test."""

PAUSES = st.sampled_from([0.0, 0.25, 3.0])
SIZES = st.lists(st.integers(1, 20 * ALIGNMENT), min_size=1, max_size=12)


@st.composite
def schedules(draw):
    """Units, the residents among them, a ring that the others fit, and a link."""
    moments = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 7.0])
    units = [Unit(size, draw(moments)) for size in draw(SIZES)]
    resident = draw(st.frozensets(st.integers(0, len(units) - 1)))
    ring = max(aligned(unit.nbytes) for unit in units) + draw(st.integers(0, 60)) * ALIGNMENT
    return units, resident, ring, draw(st.sampled_from([256.0, 1024.0, 4096.0]))


def literal_pass_seconds(units, resident, ring, bytes_per_second, pause=0.0, passes=12):
    """The ring, byte row by byte row, and both streams: when the last pass begins and ends."""
    streamed = [i for i in range(len(units)) if i not in resident]
    offsets = dict(zip(streamed, lay_out([units[i].nbytes for i in streamed], ring).offsets, strict=True))
    free_at = [0.0] * (ring // ALIGNMENT)
    copied = now = began = 0.0
    for _ in range(passes):
        began = now
        now += pause
        for i, unit in enumerate(units):
            if i in resident:
                now += unit.seconds
                continue
            rows = range(offsets[i] // ALIGNMENT, (offsets[i] + aligned(unit.nbytes)) // ALIGNMENT)
            copied = max([copied, *(free_at[row] for row in rows)]) + unit.nbytes / bytes_per_second
            now = max(now, copied) + unit.seconds
            for row in rows:
                free_at[row] = now
    return now - began


@UNHURRIED
@given(sizes=SIZES, spare=st.integers(0, 60 * ALIGNMENT))
def test_units_lie_inside_the_ring(sizes, spare):
    ring = max(map(aligned, sizes)) + spare
    layout = lay_out(sizes, ring)
    assert all(offset % ALIGNMENT == 0 for offset in layout.offsets)
    assert all(offset + size <= ring for offset, size in zip(layout.offsets, sizes, strict=True))
    assert all(1 <= distance <= len(sizes) for distance in layout.distances)


@UNHURRIED
@given(sizes=SIZES, spare=st.integers(0, 60), passes=st.integers(2, 4))
def test_no_copy_overwrites_a_unit_that_has_not_computed(sizes, spare, passes):
    ring = max(map(aligned, sizes)) + spare * ALIGNMENT
    offsets, distances = lay_out(sizes, ring)
    count = len(sizes)
    holder = [-1] * (ring // ALIGNMENT)

    def rows(number):
        begin = offsets[number % count] // ALIGNMENT
        return range(begin, begin + aligned(sizes[number % count]) // ALIGNMENT)

    sent = 0
    for computing in range(passes * count):
        # Copies come as early as they may, before each unit computes.
        while sent - distances[sent % count] < computing:
            for row in rows(sent):
                assert holder[row] < computing, f"copy {sent} overwrites unit {holder[row]} before {computing}"
                holder[row] = sent
            sent += 1
        assert sent > computing, "the next unit cannot be copied"
        assert all(holder[row] == computing for row in rows(computing))


@UNHURRIED
@given(sizes=SIZES, spare=st.integers(0, 60))
def test_a_copy_waits_for_no_more_than_it_must(sizes, spare):
    ring = max(map(aligned, sizes)) + spare * ALIGNMENT
    offsets, distances = lay_out(sizes, ring)
    for k, distance in enumerate(distances):
        if distance < len(sizes):
            other = (k - distance) % len(sizes)
            assert offsets[other] < offsets[k] + aligned(sizes[k])
            assert offsets[k] < offsets[other] + aligned(sizes[other])


def test_layouts_that_can_be_checked_by_hand():
    assert lay_out([256] * 4, 512) == ((0, 256, 0, 256), (2, 2, 2, 2))
    assert lay_out([512, 256, 256], 512) == ((0, 0, 256), (1, 1, 2))
    assert lay_out([100], 256) == ((0,), (1,))
    assert lay_out([256] * 3, 10_000) == ((0, 256, 512), (3, 3, 3))
    assert lay_out([], 0) == ((), ())


def test_a_unit_larger_than_the_ring_is_an_error():
    with pytest.raises(ValueError, match="512 bytes does not fit a ring of 511"):
        lay_out([256, 300], 511)
    with pytest.raises(ValueError, match="does not fit"):
        pass_seconds([Unit(513, 1)], (), 512, 1e9)


@UNHURRIED
@given(schedules(), PAUSES)
def test_a_pass_takes_what_the_literal_ring_takes(schedule, pause):
    assert pass_seconds(*schedule, pause=pause) == pytest.approx(literal_pass_seconds(*schedule, pause), abs=1e-9)


@UNHURRIED
@given(schedules(), PAUSES)
def test_a_trace_is_the_pass_that_is_measured(schedule, pause):
    units, resident, _, speed = schedule
    trace = trace_pass(*schedule, pause=pause)
    assert trace.seconds == pytest.approx(pass_seconds(*schedule, pause=pause), rel=1e-12)
    assert trace.passages[0].compute.begin >= pause - 1e-9
    assert [passage.copy is None for passage in trace.passages] == [i in resident for i in range(len(units))]
    assert trace.passages[-1].compute.end == pytest.approx(trace.seconds)
    for unit, (copy, compute) in zip(units, trace.passages, strict=True):
        assert compute.end - compute.begin == pytest.approx(unit.seconds, abs=1e-9)
        assert copy is None or copy.end - copy.begin == pytest.approx(unit.nbytes / speed, abs=1e-9)


@UNHURRIED
@given(schedules())
def test_in_a_trace_neither_stream_does_two_things_at_once(schedule):
    trace = trace_pass(*schedule)
    computes = [passage.compute for passage in trace.passages]
    assert computes[0].begin >= -1e-9
    for stream in (computes, [passage.copy for passage in trace.passages if passage.copy]):
        assert all(before.end <= after.begin + 1e-9 for before, after in pairwise(stream))
        # Nor does the end of a pass overlap the beginning of the next.
        assert not stream or stream[-1].end <= stream[0].begin + trace.seconds + 1e-9


@UNHURRIED
@given(schedules())
def test_in_a_trace_a_unit_waits_for_its_copy_and_a_copy_for_its_room(schedule):
    units, resident, ring, _ = schedule
    trace = trace_pass(*schedule)
    streamed = [i for i in range(len(units)) if i not in resident]
    distances = lay_out([units[i].nbytes for i in streamed], ring).distances
    for k, distance in enumerate(distances):
        copy, compute = trace.passages[streamed[k]]
        assert copy.end <= compute.begin + 1e-9
        # The last unit to lie there may have computed in the pass before.
        earlier = 0.0 if k >= distance else trace.seconds
        freed = trace.passages[streamed[k - distance]].compute.end - earlier
        assert freed <= copy.begin + 1e-9


def test_a_trace_that_can_be_checked_by_hand():
    one = trace_pass([Unit(512, 3.0), Unit(512, 1.0)], {1}, 512, 256.0)
    # The copy of the next pass begins when the unit has computed, beside what stays.
    assert one == (5.0, (((-1.0, 1.0), (1.0, 4.0)), (None, (4.0, 5.0))))
    assert trace_pass([Unit(512, 3.0)], {0}, 512, 256.0) == (3.0, ((None, (0.0, 3.0)),))
    assert trace_pass([], (), 0, 1.0) == (0.0, ())


@UNHURRIED
@given(schedules(), PAUSES)
def test_no_pass_beats_the_bound(schedule, pause):
    units, resident, _, speed = schedule
    assert pass_seconds(*schedule, pause=pause) >= bound_seconds(units, resident, speed, pause=pause) - 1e-9


@UNHURRIED
@given(schedules(), PAUSES)
def test_copies_take_from_arithmetic_what_they_do_not_make_it_wait(schedule, pause):
    units, resident, ring, speed = schedule
    alone = pass_seconds(units, resident, ring, speed, pause=pause)
    found = contended_seconds(units, resident, ring, speed, pause=pause)
    copied = sum(unit.nbytes for i, unit in enumerate(units) if i not in resident)
    computing = pause + sum(unit.seconds for unit in units)
    assert alone <= found <= alone + CONTENTION * copied + 1e-9
    assert found >= computing + CONTENTION * copied - 1e-9
    count = len(units) - len(set(resident))
    apart = contended_seconds(units, resident, ring, speed, pause=pause, handoff=0.5)
    assert apart == pytest.approx(max(alone, computing + CONTENTION * copied + 0.5 * count))


@UNHURRIED
@given(schedules(), st.integers(0, 250 * ALIGNMENT))
def test_what_is_filled_up_keeps_what_stays_and_fits(schedule, budget):
    units, _, ring, speed = schedule
    resident = choose_resident(units, budget, ring, speed)
    more = filled(units, resident, budget)
    assert resident <= more
    assert sum(aligned(units[i].nbytes) for i in more) <= budget
    left = budget - sum(aligned(units[i].nbytes) for i in more)
    assert all(aligned(units[i].nbytes) > left for i in set(range(len(units))) - more)


def test_a_trace_can_be_stretched():
    trace = trace_pass([Unit(512, 3.0), Unit(512, 1.0)], {1}, 512, 256.0)
    longer = trace.stretched(2)
    assert longer.seconds == 2 * trace.seconds
    for before, after in zip(trace.passages, longer.passages, strict=True):
        assert after.compute == (2 * before.compute.begin, 2 * before.compute.end)
        assert (after.copy is None) == (before.copy is None)
    assert longer.passages[0].copy == (2 * trace.passages[0].copy.begin, 2 * trace.passages[0].copy.end)


@UNHURRIED
@given(schedules())
def test_all_resident_takes_what_computing_takes(schedule):
    units, _, ring, speed = schedule
    everything = range(len(units))
    assert pass_seconds(units, everything, ring, speed) == pytest.approx(sum(unit.seconds for unit in units))
    assert bound_seconds(units, everything, speed) == pytest.approx(sum(unit.seconds for unit in units))


@UNHURRIED
@given(schedules(), st.floats(1, 10))
def test_a_faster_link_is_never_slower(schedule, times):
    units, resident, ring, speed = schedule
    assert pass_seconds(units, resident, ring, speed * times) <= pass_seconds(*schedule) + 1e-9


def test_weights_are_copied_while_a_pass_has_not_begun_to_compute():
    units = [Unit(512, 3.0), Unit(512, 3.0)]
    assert pass_seconds(units, {0, 1}, 512, 256.0, pause=1.0) == pytest.approx(7.0)
    # There is room for both: copies take 4 of the 7 seconds and hide.
    assert pass_seconds(units, (), 1024, 256.0, pause=1.0) == pytest.approx(7.0)
    # Copies take all of the time, and the pause hides.
    assert pass_seconds([Unit(512, 1.0)] * 4, (), 1024, 256.0, pause=1.0) == pytest.approx(8.0)


def test_residents_are_chosen_with_the_pause_in_mind():
    ring, link, pause = 2 * aligned(FLUX[0].nbytes), 55e9, 0.02
    chosen = choose_resident(FLUX, 9 * GB, ring, link, pause=pause)
    unaware = choose_resident(FLUX, 9 * GB, ring, link)
    assert pass_seconds(FLUX, chosen, ring, link, pause=pause) < pass_seconds(FLUX, unaware, ring, link, pause=pause)


def test_one_unit_copies_and_computes_in_turn():
    assert pass_seconds([Unit(512, 3.0)], (), 512, 256.0) == pytest.approx(5.0)
    assert pass_seconds([Unit(512, 3.0)], (), 5120, 256.0) == pytest.approx(5.0)


def test_two_slots_hide_the_shorter_of_copying_and_computing():
    for seconds, longer in ((3.0, 3.0), (1.0, 2.0)):
        assert pass_seconds([Unit(512, seconds)] * 6, (), 1024, 256.0) == pytest.approx(6 * longer)


@UNHURRIED
@given(schedules(), st.integers(0, 250 * ALIGNMENT))
def test_chosen_residents_keep_within_the_budget(schedule, budget):
    units, _, ring, speed = schedule
    chosen = choose_resident(units, budget, ring, speed)
    assert chosen <= set(range(len(units)))
    assert sum(aligned(units[i].nbytes) for i in chosen) <= budget
    assert pass_seconds(units, chosen, ring, speed) <= pass_seconds(units, (), ring, speed) * 1.25 + 1e-9


@UNHURRIED
@given(schedules())
def test_a_budget_for_everything_keeps_everything(schedule):
    units, _, ring, speed = schedule
    chosen = choose_resident(units, sum(aligned(unit.nbytes) for unit in units), ring, speed)
    assert chosen == frozenset(range(len(units)))


def test_of_all_that_would_fit_only_what_is_of_use_stays_where_it_has_to_leave_again():
    ring, everything, fast = 2 * aligned(FLUX[0].nbytes), sum(aligned(unit.nbytes) for unit in FLUX), 100e9
    chosen = choose_resident(FLUX, everything, ring, fast, fewest=True)
    assert len(chosen) < len(FLUX)
    assert pass_seconds(FLUX, chosen, ring, fast) == pytest.approx(sum(unit.seconds for unit in FLUX))
    less = choose_resident(FLUX, everything * 9 // 10, ring, fast, fewest=True)
    assert len(chosen) <= len(less), "more memory would be of no use"


@pytest.mark.parametrize(("link", "budget", "most"), [(55e9, 16 * GB, 16 * GB), (100e9, 22 * GB, 19 * GB)])
def test_where_arithmetic_decides_as_much_stays_as_a_slower_link_needs_and_no_more(link, budget, most):
    ring, computing = 2 * aligned(FLUX[0].nbytes), sum(unit.seconds for unit in FLUX)
    chosen = choose_resident(FLUX, budget, ring, link)
    assert pass_seconds(FLUX, chosen, ring, link) == pytest.approx(computing)
    assert pass_seconds(FLUX, chosen, ring, SLOWER_LINK * link) == pytest.approx(computing)
    assert sum(FLUX[i].nbytes for i in chosen) < most


@pytest.mark.parametrize(
    "units", [[], [Unit(256, 1.0)], [Unit(0, 1.0)] * 2, FLUX, FLUX[19:], [Unit(MB * (i + 1), 1e-3) for i in range(9)]]
)
def test_one_two_and_many_sizes_can_be_chosen_from(units):
    total = sum(aligned(unit.nbytes) for unit in units)
    largest = max((aligned(unit.nbytes) for unit in units), default=0)
    nothing = choose_resident(units, 0, largest, 1e9)
    assert not any(units[i].nbytes for i in nothing)
    half = choose_resident(units, total // 2, 2 * largest, 1e9)
    assert sum(aligned(units[i].nbytes) for i in half) <= total // 2
    assert bool(half) == (len(units) > 1)
    assert choose_resident([Unit(0, 1.0), *units], total, largest, 1e9) >= set(range(1, len(units) + 1))


@pytest.mark.parametrize("link", [12e9, 25e9, 55e9])
def test_more_budget_is_never_slower_for_flux(link):
    ring = 2 * aligned(FLUX[0].nbytes)
    taken = [
        pass_seconds(FLUX, choose_resident(FLUX, budget * GB // 2, ring, link), ring, link) for budget in range(54)
    ]
    assert all(more <= less * (1 + 1e-9) for less, more in pairwise(taken))
    assert taken[-1] == pytest.approx(57 * 3e-3)


def test_residents_spread_over_the_pass_beat_residents_at_its_beginning():
    ring, budget, link = 2 * aligned(FLUX[0].nbytes), 12 * GB, 55e9
    chosen = choose_resident(FLUX, budget, ring, link)
    first = frozenset(range(budget // aligned(FLUX[0].nbytes)))
    spread, front = pass_seconds(FLUX, chosen, ring, link), pass_seconds(FLUX, first, ring, link)
    assert spread < 0.9 * front
    assert spread < 1.03 * bound_seconds(FLUX, chosen, link)


@pytest.mark.parametrize(("count", "kinds"), [(57, 2), (500, 1), (500, 2), (500, 3), (500, 500)])
def test_choosing_is_quick(count, kinds):
    source = random.Random(0)
    sizes = [source.randrange(MB, 100 * MB) for _ in range(kinds)]
    units = [Unit(source.choice(sizes), source.random() * 1e-3) for _ in range(count)]
    total, largest = sum(unit.nbytes for unit in units), max(aligned(unit.nbytes) for unit in units)
    began = time.process_time()
    choose_resident(units, total // 4, int(1.1 * largest), 25e9)
    assert time.process_time() - began < 1.5
