"""Reading a file past the page cache or through it: the same bytes, however they are asked for."""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoflux.hardware import page_cache
from autoflux.runtime import pack_file
from autoflux.runtime.pack_file import PAGE, PackFile, side_by_side

NBYTES = 40 * PAGE + 1234
DATA = random.Random(7).randbytes(NBYTES)


def can_read_past_cache() -> bool:
    try:
        os.close(os.open(__file__, os.O_RDONLY | os.O_DIRECT))
    except (OSError, AttributeError):
        return False
    return True


needs_direct = pytest.mark.skipif(not can_read_past_cache(), reason="needs Linux and a file system with O_DIRECT")


def drop(path: Path) -> None:
    """Out of the page cache with it, where that can be."""
    if page_cache.CAN_DROP:
        page_cache.drop([path])


class Bytes(NamedTuple):
    first: int
    length: int


@settings(deadline=None)
@given(
    st.lists(st.builds(Bytes, st.integers(0, 30), st.integers(1, 5))),
    st.integers(5, 20),
)
def test_what_is_read_together_lies_together(stretches, most):
    windows = list(side_by_side(stretches, most))
    assert [stretch for window in windows for stretch in window] == stretches
    for window in windows:
        first = window[0].first
        end = max(stretch.first + stretch.length for stretch in window)
        assert end - first <= most
        asked = {at for stretch in window for at in range(stretch.first, stretch.first + stretch.length)}
        assert asked == set(range(first, end)), "nothing before it or between is read"


def test_neighbours_are_read_together():
    stretches = [Bytes(0, 4), Bytes(4, 4), Bytes(8, 4), Bytes(13, 2), Bytes(0, 1)]
    assert [len(window) for window in side_by_side(stretches, 8)] == [2, 1, 1, 1]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("files") / "weights"
    file.write_bytes(DATA)
    return file


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("cached", [True, False])
@settings(max_examples=60, deadline=None)
@given(ends=st.tuples(st.integers(0, NBYTES - 1), st.integers(1, NBYTES)))
def test_any_range_has_the_bytes_of_the_file(path, once, cached, ends):
    first, end = min(ends), max(ends)
    if first == end:
        end += 1
    if cached:
        path.read_bytes()
    else:
        drop(path)
    file = PackFile(path, once=once)
    try:
        assert bytes(file.read(first, end)) == DATA[first:end]
    finally:
        file.close()


@pytest.mark.parametrize("once", [True, False])
def test_threads_do_not_read_over_each_other(path, once):
    drop(path)
    file = PackFile(path, once=once)

    def matches(number: int) -> bool:
        first = number * 997 % (NBYTES - 5000)
        return bytes(file.read(first, first + 5000)) == DATA[first : first + 5000]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(matches, range(200)))
    file.close()


class Timed:
    """A clock by which reads past the cache and through it take as long as a disk says."""

    def __init__(self, monkeypatch, *, past: float, through: float) -> None:
        self.now = 0.0
        self.past: list[bool] = []
        self._seconds = {True: past, False: through}
        self._real = os.preadv
        monkeypatch.setattr(pack_file.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(pack_file.os, "preadv", self._read)
        monkeypatch.setattr(pack_file, "is_cached", lambda *_: False)
        monkeypatch.setattr(pack_file, "_PACES", {})
        monkeypatch.setattr(pack_file, "SAMPLE_BYTES", 4 * PAGE)

    def _read(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        import fcntl  # not on Windows, and neither is O_DIRECT

        self.past.append(bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT))
        self.now += self._seconds[self.past[-1]]
        return self._real(descriptor, buffers, offset)


@needs_direct
@pytest.mark.parametrize(("past", "through"), [(1.0, 2.0), (2.0, 1.0)])
def test_a_disk_is_read_as_it_turns_out_to_be_faster(path, monkeypatch, past, through):
    timed = Timed(monkeypatch, past=past, through=through)
    for _ in range(2):  # another file of the same disk need not be tried again
        file = PackFile(path, once=True)
        for at in range(0, 20 * PAGE, PAGE):
            assert bytes(file.read(at, at + PAGE)) == DATA[at : at + PAGE]
        file.close()
    assert timed.past[:8].count(True) == 4, "both are tried"
    assert set(timed.past[8:]) == {past < through}


@needs_direct
def test_what_could_not_be_read_past_the_cache_is_no_sample_of_it(path, monkeypatch):
    timed = Timed(monkeypatch, past=0.0, through=1.0)
    read = timed._read

    def refused(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        count = read(descriptor, buffers, offset)
        if timed.past[-1]:
            raise OSError("larger sectors")
        return count

    monkeypatch.setattr(pack_file.os, "preadv", refused)
    file = PackFile(path, once=True)
    assert bytes(file.read(0, PAGE)) == DATA[:PAGE]
    assert bytes(file.read(PAGE, 2 * PAGE)) == DATA[PAGE : 2 * PAGE]
    file.close()
    assert timed.past == [True, False, False]
    (pace,) = pack_file._PACES.values()
    assert pace._nbytes[True] == 0


@needs_direct
def test_where_the_cache_has_no_room_it_is_left_alone(path, monkeypatch):
    timed = Timed(monkeypatch, past=2.0, through=1.0)
    monkeypatch.setattr(pack_file, "has_room", lambda _paths: False)
    file = PackFile(path, once=True)
    for at in range(0, 20 * PAGE, PAGE):
        file.read(at, at + PAGE)
    file.close()
    assert all(timed.past)


@pytest.mark.parametrize("once", [True, False])
def test_a_file_that_ends_early_is_told(path, once):
    file = PackFile(path, once=once)
    with pytest.raises(EOFError):
        file.read(NBYTES - 10, NBYTES + 10 * PAGE)
    file.close()


def test_a_file_system_that_cannot_read_past_the_cache_is_read_through_it():
    shared = Path("/dev/shm")
    if not shared.is_dir() or not os.access(shared, os.W_OK):
        pytest.skip("needs a file system in memory")
    file = shared / f"autoflux-test-{os.getpid()}"
    try:
        file.write_bytes(DATA)
        opened = PackFile(file, once=True)
        assert bytes(opened.read(5, 9000)) == DATA[5:9000]
        opened.close()
    finally:
        file.unlink(missing_ok=True)
