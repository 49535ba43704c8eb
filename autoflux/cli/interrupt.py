"""Ctrl-C: one clean end with exit code 130, also while a library is being imported.

A KeyboardInterrupt can be swallowed or turned into another exception by native code (numpy and torch do so during
import). So the first signal is remembered, and if the program has not ended some seconds later it is ended.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

EXIT_CODE = 130
"""128 + SIGINT, what shells expect."""

GRACE_SECONDS = 5.0

_seen = threading.Event()
_command_runs = threading.Event()


def seen() -> bool:
    """Whether Ctrl-C was pressed."""
    return _seen.is_set()


@contextmanager
def command_running() -> Iterator[None]:
    """The time in which there is something to clean up; outside of it Ctrl-C ends the process on the spot."""
    _command_runs.set()
    try:
        yield
    finally:
        _command_runs.clear()


def install() -> None:
    """Take SIGINT over; call before heavy imports."""
    signal.signal(signal.SIGINT, _on_interrupt)
    sys.unraisablehook = _unless_interrupted(sys.unraisablehook)


def _on_interrupt(_signal: int, _frame: FrameType | None) -> None:
    if _seen.is_set() or not _command_runs.is_set():
        os._exit(EXIT_CODE)
    _seen.set()
    timer = threading.Timer(GRACE_SECONDS, os._exit, (EXIT_CODE,))
    timer.daemon = True
    timer.start()
    raise KeyboardInterrupt


def _unless_interrupted(hook: Callable[[Any], object]) -> Callable[[Any], object]:
    def quiet(unraisable: Any) -> None:
        if not seen():
            hook(unraisable)

    return quiet
