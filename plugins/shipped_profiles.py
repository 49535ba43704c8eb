"""The hardware profiles that ship with autoflux."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources

from autoflux import HostProfile, Profile, hookimpl, parse_profiles


@hookimpl
def register_profiles(register: Callable[[Profile | HostProfile], None]) -> None:
    """Register every TOML file of `autoflux.profiles`."""
    files = sorted(resources.files("autoflux.profiles").iterdir(), key=lambda file: file.name)
    texts = {repr(file.name): file.read_text(encoding="utf-8") for file in files if file.name.endswith(".toml")}
    for profile in parse_profiles(texts):
        register(profile)
