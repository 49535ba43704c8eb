"""Keeping what Python compiles libraries to where nothing else does, so that a start does not compile them again.

Python keeps it beside the sources. It does not where `PYTHONDONTWRITEBYTECODE` is set, as in many container images, nor
where those folders cannot be written. If an installer has not done it either, each start compiles 2,000 files: torch,
transformers and diffusers are imported in 4.8 s instead of 1.8 (two cores of an EPYC).
"""

from __future__ import annotations

import importlib.util
import os
import stat
import sys
from pathlib import Path

from autoflux.paths import cache_dir

FOLDER = "bytecode"
VARIABLE = "PYTHONPYCACHEPREFIX"


def keep(library: str = "torch") -> None:
    """From now on, keep it in autoflux's cache folder if that of `library`, for one, is not kept where it belongs.

    Only in a process of autoflux's own, because it is the whole process's, and of those that it starts. A place that
    the user has named (`PYTHONPYCACHEPREFIX`) stays the one. What lies there is run, so it has to be a folder that
    nobody else can write.
    """
    folder = cache_dir().absolute() / FOLDER
    if sys.pycache_prefix is None and not _is_kept(library) and _is_ours_alone(folder):
        sys.pycache_prefix = os.environ[VARIABLE] = str(folder)
    if sys.pycache_prefix == str(folder):
        sys.dont_write_bytecode = False


def _is_kept(library: str) -> bool:
    """Whether its bytecode is there, or will be once it has been imported."""
    try:
        spec = importlib.util.find_spec(library)
    except ValueError:  # it is something that stands in its place
        return True
    if spec is None or not spec.origin or not spec.cached or Path(spec.cached).exists():
        return True
    return not sys.dont_write_bytecode and os.access(Path(spec.origin).parent, os.W_OK)


def _is_ours_alone(folder: Path) -> bool:
    """Whether the folder, which is made if it is not there, can be written by this user and by no other."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        own, above = folder.stat(), folder.parent.stat()
    except OSError:
        return False
    if not os.access(folder, os.W_OK):
        return False
    if not hasattr(os, "geteuid"):  # Windows, where a user's folders are the user's own
        return True
    owned = own.st_uid == above.st_uid == os.geteuid()
    # The group of the one above is the user's own on many systems.
    return owned and not own.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not above.st_mode & stat.S_IWOTH
