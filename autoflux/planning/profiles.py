"""Profiles: reading one from TOML, and choosing the one for a device."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable

import msgspec

from autoflux.errors import DamagedFile, UnknownName
from autoflux.hardware.values import DeviceKind
from autoflux.planning.values import Match, Priors, Profile


def parse_profile(text: str, origin: str) -> Profile:
    """Read a profile's TOML.

    Raises:
        DamagedFile: not TOML, an unknown or missing key, a wrong type, or a prior without a source.
    """
    try:
        profile = msgspec.convert(tomllib.loads(text), Profile)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise DamagedFile(f"the profile {origin} is not valid: {error}", hint="see docs/profiles.md") from error
    unsourced = set(Priors.__struct_fields__) - set(profile.sources)
    if unsourced:
        raise DamagedFile(f"the profile {origin} gives no source for {', '.join(sorted(unsourced))}")
    return profile


def select_profile(
    profiles: Iterable[Profile], kind: DeviceKind, capability: str | None = None, name: str = ""
) -> Profile:
    """The most particular profile that matches a device; among equals the one registered last (the user's own).

    Raises:
        UnknownName: no profile is for this kind of device.
    """
    candidates = list(profiles)
    fitting = [p for p in candidates if matches(p.match, kind, capability, name)]
    if not fitting:
        raise UnknownName("profile", str(kind), [p.name for p in candidates])
    return max(reversed(fitting), key=lambda profile: _particularity(profile.match))


def matches(match: Match, kind: DeviceKind, capability: str | None, name: str) -> bool:
    """Whether a device of that kind, compute capability (`"8.9"`) and name is one the rule is for."""
    if match.kind != kind:
        return False
    if match.name_contains and match.name_contains.lower() not in name.lower():
        return False
    if match.min_capability is None and match.max_capability is None:
        return True
    if capability is None:
        return False
    lowest, highest = match.min_capability or "0.0", match.max_capability or "999.0"
    return _version(lowest) <= _version(capability) <= _version(highest)


def _particularity(match: Match) -> int:
    given = (match.min_capability, match.max_capability, match.name_contains)
    return sum(part is not None for part in given)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))
