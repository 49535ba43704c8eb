"""Ctrl-C while a worker is being started."""

from __future__ import annotations

import signal

import pytest

from autoflux.serving.process import _interrupts_deferred


def test_ctrl_c_waits_until_the_child_has_all_it_needs():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    started: list[bool] = []

    def start() -> None:
        with _interrupts_deferred():
            signal.raise_signal(signal.SIGINT)
            started.append(True)

    with pytest.raises(KeyboardInterrupt):
        start()
    assert started
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
