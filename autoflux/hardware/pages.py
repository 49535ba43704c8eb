"""Memory of the host in whole pages, as the engine takes it for copies and the probe measures it."""

from __future__ import annotations

import contextlib
import mmap
import sys


def own_pages(nbytes: int) -> mmap.mmap:
    """Zeroed pages that hold `nbytes` and nothing else: two ranges registered with a driver may not share one."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if sys.platform != "win32" else {}
    pages = mmap.mmap(-1, max(nbytes, 1), **private)
    if sys.platform == "linux":
        # Fewer and larger pages are registered several times faster. Some kernels have none.
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages
