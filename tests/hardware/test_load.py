from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoflux.hardware import load
from autoflux.hardware.load import Moment, share_left

BEGUN = Moment(wall=10.0, idle=100.0, own=3.0, all=500.0)


def later(*, seconds: float, idle: float, own: float) -> Moment:
    return Moment(BEGUN.wall + seconds, BEGUN.idle + idle, BEGUN.own + own, BEGUN.all + 2 * seconds)


@pytest.mark.parametrize(
    ("idle", "own", "share"),
    [
        (0.0, 20.0, 1.0),  # computed on both processors all the time
        (10.0, 10.0, 1.0),  # on one, and the other was at rest
        (0.0, 10.0, 0.5),  # on one, and somebody else on the other
        (0.0, 4.0, 0.2),
        (600.0, 4.0, 1.0),  # in a container on a large host
    ],
)
def test_what_is_left_is_what_was_had_or_at_rest(idle, own, share):
    assert share_left(BEGUN, later(seconds=10, idle=idle, own=own), 2) == pytest.approx(share)


@given(seconds=st.floats(0.01, 100), idle=st.floats(0, 1000), own=st.floats(0, 1000), cores=st.integers(1, 256))
def test_it_is_a_share(seconds, idle, own, cores):
    assert 0 <= share_left(BEGUN, later(seconds=seconds, idle=idle, own=own), cores) <= 1


def test_what_the_system_does_not_tell_is_not_known():
    assert share_left(None, BEGUN, 2) is None
    assert share_left(BEGUN, None, 2) is None
    assert share_left(BEGUN, BEGUN, 2) is None
    silent = later(seconds=10, idle=0, own=5)._replace(all=BEGUN.all)
    assert share_left(BEGUN, silent, 2) is None


@pytest.mark.skipif(sys.platform not in ("linux", "darwin", "win32"), reason="psutil knows these")
def test_this_system_tells():
    begun = load.moment()
    assert begun is not None
    assert begun.own > 0
    assert begun.all > begun.idle >= 0


def test_more_processors_than_there_are_cannot_be_quiet():
    assert not load.is_quiet(100_000)
