"""The hardware profiles that ship with autoflux."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources

from autoflux import Profile, hookimpl, parse_profile


@hookimpl
def register_profiles(register: Callable[[Profile], None]) -> None:
    """Register every TOML file of `autoflux.profiles`."""
    for file in sorted(resources.files("autoflux.profiles").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".toml"):
            register(parse_profile(file.read_text(encoding="utf-8"), repr(file.name)))
