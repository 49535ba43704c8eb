"""What is done in the background yields to everything else."""

from __future__ import annotations

import contextlib
import os
import sys
import threading

LOWEST = 19


def lower_priority() -> None:
    """From now on this thread, and those that it starts, compute only when no other wants to.

    On Linux, where threads have priorities of their own; elsewhere nothing happens.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST)
