"""Whether this process is autoflux's own, so that what is the whole process's may be changed: libraries are imported
without what only others would use, what they made is not looked through for garbage, and torch is forbidden to take
more of a device than is planned."""

from __future__ import annotations

_own = False


def claim() -> None:
    """Say that nothing but autoflux runs here: a command, or a worker."""
    global _own  # noqa: PLW0603 — it is of the process
    _own = True


def is_own_process() -> bool:
    """Whether that was said; not where autoflux is a library of a program."""
    return _own
