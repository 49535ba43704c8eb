"""Which blocks stay on the device and where the others pass through it: two streams simulated. Pure arithmetic.

A *unit* is what one copy moves: a layer, a block or several. In a pass (a denoise step) units run in order; those that
are not resident are copied, one after the other, into a ring of device memory while earlier ones compute. The ring is
filled front to back and a unit's place is the same in every pass, so that parameters can point at it for good. Before
the first unit of each pass there is a *pause*, in which no unit computes and copies go on: the rest of a denoise step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, islice
from operator import itemgetter
from typing import NamedTuple, Protocol

ALIGNMENT = 256
"""Bytes at whose multiples tensors begin, as torch's CUDA allocator does."""

MOST_SPREAD = 64
"""Mixtures of two sizes that are tried: all of them for the blocks of FLUX."""

SLOWER_LINK = 0.9
"""Of the link's rate: what nothing is lost by being ready for. It is shared with other programs and other cards."""

ROUNDED = 1 + 1e-9
"""Sums of the same seconds in another order differ by less."""

MOST_MOVED = 500_000
"""Units that are simulated while residents are moved, a third of a second: 2,000 moves among 57 units."""

PHASES = (0.0, 0.25, 0.5, 0.75)
"""Where evenly spread units begin, in parts of the distance between two."""

CONTENTION = 0.75e-12
"""How much longer arithmetic takes for each byte that is copied meanwhile, in seconds. One H200: steps that wait for no
copy take 0.6 to 0.9 ms longer for each GB that is streamed (benchmarks/planning.py)."""

STEADY_PASSES = 4
"""Passes until the simulation repeats itself: the first starts with an empty ring."""


_Step = tuple[float, float, int]
"""A unit's turn: seconds it computes, seconds it is copied, and its distance, which is 0 if it stays. Not a named
tuple, which takes longer to make and to unpack: the search simulates hundreds of thousands."""


class Unit(NamedTuple):
    """What one copy moves, and how long the device computes with it."""

    nbytes: int
    seconds: float


class RingLayout(NamedTuple):
    """Where streamed units lie in the ring.

    Unit k may be copied once the unit `distances[k]` places before it (counting on from pass to pass) has computed:
    that is the last one to lie where k goes.
    """

    offsets: tuple[int, ...]
    distances: tuple[int, ...]


class Span(NamedTuple):
    """Seconds from the beginning of a pass."""

    begin: float
    end: float


class Passage(NamedTuple):
    """One unit's way through a pass; `copy` is None if it stays. Copies run ahead: one may begin before its pass."""

    copy: Span | None
    compute: Span

    def stretched(self, times: float) -> Passage:
        """The same in a pass that takes so many times as long."""
        copy = Span(self.copy.begin * times, self.copy.end * times) if self.copy else None
        return Passage(copy, Span(self.compute.begin * times, self.compute.end * times))


class PassTrace(NamedTuple):
    """A pass, unit by unit in order. In steady state the next pass is the same, `seconds` later."""

    seconds: float
    passages: tuple[Passage, ...]

    def stretched(self, times: float) -> PassTrace:
        """The same in a pass that takes so many times as long, everything in it in proportion."""
        return PassTrace(self.seconds * times, tuple(passage.stretched(times) for passage in self.passages))


def aligned(nbytes: int) -> int:
    """The next multiple of the alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def lay_out(sizes: Sequence[int], ring_bytes: int) -> RingLayout:
    """Fill the ring front to back, again and again.

    Raises:
        ValueError: a unit is larger than the ring.
    """
    spans: list[tuple[int, int]] = []
    at = 0
    for size in map(aligned, sizes):
        if size > ring_bytes:
            raise ValueError(f"a unit of {size} bytes does not fit a ring of {ring_bytes}")
        at = 0 if at + size > ring_bytes else at
        spans.append((at, at + size))
        at += size
    return RingLayout(tuple(begin for begin, _ in spans), tuple(_distance(spans, k) for k in range(len(spans))))


def _distance(spans: Sequence[tuple[int, int]], k: int) -> int:
    begin, end = spans[k]
    for distance in range(1, len(spans)):
        other_begin, other_end = spans[k - distance]
        if other_begin < end and begin < other_end:
            return distance
    return len(spans)


def pass_seconds(
    units: Sequence[Unit], resident: Collection[int], ring_bytes: int, bytes_per_second: float, *, pause: float = 0.0
) -> float:
    """Seconds one pass takes, its pause included, once the first ones are over."""
    if all(map(resident.__contains__, range(len(units)))):
        return pause + sum(unit.seconds for unit in units)
    steps = _steps(units, resident, ring_bytes, bytes_per_second)
    released: list[float] = []
    now = copied = began = 0.0
    for _ in range(STEADY_PASSES):
        began = now
        copied, now = _advance(steps, released, copied, now + pause)
    return now - began


def contended_seconds(
    units: Sequence[Unit],
    resident: Collection[int],
    ring_bytes: int,
    bytes_per_second: float,
    *,
    pause: float = 0.0,
    handoff: float = 0.0,
) -> float:
    """The same, with what copies take from arithmetic where that is what a pass waits for; each unit that is streamed
    takes it `handoff` seconds more."""
    streamed = [unit.nbytes for i, unit in enumerate(units) if i not in resident]
    taken = CONTENTION * sum(streamed) + handoff * len(streamed)
    computing = pause + sum([unit.seconds for unit in units])
    return max(computing + taken, pass_seconds(units, resident, ring_bytes, bytes_per_second, pause=pause))


def trace_pass(
    units: Sequence[Unit], resident: Collection[int], ring_bytes: int, bytes_per_second: float, *, pause: float = 0.0
) -> PassTrace:
    """When each unit is copied and computes in the pass that `pass_seconds` measures."""
    steps = _steps(units, resident, ring_bytes, bytes_per_second)
    released: list[float] = []
    copied = now = 0.0
    for _ in range(STEADY_PASSES - 1):
        copied, now = _advance(steps, released, copied, now + pause)
    began = now
    now += pause
    passages = []
    for step in steps:
        copied, now = _advance((step,), released, copied, now)
        seconds, copying, distance = step
        copy = Span(copied - copying - began, copied - began) if distance else None
        passages.append(Passage(copy, Span(now - seconds - began, now - began)))
    return PassTrace(now - began, tuple(passages))


def _steps(units: Sequence[Unit], resident: Collection[int], ring_bytes: int, bytes_per_second: float) -> list[_Step]:
    streamed = tuple([unit.nbytes for i, unit in enumerate(units) if i not in resident])
    distances = iter(_distances(streamed, ring_bytes))
    return [
        (unit.seconds, 0.0, 0) if i in resident else (unit.seconds, unit.nbytes / bytes_per_second, next(distances))
        for i, unit in enumerate(units)
    ]


@lru_cache(maxsize=1024)
def _distances(sizes: tuple[int, ...], ring_bytes: int) -> tuple[int, ...]:
    """As of `lay_out`; kept, as most moves of residents leave the sizes of what is streamed in the same order."""
    return lay_out(sizes, ring_bytes).distances


def _advance(steps: Iterable[_Step], released: list[float], copied: float, now: float) -> tuple[float, float]:
    """Run `steps`: when the last copy and the last computation have ended, given when those before them did.

    `released` holds when each streamed unit so far has computed, and is added to.
    """
    for seconds, copying, distance in steps:
        if distance:
            free = released[-distance] if distance <= len(released) else 0.0
            # Not `max`: calling it takes longer than all else here.
            copied = (copied if copied > free else free) + copying  # noqa: FURB136
            now = (now if now > copied else copied) + seconds  # noqa: FURB136
            released.append(now)
        else:
            now += seconds
    return copied, now


def bound_seconds(
    units: Iterable[Unit], resident: Collection[int], bytes_per_second: float, *, pause: float = 0.0
) -> float:
    """What no schedule can beat: the larger of all arithmetic and all copies."""
    every = list(units)
    copying = sum([unit.nbytes for i, unit in enumerate(every) if i not in resident]) / bytes_per_second
    return max(pause + sum([unit.seconds for unit in every]), copying)


def choose_resident(
    units: Sequence[Unit],
    budget_bytes: int,
    ring_bytes: int,
    bytes_per_second: float,
    *,
    pause: float = 0.0,
    fewest: bool = False,
) -> frozenset[int]:
    """The units to keep on the device, together at most `budget_bytes`, for the shortest pass.

    Blocks of FLUX come in two sizes that compute equally long, so both how many of each stay and where they are
    matters: copies should never wait for room nor arithmetic for copies. Evenly spread choices of every mixture are
    simulated, then single residents are moved as long as that helps. Where all fit, all stay, but for no more than are
    of use with `fewest`, as where they leave for each decode.
    """
    if not fewest and _bytes(units, range(len(units))) <= budget_bytes:
        return frozenset(range(len(units)))

    def seconds(resident: frozenset[int], rate: float = 1.0) -> float:
        return pass_seconds(units, resident, ring_bytes, rate * bytes_per_second, pause=pause)

    def bound(resident: frozenset[int]) -> float:
        return bound_seconds(units, resident, bytes_per_second, pause=pause)

    best, fastest = _fastest(units, _spread_choices(units, budget_bytes), seconds, bound)
    left = MOST_MOVED // max(1, len(units) * STEADY_PASSES)
    improved = True
    while improved and fastest > bound(best) * 1.001:
        improved = False
        for moved in islice(_moves(units, best), left):
            left -= 1
            if (found := seconds(moved)) < fastest * 0.9999:
                best, fastest, improved = moved, found, True
                break
    return best


def filled(units: Sequence[Unit], resident: frozenset[int], budget_bytes: int) -> frozenset[int]:
    """With as many more as fit the budget, evenly spread, large ones first: what stays is not copied, which takes from
    arithmetic even where it makes it wait for nothing."""
    left = budget_bytes - _bytes(units, resident)
    for size in sorted({unit.nbytes for unit in units}, reverse=True):
        others = tuple(i for i, unit in enumerate(units) if unit.nbytes == size and i not in resident)
        count = min(len(others), left // max(1, aligned(size)))
        resident |= _evenly(others, count, 0.5)
        left -= count * aligned(size)
    return resident


class _Seconds(Protocol):
    """How long a pass takes with these units resident, at that share of the link's rate."""

    def __call__(self, resident: frozenset[int], rate: float = 1.0) -> float: ...


def _fastest(
    units: Sequence[Unit],
    choices: Iterable[frozenset[int]],
    seconds: _Seconds,
    bound: Callable[[frozenset[int]], float],
) -> tuple[frozenset[int], float]:
    """The choice with the shortest pass, of equals the one that a slower link costs least, of these the smallest.

    Those that cannot be faster are not simulated.
    """

    def bounds(choice: frozenset[int]) -> tuple[float, int]:
        return bound(choice), sum([units[i].nbytes for i in choice])

    best, fastest, slower = frozenset[int](), math.inf, math.inf
    for (least, _), choice in sorted([(bounds(choice), choice) for choice in choices], key=itemgetter(0)):
        if least > fastest * ROUNDED or slower <= least * ROUNDED:
            break  # what is left is slower, or larger and no better
        found = seconds(choice)
        if found > fastest * ROUNDED:
            continue
        found_slower = seconds(choice, SLOWER_LINK)
        if found * ROUNDED < fastest or found_slower * ROUNDED < slower:
            best, fastest, slower = choice, found, found_slower
    return best, fastest


def _bytes(units: Sequence[Unit], chosen: Iterable[int]) -> int:
    return sum([aligned(units[i].nbytes) for i in chosen])


def _spread_choices(units: Sequence[Unit], budget_bytes: int) -> Iterator[frozenset[int]]:
    """No two alike, but for the first."""
    yield _proportional(units, budget_bytes)
    sizes = sorted({unit.nbytes for unit in units}, reverse=True)
    if not 1 <= len(sizes) <= 2 or 0 in sizes:
        return
    large, small = (tuple(i for i, unit in enumerate(units) if unit.nbytes == size) for size in (sizes[0], sizes[-1]))
    if len(sizes) == 1:
        small = ()
    for count in range(0, len(large) + 1, 1 + len(large) // MOST_SPREAD):
        left = budget_bytes - count * aligned(units[large[0]].nbytes)
        if left < 0:
            return
        others = min(len(small), left // aligned(units[small[0]].nbytes)) if small else 0
        yield from dict.fromkeys(_evenly(large, count, phase) | _evenly(small, others, phase) for phase in PHASES)


@lru_cache(maxsize=4096)
def _evenly(members: tuple[int, ...], count: int, phase: float) -> frozenset[int]:
    return frozenset([members[int((j + phase) * len(members) / count)] for j in range(count)])


def _proportional(units: Sequence[Unit], budget_bytes: int) -> frozenset[int]:
    """Keep a unit whenever the share of bytes kept so far has fallen behind the budget's share."""
    total = _bytes(units, range(len(units)))
    share = min(1.0, budget_bytes / total) if total else 1.0
    kept: set[int] = set()
    held = 0
    for i, seen in enumerate(accumulate(aligned(unit.nbytes) for unit in units)):
        size = aligned(units[i].nbytes)
        if held + size <= min(seen * share + 1e-6, budget_bytes):
            kept.add(i)
            held += size
    return frozenset(kept)


def _moves(units: Sequence[Unit], resident: frozenset[int]) -> Iterator[frozenset[int]]:
    """Each resident exchanged for a streamed neighbour of its size."""
    for i in sorted(resident):
        for j in (i - 1, i + 1, i - 2, i + 2):
            if 0 <= j < len(units) and j not in resident and units[j].nbytes == units[i].nbytes:
                yield (resident - {i}) | {j}
