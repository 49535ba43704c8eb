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
from autoflux.runtime.pack_file import PAGE, PackFile, side_by_side

NBYTES = 40 * PAGE + 1234
DATA = random.Random(7).randbytes(NBYTES)


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
