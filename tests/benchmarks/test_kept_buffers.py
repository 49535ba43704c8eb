"""Pinned memory handed on from plan to plan."""

from __future__ import annotations

import torch

from autoflux.runtime.pinned import exact_buffer, offered
from benchmarks import kept_buffers
from benchmarks.kept_buffers import KeptBuffers

CPU = torch.device("cpu")


def test_buffers_of_a_plan_serve_the_next():
    kept = KeptBuffers(CPU)
    with offered(kept):
        first = [exact_buffer(nbytes, CPU) for nbytes in (10, 20, 10)]
    assert len({id(buffer) for buffer in first}) == 3
    assert kept.idle_bytes == 0
    kept.take_back()
    assert kept.idle_bytes == 40
    with offered(kept):
        second = [exact_buffer(nbytes, CPU) for nbytes in (10, 30)]
    assert second[0] in first
    assert second[1] not in first
    assert kept.idle_bytes == 30


def test_more_than_enough_is_given_up(monkeypatch):
    monkeypatch.setattr(kept_buffers, "MOST_IDLE_BYTES", 25)
    kept = KeptBuffers(CPU)
    first = [kept.take(nbytes) for nbytes in (10, 20)]
    kept.take_back()
    assert kept.idle_bytes == 0
    assert kept.take(20) not in first
