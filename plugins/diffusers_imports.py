"""Importing transformers and diffusers without what takes half of the time and a FLUX pipeline never uses.

On a machine with 200 packages both took 9.0 s (measured on a Xeon server with files in the page cache): 2.1 s of it
went into scikit-learn and SciPy, which transformers imports for assisted generation and losses of object detection,
and 1.0 s in each library into reading which distribution every installed file is of. PEFT and torchvision take a
tenth of what is left, and more than half of the rest is what `torch_imports` and `transformers_imports` spare.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from autoflux import AutofluxError, cache_dir, collection_paused, write_atomic

from .torch_imports import import_compiler_later, without_distributed
from .transformers_imports import found_once

UNUSED = ("peft", "torchvision")
"""What both take when it is there, for adapters and for pictures that are given, and do without."""

UNUSED_BY_ENCODERS = ("sklearn", "scipy")
"""What transformers takes when it is there, and text encoders do without."""

LOOKING = ("transformers", "diffusers")
"""Libraries that look once what is installed, and go by it ever after."""

RARE = ("scipy.integrate", "scipy.stats")
"""What diffusers' schedulers import for what few models ask for: multistep coefficients, sigmas of a distribution."""

OTHERS = (
    "torch.nn.attention.flex_attention",
    "diffusers.models.autoencoders",
    "diffusers.models.controlnets",
    "diffusers.models.transformers",
    "diffusers.models.unets",
)
"""What nothing of FLUX uses and programs of others may: attention with masks that are compiled, and packages that
import all of a hundred models when one of them is. They could see that something stands there (`dir`, `import *`)."""

CACHE = "distributions.json"

INSTALLED = (".dist-info", ".egg-info")
"""What folders are named like that say what is installed."""


class Distributions(msgspec.Struct, frozen=True):
    """What `importlib.metadata.packages_distributions` found when the folders of `sys.path` were last changed then."""

    python: str
    folders: dict[str, int]
    """Nanoseconds of the last change."""
    of_packages: dict[str, list[str]]


@contextmanager
def lean_imports() -> Iterator[None]:
    """Libraries that are imported in the context are told at once what others have to search for, and get torch without
    what they do not use."""
    found = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = packages_distributions
    import_compiler_later()
    try:
        with collection_paused(), found_once(), without_distributed():
            yield
    finally:
        importlib.metadata.packages_distributions = found


@contextmanager
def hidden(*names: str, before: Collection[str] = ()) -> Iterator[None]:
    """Packages that are not imported yet cannot be imported in the context, by any thread, as if not installed.

    None is hidden if one of `before` is there already, which may have seen them.
    """
    seen = any(name in sys.modules for name in before)
    added = [name for name in names if name not in sys.modules and not seen]
    sys.modules.update(dict.fromkeys(added))  # type: ignore[arg-type]  # None says: there is no such module
    try:
        yield
    finally:
        for name in added:
            sys.modules.pop(name, None)


def import_later(*names: str) -> None:
    """Have modules of packages imported when something of them is used for the first time. What is imported of one that
    is a package does not need it.

    Not by `importlib.util.LazyLoader`, whose modules are imported as soon as `inspect` goes through all that are there.
    """
    for name in names:
        package, _, _ = name.rpartition(".")
        if name in sys.modules or importlib.util.find_spec(package) is None:
            continue
        if spec := importlib.util.find_spec(name):  # imports the package
            _stand_in(spec)


def _stand_in(spec: ModuleSpec) -> None:
    """Put a module in the place of one that is imported when the first of its attributes is asked for."""
    module, name = importlib.util.module_from_spec(spec), spec.name
    package, _, own = name.rpartition(".")

    def first_used(attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        if sys.modules.get(name) is module:
            sys.modules.pop(name, None)  # another thread may have
        real = importlib.import_module(name)
        for part, imported in list(vars(module).items()):  # of a package, meanwhile
            if isinstance(imported, ModuleType):
                vars(real).setdefault(part, imported)
        setattr(sys.modules[package], own, real)
        return getattr(real, attribute)

    module.__getattr__ = first_used  # type: ignore[method-assign]  # of modules, see PEP 562
    sys.modules[name] = module
    setattr(sys.modules[package], own, module)


def packages_distributions() -> dict[str, list[str]]:
    """As `importlib.metadata.packages_distributions`, which reads the lists of all installed files, but only when
    packages have come or gone since."""
    file, python, folders = cache_dir() / CACHE, sys.version, _folders()
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        kept = msgspec.json.decode(file.read_bytes(), type=Distributions)
        if (kept.python, kept.folders) == (python, folders):
            return kept.of_packages
    found = {name: list(of) for name, of in _FIND_ALL().items()}
    with contextlib.suppress(OSError, AutofluxError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, msgspec.json.encode(Distributions(python, folders, found)))
    return found


_FIND_ALL = importlib.metadata.packages_distributions


def _folders() -> dict[str, int]:
    """Those of `sys.path` with packages in them, and when one last came or went."""
    found = {}
    for entry in sys.path:
        folder = Path(entry or ".")
        with contextlib.suppress(OSError):
            if any(name.endswith(INSTALLED) for name in os.listdir(folder)):  # noqa: PTH208 — twice as quick
                found[str(folder.absolute())] = folder.stat().st_mtime_ns
    return found
