"""Importing transformers with what it found out the last time by reading all of its model files, 2,000 of them, twice,
and in autoflux's own processes without one way of attending.

To read them takes 0.9 s of an import (a Xeon server, files in the page cache). What is kept holds for files of the same
names, sizes and times of change; it is found anew when a file is another.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from autoflux import AutofluxError, cache_dir, is_own_process, write_atomic

MODULE, FUNCTION = "transformers.utils.import_utils", "create_import_structure_from_path"
"""What reads them."""

HAS_FLEX_ATTENTION = "is_torch_flex_attn_available"
"""Says whether torch has attention with masks that are compiled. To import it takes half a second, most of it SymPy's;
text encoders do not attend so."""

FOLDER = ("transformers", "models")
CACHE = "transformers_files.json"

Find = Callable[[str], dict[Any, Any]]


class Folder(msgspec.Struct, frozen=True):
    """What `create_import_structure_from_path` says of a folder."""

    folders: dict[str, Folder]
    needing: list[tuple[list[str], dict[str, list[str]]]]
    """By what they need, the names that each module has."""


class Kept(msgspec.Struct, frozen=True):
    """What a state of the files was found to hold."""

    state: str
    found: Folder


class _Finder(MetaPathFinder):
    """Has the module changed once it is executed."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == MODULE else None
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def executed(module: ModuleType) -> None:
                execute(module)
                if find := getattr(module, FUNCTION, None):
                    setattr(module, FUNCTION, _keeping(find))
                if is_own_process() and hasattr(module, HAS_FLEX_ATTENTION):
                    setattr(module, HAS_FLEX_ATTENTION, lambda: False)

            spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


@contextmanager
def found_once() -> Iterator[None]:
    """If transformers is imported in the context, it takes what was found before.

    In a process of autoflux's own it also compiles no masks.
    """
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


def _keeping(find: Find) -> Find:
    found: dict[str, dict[Any, Any]] = {}

    def kept(path: str) -> dict[Any, Any]:
        folder = Path(path).parent if Path(path).is_file() else Path(path)
        if folder.parts[-2:] != FOLDER:
            return find(path)
        if str(folder) not in found:
            found[str(folder)] = _found(find, folder)
        return found[str(folder)]

    return kept


def _found(find: Find, folder: Path) -> dict[Any, Any]:
    state, file = _state(folder), cache_dir() / CACHE
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        kept = msgspec.json.decode(file.read_bytes(), type=Kept)
        if kept.state == state:
            return _as_given(kept.found)
    found = find(str(folder))
    with contextlib.suppress(OSError, AutofluxError, AttributeError, TypeError):  # of a version that gives other things
        folded = _folded(found)
        if _as_given(folded) == found:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, msgspec.json.encode(Kept(state, folded)))
    return found


def _state(folder: Path) -> str:
    """Changes with every file. To ask for that takes a fortieth of the time of reading them."""
    digest = sha256(str(folder).encode())
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(names):
            there = os.stat(f"{parent}/{name}")  # noqa: PTH116 — of thousands, twice as quick
            digest.update(f"{parent}/{name} {there.st_size} {there.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _folded(found: dict[Any, Any]) -> Folder:
    folders = {name: _folded(inside) for name, inside in found.items() if isinstance(name, str)}
    needing = [
        (sorted(needs), {module: sorted(names) for module, names in modules.items()})
        for needs, modules in found.items()
        if not isinstance(needs, str)
    ]
    return Folder(folders, needing)


def _as_given(folder: Folder) -> dict[Any, Any]:
    inside: dict[Any, Any] = {name: _as_given(inner) for name, inner in folder.folders.items()}
    for needs, modules in folder.needing:
        inside[frozenset(needs)] = {module: set(names) for module, names in modules.items()}
    return inside
