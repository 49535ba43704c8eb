"""Settings of torch's memory allocator, given before torch is imported. This module does not import it.

torch reads them once, from an environment variable, and takes its default for every option that is not named. So ours
are added to what the user wrote there, and what the user wrote wins.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, MutableMapping
from importlib import metadata

VARIABLE = "PYTORCH_ALLOC_CONF"
FORMER_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""torch 2.15 still reads them, and before the new name: one that is set, if only to nothing, hides it."""

LARGEST_ROUNDED_MB = 32
"""Pinned buffers above this are made as large as was asked for and given back to the system when they are freed.

torch rounds others up to a power of two and keeps them: 23.7 GB of weights became 37 GB. A power of two itself, so that
a buffer below it is not rounded to one above it.
"""

EXCLUSIVE = (
    frozenset({"expandable_segments", "backend"}),
    frozenset({"pinned_max_round_threshold_mb", "pinned_max_cached_size_mb"}),
)
"""Options that mean something only together. Where the user has set one of them, the others are left to the user too.

Another backend has no segments. The two limits must be equal in torch 2.13: with the first below the second it hands
out a buffer that is smaller than what was asked for (pytorch/pytorch#192722, mended in 2.14).
"""

_OPTION = r"\s*(\w+)\s*:\s*(?:\[[^\[\]]*\]|[^\[\]:,\s]+)\s*"
_OPTIONS = re.compile(rf"\s*(?:{_OPTION}(?:,{_OPTION})*,?\s*)?")
_RELEASE = re.compile(r"(\d+)\.(\d+)(\.\d+)*(\.post\d+)?(\+.*)?")

_log = logging.getLogger(__name__)


def apply(environment: MutableMapping[str, str]) -> str | None:
    """Add our settings to those in `environment`. Returns why that was not done, None if it was or had been before.

    Call it where a process begins. The processes that it starts inherit the result.
    """
    if "torch" in sys.modules:
        return "torch is already imported, and reads its settings only then"
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return "torch is not installed"
    ours = settings(version, sys.platform)
    for name in [name for name in (VARIABLE, *FORMER_VARIABLES) if name in environment] or [VARIABLE]:
        environment[name] = merged(environment.get(name), ours)
    return None


def settings(version: str, platform: str) -> dict[str, str]:
    """What we want of a version of torch: only what it is sure to know, because an unknown option stops its import."""
    ours = {}
    if platform != "win32":
        # A segment grows instead of leaving gaps; on Windows torch does not have it and warns.
        ours["expandable_segments"] = "True"
    release = _RELEASE.fullmatch(version)
    # Read in the headers of 2.12 and 2.13. Builds between releases may or may not have it.
    if release and (int(release[1]), int(release[2])) >= (2, 13):
        ours["pinned_max_round_threshold_mb"] = str(LARGEST_ROUNDED_MB)
        ours["pinned_max_cached_size_mb"] = str(LARGEST_ROUNDED_MB)
    return ours


def segments_grow(environment: Mapping[str, str], platform: str) -> bool:
    """Whether torch's segments of a device grow and shrink as it is told to have them, and are cut up at any size."""
    names = [name for name in (VARIABLE, *FORMER_VARIABLES) if name in environment]
    options = [dict(re.findall(r"(\w+)\s*:\s*([^,\s\[\]]+)", environment[name])) for name in names]
    grow = [told.get("expandable_segments") == "True" and "max_split_size_mb" not in told for told in options]
    return platform != "win32" and bool(grow) and all(grow)


def merged(user: str | None, ours: Mapping[str, str]) -> str:
    """The user's options as they are, then those of ours that the user says nothing about.

    What is not a list of options is returned as it is, for torch to complain about.

    >>> merged("max_split_size_mb:128", {"expandable_segments": "True"})
    'max_split_size_mb:128,expandable_segments:True'
    >>> merged("expandable_segments:False", {"expandable_segments": "True"})
    'expandable_segments:False'
    """
    text = user or ""
    if not _OPTIONS.fullmatch(text):
        _log.warning("the allocator settings %r cannot be read; torch gets them as they are, without ours", text)
        return text
    named = set(re.findall(_OPTION, text))
    for group in EXCLUSIVE:
        named |= group if named & group else set()
    added = [f"{name}:{value}" for name, value in ours.items() if name not in named]
    return ",".join([*filter(None, [text.rstrip(" ,")]), *added]) if added else text
