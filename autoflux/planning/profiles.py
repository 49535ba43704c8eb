"""Profiles: choosing the one for a device, and what the host makes of it."""

from __future__ import annotations

from collections.abc import Iterable

from autoflux.errors import UnknownName
from autoflux.hardware.values import DeviceKind
from autoflux.planning.values import HostProfile, Match, Profile


def for_host(profiles: Iterable[Profile | HostProfile], ram_bytes: int, wished: str | None = None) -> list[Profile]:
    """The profiles of devices as they are on a host with so much RAM. Of one name only the last, the user's own.

    A host profile of the `wished` name counts however much RAM there is.
    """
    named: dict[str, Profile | HostProfile] = {}
    for profile in profiles:
        named.pop(profile.name, None)  # a later one of a name takes its turn, not its predecessor's
        named[profile.name] = profile
    hosts = [
        p for p in named.values() if isinstance(p, HostProfile) and (p.name == wished or ram_bytes <= p.max_ram_bytes)
    ]
    # The one for the least RAM is the most particular, so it is laid over last.
    hosts.sort(key=lambda host: -host.max_ram_bytes)
    return [_laid_over(profile, hosts) for profile in named.values() if isinstance(profile, Profile)]


def _laid_over(profile: Profile, hosts: Iterable[HostProfile]) -> Profile:
    for host in hosts:
        priors = profile.priors.replace(**host.priors)
        profile = profile.replace(priors=priors, sources=profile.sources | host.sources)
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
    return version(lowest) <= version(capability) <= version(highest)


def _particularity(match: Match) -> int:
    given = (match.min_capability, match.max_capability, match.name_contains)
    return sum(part is not None for part in given)


def version(text: str) -> tuple[int, ...]:
    """A compute capability, to be compared."""
    return tuple(int(part) for part in text.split("."))
