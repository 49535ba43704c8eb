"""Reading profiles from TOML: strict about keys and types, and what a profile leaves out comes from its base."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, TypeVar

import msgspec

from autoflux.errors import DamagedFile
from autoflux.hardware.values import DeviceKind
from autoflux.models.values import Precision
from autoflux.planning.profiles import version
from autoflux.planning.ranges import outside
from autoflux.planning.values import HostProfile, Match, Priors, Profile

Table = dict[str, Any]
AnyProfile = Profile | HostProfile
T = TypeVar("T")

_SomePriors = msgspec.defstruct(
    "Priors",
    [(field.name, field.type | msgspec.UnsetType, msgspec.UNSET) for field in msgspec.structs.fields(Priors)],
    forbid_unknown_fields=True,
    kw_only=True,
)
"""Any of the priors, none needed."""

_PRIORS = Priors.__struct_fields__
_ALLOWED = {
    "profile": {
        "": ("base", *Profile.__struct_fields__),
        "match": Match.__struct_fields__,
        "priors": _PRIORS,
        "sources": _PRIORS,
    },
    "host": {"": HostProfile.__struct_fields__, "priors": _PRIORS, "sources": _PRIORS},
}
"""Keys of each table of a file."""


def parse_profile(text: str, origin: str, known: Iterable[AnyProfile] = ()) -> AnyProfile:
    """Read one profile's TOML; `known` are those it may name as its base.

    Raises:
        DamagedFile: as of `parse_profiles`.
    """
    (profile,) = parse_profiles({origin: text}, known)
    return profile


def parse_profiles(texts: Mapping[str, str], known: Iterable[AnyProfile] = ()) -> list[AnyProfile]:
    """Read profiles from TOML, by what each file is called in messages; a base may be among `known` or these.

    Raises:
        DamagedFile: not TOML, an unknown or missing key, a wrong type, a prior without a source, a base that is not
            there; the message names the file, the key, and what is allowed.
    """
    waiting = {origin: _table(text, origin) for origin, text in texts.items()}
    bases = {profile.name: profile for profile in known if isinstance(profile, Profile)}
    profiles: dict[str, AnyProfile] = {}
    while waiting:
        ready = [origin for origin in waiting if _is_ready(origin, waiting, bases)]
        if not ready:
            _fail_base(waiting, bases)
        for origin in ready:
            profile = profiles[origin] = _profile(waiting.pop(origin), origin, bases)
            if isinstance(profile, Profile):
                bases[profile.name] = profile
    return [profiles[origin] for origin in texts]


def _table(text: str, origin: str) -> Table:
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        raise DamagedFile(f"the profile {origin} is not valid TOML: {error}", hint="see docs/profiles.md") from error
    if not table:
        raise DamagedFile(f"the profile {origin} is empty", hint="see docs/profiles.md")
    for name, allowed in _ALLOWED[_layout(table)].items():
        _check_keys(table.get(name, {}) if name else table, name, allowed, origin)
    if not isinstance(table.get("base", ""), str):
        raise DamagedFile(f"the profile {origin} is not valid: base must be the name of a profile")
    _check_name(table, origin)
    return table


def _check_name(table: Table, origin: str) -> None:
    name = table.get("name")
    if isinstance(name, str) and name.strip():
        return
    if name is None:
        wrong = "it has no `name`"
    else:
        wrong = "its name is empty" if isinstance(name, str) else f"its name is {name!r}; allowed: text"
    raise DamagedFile(f"the profile {origin} is not valid: {wrong}", hint='begin it with name = "my-card"')


def _layout(table: Table) -> str:
    return "host" if "max_ram_bytes" in table else "profile"


def _check_keys(table: object, name: str, allowed: Iterable[str], origin: str) -> None:
    where = f"[{name}]" if name else "the top level"
    if not isinstance(table, dict):
        raise DamagedFile(f"the profile {origin} is not valid: {where} must be a table", hint="see docs/profiles.md")
    for key in table:
        if key not in set(allowed):
            raise DamagedFile(
                f"the profile {origin} has the unknown key {key!r} in {where}; allowed: {', '.join(sorted(allowed))}",
                hint=_guess(key, allowed),
            )


def _is_ready(origin: str, waiting: Mapping[str, Table], bases: Mapping[str, Profile]) -> bool:
    """Whether its base is known, and no other file that is still to be read redefines it."""
    base = waiting[origin].get("base")
    redefined = any(other != origin and table.get("name") == base for other, table in waiting.items())
    return base is None or (base in bases and not redefined)


def _fail_base(waiting: Mapping[str, Table], bases: Mapping[str, Profile]) -> NoReturn:
    names = {table.get("name") for table in waiting.values()}
    for origin, table in waiting.items():
        base = table["base"]
        if base == table.get("name") and base not in bases:
            raise DamagedFile(f"the profile {origin} is its own base", hint="name another profile as base, or none")
        if base not in names:
            raise DamagedFile(
                f"the profile {origin} has the base {base!r}, which is not there; known: {', '.join(sorted(bases))}",
                hint=_guess(base, bases),
            )
    raise DamagedFile(f"the profiles {', '.join(waiting)} have each other as base", hint="one must do without")


def _profile(table: Table, origin: str, bases: Mapping[str, Profile]) -> AnyProfile:
    priors = table.get("priors", {})
    _check_ranges(priors, origin)
    _check_sources(priors, table.get("sources", {}), origin)
    if _layout(table) == "host":
        _convert(priors, _SomePriors, origin, "$.priors")
        return _convert(table, HostProfile, origin)
    profile = _convert(_with_base(table, bases), Profile, origin)
    _check_formats(profile, origin)
    _check_capabilities(profile.match, origin)
    return profile


def _check_ranges(priors: Table, origin: str) -> None:
    for key, wrong in outside(Priors, priors):
        raise DamagedFile(
            f"the profile {origin} is not valid: priors.{key} {wrong}", hint="see docs/profiles.md for its unit"
        )


def _check_sources(priors: Table, sources: Table, origin: str) -> None:
    wrong = ""
    if unsourced := set(priors) - set(sources):
        wrong = f"gives no source for {', '.join(sorted(unsourced))}"
    elif empty := [key for key, source in sources.items() if isinstance(source, str) and not source.strip()]:
        wrong = f"gives an empty source for {', '.join(sorted(empty))}"
    elif other := [key for key, source in sources.items() if not isinstance(source, str)]:
        wrong = f"is not valid: sources.{other[0]} is {sources[other[0]]!r}; allowed: text"
    if wrong:
        raise DamagedFile(
            f"the profile {origin} {wrong}", hint="say under [sources] where each figure was measured or read"
        )


def _with_base(table: Table, bases: Mapping[str, Profile]) -> Table:
    """The table filled up from its base. Name, description and match are never inherited."""
    own = {key: value for key, value in table.items() if key != "base"}
    if "base" not in table:
        return own
    base = bases[table["base"]].to_data()
    inherited = {key: value for key, value in base.items() if key in ("precision", "eight_bit")}
    tables = {key: {**_as_table(base[key]), **own.get(key, {})} for key in ("priors", "sources")}
    return inherited | own | tables


def _as_table(value: object) -> Table:
    return value if isinstance(value, dict) else {}


def _check_formats(profile: Profile, origin: str) -> None:
    for key, formats in (("precision", profile.precision), ("eight_bit", profile.eight_bit)):
        if len(set(formats)) < len(formats):
            raise DamagedFile(f"the profile {origin} names a format twice in {key}", hint="name each once, best first")
        narrow = key == "eight_bit"
        if wrong := [precision for precision in formats if (precision.item_bytes == 1) != narrow]:
            allowed = ", ".join(p for p in Precision if (p.item_bytes == 1) == narrow)
            raise DamagedFile(f"the profile {origin} has {wrong[0].value!r} in {key}; allowed: {allowed}")


def _check_capabilities(match: Match, origin: str) -> None:
    lowest, highest = match.min_capability, match.max_capability
    if lowest and highest and version(lowest) > version(highest):
        raise DamagedFile(
            f"the profile {origin} matches no device: min_capability {lowest} is above max_capability {highest}",
            hint="exchange the two",
        )


def _convert(table: Table, kind: type[T], origin: str, path: str = "$") -> T:
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        message = str(error).replace("$", path, 1)
        raise DamagedFile(
            f"the profile {origin} is not valid: {message}{_allowed_values(message)}",
            hint=_enum_guess(message) or "see docs/profiles.md",
        ) from error


def _enum_of(message: str) -> tuple[str, list[str]] | None:
    """The value that is none of an enum's, and the enum's."""
    if found := re.match(r"Invalid enum value '(.*)'", message):
        return found[1], [kind.value for kind in (DeviceKind if ".kind" in message else Precision)]
    return None


def _allowed_values(message: str) -> str:
    found = _enum_of(message)
    return f"; allowed: {', '.join(found[1])}" if found else ""


def _enum_guess(message: str) -> str | None:
    found = _enum_of(message)
    return _guess(*found) if found else None


def _guess(word: str, known: Iterable[str]) -> str | None:
    close = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.7)
    return f"did you mean {close[0]!r}?" if close else "see docs/profiles.md"
