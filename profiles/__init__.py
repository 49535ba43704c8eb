"""Profiles that ship with autoflux, one TOML file a hardware class."""
