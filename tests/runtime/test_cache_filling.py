"""Files on their way into the page cache."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from autoflux.hardware import page_cache
from autoflux.runtime import cache_filling
from autoflux.runtime.cache_filling import (
    AHEAD_STEP,
    FILL_STEP,
    KNOWS_WHAT_IS_CACHED,
    Filling,
    fill_page_cache,
    read_ahead,
)
from tests.conftest import size

NBYTES = 2 * FILL_STEP + 1234
READINGS = {fill_page_cache: FILL_STEP, read_ahead: AHEAD_STEP}
"""And how much each reads at once."""

needs_linux = pytest.mark.skipif(not KNOWS_WHAT_IS_CACHED, reason="needs Linux")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that is not in the page cache, on a file system that has one."""
    file = tmp_path / "weights"
    file.write_bytes(bytes(NBYTES))
    if page_cache.CAN_DROP:
        page_cache.drop([file])
    return file


@pytest.fixture
def pieces(monkeypatch) -> list[tuple[str, int, int]]:
    """What is read, in order, instead of reading it."""
    read: list[tuple[str, int, int]] = []
    monkeypatch.setattr(
        cache_filling, "_read_piece", lambda piece, _: read.append((piece.path.name, piece.begin, piece.end))
    )
    return read


@needs_linux
@pytest.mark.parametrize("begin", READINGS)
def test_what_was_read_is_in_the_cache(path, begin):
    begin([path, path.with_name("gone")]).join()
    with path.open("rb") as opened:
        try:
            os.preadv(opened.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:  # in memory, for one; what is not cached is EAGAIN
                pytest.skip("this file system does not tell what is cached")
            raise
        assert all(cache_filling.is_cached(opened.fileno(), at, at + 1) for at in range(0, NBYTES, FILL_STEP // 2))


@needs_linux
@pytest.mark.parametrize("begin", READINGS)
def test_every_piece_is_read_once(path, pieces, begin):
    second = path.with_name("more")
    second.write_bytes(b"x")
    begin([path, second]).join()
    step = READINGS[begin]
    wanted = [("weights", at, min(at + step, NBYTES)) for at in range(0, NBYTES, step)] + [("more", 0, 1)]
    assert sorted(pieces) == sorted(wanted)


def test_one_thread_reads_in_order(path, pieces):
    Filling([path]).join()
    assert [begin for _, begin, _ in pieces] == [0, FILL_STEP, 2 * FILL_STEP]


def test_it_stops_where_it_is(path, monkeypatch):
    reading, go_on = threading.Event(), threading.Event()
    read: list[int] = []

    def read_piece(piece, _memory) -> None:
        read.append(piece.begin)
        reading.set()
        assert go_on.wait(10)

    monkeypatch.setattr(cache_filling, "_read_piece", read_piece)
    filling = Filling([path])
    assert reading.wait(10)
    filling.stop()
    go_on.set()
    filling.join()
    assert read == [0]


@pytest.mark.parametrize("begin", READINGS)
@pytest.mark.parametrize(("share", "reads"), [(2.0, KNOWS_WHAT_IS_CACHED), (1.9, False)])
def test_without_room_nothing_is_read(path, pieces, monkeypatch, begin, share, reads):
    host = cache_filling.read_host()
    monkeypatch.setattr(cache_filling, "read_host", lambda: host.replace(available_bytes=size(int(share * NBYTES))))
    begin([path]).join()
    assert bool(pieces) == reads


@pytest.mark.parametrize("begin", READINGS)
def test_no_files_are_no_work(tmp_path, pieces, begin):
    begin([]).join()
    begin([tmp_path / "gone"]).join()
    assert not pieces
