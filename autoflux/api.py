"""autoflux from Python: probe, plan and load, the same way the commands do it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from autoflux.errors import (
    AutofluxError,
    ContradictoryWishes,
    DeviceUnavailable,
    MissingExtra,
    UnknownName,
)
from autoflux.files import is_path, read_small, read_text
from autoflux.hardware.changes import Changes, changed
from autoflux.hardware.known import is_known, known_machine
from autoflux.hardware.probe import probe
from autoflux.hardware.saved import read_hardware
from autoflux.hardware.values import Hardware
from autoflux.models.finding import find, require_weights
from autoflux.models.pack_shelf import Shelf, packs_wanted
from autoflux.models.values import Model
from autoflux.paths import config_dir, expanded
from autoflux.planning import planner
from autoflux.planning.backends import BackendFacts
from autoflux.planning.candidates import Candidate
from autoflux.planning.findings import NO_FINDINGS, Findings
from autoflux.planning.packs import NO_PACKS, PackedPart, Packs
from autoflux.planning.planner import BRIEF, Detail, make_plan, make_plans
from autoflux.planning.profile_files import AnyProfile, parse_profile, parse_profiles
from autoflux.planning.profiles import for_host
from autoflux.planning.refusal import Asked
from autoflux.planning.saved import check_consistency, check_plan, read_plan
from autoflux.planning.values import Alternative, HostProfile, Plan, Profile, Wishes
from autoflux.planning.wishing import check_alone, checked
from autoflux.plugin_manager import Plugins, load_plugins
from autoflux.runtime.calibration_store import CalibrationStore
from autoflux.units import format_number

if TYPE_CHECKING:
    from autoflux.runtime.pipeline import Backend, LoadProgress
    from autoflux.runtime.session import Session

__all__ = [
    "Prepared",
    "WhatIf",
    "find_model",
    "load",
    "make_plan",
    "other_machine",
    "plan_for",
    "plans_for",
    "prepare",
    "probe",
    "saved_plan",
]

OnStage = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """Everything known before weights are loaded."""

    hardware: Hardware
    model: Model
    plan: Plan


@dataclass(frozen=True)
class WhatIf:
    """What to plan for instead of this machine as it is."""

    on: str | None = None
    """A known machine's name, or the file of another's probe; None is this machine."""
    changes: Changes = field(default_factory=Changes)

    @property
    def machine(self) -> str | None:
        """What the other machine is called; None for this one."""
        if self.on is None:
            return "this one with other memory" if self.changes.memory else None
        return self.on.lower() if is_known(self.on) else Path(self.on).stem

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What a plan for it must be read with, in words."""
        known = self.on is not None and is_known(self.on)
        rates = [("--link", self.changes.link_gb_per_s), ("--disk", self.changes.disk_gb_per_s)]
        said = [f"{option} {format_number(rate)} GB/s" for option, rate in rates if rate is not None]
        return (
            *([f"nothing of {self.machine} was measured: its figures are public specifications"] if known else []),
            *([f"{' and '.join(said)} is what you said, not what was measured"] if said else []),
        )


def load(
    model: str | Path = "sample",
    *,
    base: str | None = None,
    wishes: Wishes | None = None,
    plan: Plan | None = None,
    progress: LoadProgress | None = None,
) -> Session:
    """Measure this machine (or take the last measurement), plan, and load a model.

    Args:
        model: a registered name, a name of the catalogue, or the path of a model's folder or file.
        base: the name or folder of the model that has what a single file lacks.
        wishes: what the plan must keep to.
        plan: a plan made before, as `saved_plan` reads it, instead of planning now.
        progress: called with what is being loaded and the share done.

    Raises:
        AutofluxError: any of those in `autoflux.errors` that planning and loading can end in.
    """
    plugins = load_plugins()
    check_alone(plan, wishes)
    found = find_model(str(model), plugins, base)
    planned = check_plan(plan, probe(), found) if plan else _plan_here(found, wishes or Wishes(), plugins, probe())
    return open_session(planned, found, plugins, progress)


def open_session(
    plan: Plan,
    model: Model,
    plugins: Plugins,
    progress: LoadProgress | None = None,
    *,
    prompts: Sequence[str] = (),
) -> Session:
    """Build the pipeline of a plan; `prompts` are those that will be drawn first. Imports torch."""
    from autoflux.runtime.opening import open_with  # noqa: PLC0415 — imports torch

    backend = plugins.backends.get(plan.backend)
    _require(backend)
    return open_with(backend, plan, model, progress or (lambda _stage, _share: None), prompts)


def prepare(  # noqa: PLR0913 — all but the first three have a default
    model: str,
    wishes: Wishes,
    plugins: Plugins,
    *,
    base: str | None = None,
    on_stage: OnStage | None = None,
    refresh: bool = False,
    what_if: WhatIf | None = None,
    saved: Plan | None = None,
    detail: Detail = BRIEF,
) -> Prepared:
    """Take stock of a model, which need not be on this machine, measure it, and plan or check the `saved` plan.

    `detail` is what a plan made now is to say beside. Does not import torch.

    Raises:
        PlanUnusable: the saved plan is of another machine, model or version.
        ContradictoryWishes: this machine is to be measured again (`refresh`), and another is planned for.
        AutofluxError: any other of those that probing and planning can end in.
    """
    what_if = what_if or WhatIf()
    found, machine = _take_stock(model, plugins, base, what_if, refresh=refresh, on_stage=on_stage)
    hardware = changed(machine, what_if.changes)
    if saved is not None:
        held = check_plan(saved, hardware, found, machine=what_if.machine)
        check_consistency(held, found)
        _require(plugins.backends.get(held.backend))
        return Prepared(hardware, found, held.replace(machine=what_if.machine))
    return Prepared(hardware, found, _plan_if(found, wishes, plugins, machine, what_if, detail))


def all_ways(
    model: str, wishes: Wishes, plugins: Plugins, *, base: str | None = None, what_if: WhatIf | None = None
) -> tuple[Alternative, ...]:
    """Every way to run a model here, or elsewhere, with what it takes or lacks: for when no plan fits.

    Raises:
        AutofluxError: any of those that probing and planning can end in, but DoesNotFit.
    """
    what_if = what_if or WhatIf()
    found, machine = _take_stock(model, plugins, base, what_if)
    hardware = changed(machine, what_if.changes)
    profiles, wishes = _profiles(wishes, plugins, hardware)
    return planner.all_ways(hardware, found, profiles, wishes, _findings(what_if, found))


def _take_stock(
    model: str,
    plugins: Plugins,
    base: str | None,
    what_if: WhatIf,
    *,
    refresh: bool = False,
    on_stage: OnStage | None = None,
) -> tuple[Model, Hardware]:
    """The model, and the machine as it is, before what is to be assumed of it."""
    if refresh and what_if.on is not None:
        raise ContradictoryWishes(
            f"--refresh measures this machine again, and the plan is for {what_if.machine!r}",
            hint="drop --refresh, or drop --on",
        )
    found = find_model(model, plugins, base, absent=True)
    if what_if.on is not None:
        return found, other_machine(what_if.on)
    models_path = Path(found.path) if found.path else None
    return found, probe(refresh=refresh, models_path=models_path, on_stage=on_stage)


def _plan_if(
    model: Model, wishes: Wishes, plugins: Plugins, machine: Hardware, what_if: WhatIf, detail: Detail
) -> Plan:
    if what_if == WhatIf():
        return _plan_here(model, wishes, plugins, machine, detail)
    hardware = changed(machine, what_if.changes)
    asked = _asked(what_if, model, wishes, plugins, machine) if what_if.machine else None
    try:
        plan = plan_for(model, wishes, plugins, hardware, _findings(what_if, model), detail=detail, asked=asked)
    except DeviceUnavailable as error:
        if what_if.on is None:
            raise
        hint = f"drop --device; `autoflux machines {what_if.on}` says what it has" if is_known(what_if.on) else None
        raise DeviceUnavailable(
            f"on {what_if.machine}: {error.message}", hint=hint or "drop --device, or name one that it has"
        ) from error
    return plan.replace(machine=what_if.machine, warnings=(*what_if.assumptions, *plan.warnings))


def _findings(what_if: WhatIf, model: Model) -> Findings:
    """Of calibration none: with other rates or memory it does not hold."""
    return Findings(packs=packs_of(model)) if what_if.on is None else NO_FINDINGS


def _asked(what_if: WhatIf, model: Model, wishes: Wishes, plugins: Plugins, machine: Hardware) -> Asked:
    """What was asked for of another machine, whose memory is then among the wishes."""
    changes, findings = what_if.changes, _findings(what_if, model)

    def ways(wished: Wishes) -> Iterable[Candidate]:
        memory = {"vram_bytes": wished.vram_bytes, "ram_bytes": wished.ram_bytes}
        hardware = changed(machine, changes.replace(**memory))
        profiles, rest = _profiles(wished.replace(vram_bytes=None, ram_bytes=None), plugins, hardware)
        return planner.ways(hardware, model, profiles, rest, findings)

    wished = wishes.replace(vram_bytes=changes.vram_bytes, ram_bytes=changes.ram_bytes)
    return Asked(wished, ways, machine, what_if.machine)


def _plan_here(model: Model, wishes: Wishes, plugins: Plugins, hardware: Hardware, detail: Detail = BRIEF) -> Plan:
    """With what earlier runs of the model on this machine have measured."""
    calibration, warning = CalibrationStore().load(hardware, model)
    findings = Findings(packs=packs_of(model), calibration=calibration)
    plan = plan_for(model, wishes, plugins, hardware, findings, detail=detail)
    return plan.replace(warnings=(*plan.warnings, warning)) if warning else plan


def other_machine(on: str) -> Hardware:
    """The known machine of that name, or the one whose `probe --json` a file is.

    Raises:
        UnknownName: no machine is known by it.
        DamagedFile: the file is not a probe's, or of another version.
    """
    if not on or is_known(on) or not is_path(on):  # nothing would be the path of the folder it runs in
        return known_machine(on)
    return read_hardware(read_small(expanded(on)), repr(on))


def saved_plan(file: str) -> Plan:
    """The plan in a file that `plan --save` or `plan --json` wrote.

    Raises:
        DamagedFile: it cannot be read, or is of another version.
    """
    return read_plan(read_small(expanded(file)), repr(file))


def find_model(model: str, plugins: Plugins, base: str | None = None, *, absent: bool = False) -> Model:
    """The model registered under that name, at that path, or of that name in the catalogue.

    `base` is the name or folder of the model that has what a single file lacks. With `absent`, a model of the
    catalogue may be missing on this machine.

    Raises:
        UnknownName: neither a name nor a path.
        ModelNotFound: its weights, or those of its base, are not on this machine.
        AutofluxError: what `take_stock` says of the folder or file.
    """
    found = find(model, {entry.name: entry.path for entry in plugins.models}, base)
    if not absent:
        require_weights(found)
    return found


def plan_for(
    model: Model,
    wishes: Wishes,
    plugins: Plugins,
    hardware: Hardware,
    findings: Findings = NO_FINDINGS,
    *,
    detail: Detail = BRIEF,
    asked: Asked | None = None,
) -> Plan:
    """Plan with the profiles and backends of the plugins, the user's own profiles, and what else was found."""
    given = _given(model, wishes, plugins, hardware)
    known = findings.replace(facts=given.facts)
    return make_plan(hardware, model, given.profiles, given.wishes, given.backends, known, detail=detail, asked=asked)


def plans_for(
    model: Model,
    wishes: Wishes,
    plugins: Plugins,
    hardware: Hardware,
    findings: Findings = NO_FINDINGS,
    *,
    count: int,
) -> list[Plan]:
    """The plans worth running, at most `count`, the one that `plan_for` makes first."""
    given = _given(model, wishes, plugins, hardware)
    known = findings.replace(facts=given.facts)
    return make_plans(hardware, model, given.profiles, given.wishes, given.backends, known, count=count)


class _Given(NamedTuple):
    """The profiles that hold here, the wishes as they refer to these, and the backends that work."""

    profiles: list[Profile]
    wishes: Wishes
    backends: list[str]
    facts: tuple[BackendFacts, ...]


def _given(model: Model, wishes: Wishes, plugins: Plugins, hardware: Hardware) -> _Given:
    if wishes.backend is not None:
        _require(plugins.backends.get(wishes.backend))
    working = [backend for backend in plugins.backends if backend.missing() is None]
    profiles, wishes = _profiles(checked(wishes), plugins, hardware)
    facts = tuple(_facts_of(backend, model) for backend in working)
    return _Given(profiles, wishes, [backend.name for backend in working], facts)


def _facts_of(backend: Backend, model: Model) -> BackendFacts:
    """What a backend says of itself; a plugin need not."""
    says = getattr(backend, "facts", None)
    return says(model) if says else BackendFacts(name=backend.name)


def packs_of(model: Model) -> Packs:
    """The packs of a model on this machine; none if none are wanted."""
    if not packs_wanted():
        return NO_PACKS
    try:
        found = Shelf().made_for(model)
    except AutofluxError:
        return NO_PACKS  # loading will say what is wrong with the model's files
    parts = (
        PackedPart(component=p.component, storage=p.storage, arithmetic=p.arithmetic, nbytes=p.nbytes) for p in found
    )
    return Packs(parts=tuple(parts))


def _profiles(wishes: Wishes, plugins: Plugins, hardware: Hardware) -> tuple[list[Profile], Wishes]:
    """The profiles that hold on that host, and the wishes with the name of the profile whose file was wished."""
    offered = list(plugins.profiles)
    everything = [*offered, *user_profiles(known=offered)]
    wished, names = wishes.profile, {profile.name for profile in everything}
    if wished is not None and wished not in names:
        if not wished or not is_path(wished):
            raise UnknownName("profile", wished, names, hint="`autoflux plugins` lists the profiles")
        text = read_text(expanded(wished), "profile")
        everything.append(parse_profile(text, repr(wished), everything))
        wished = everything[-1].name
    hosts = [profile.name for profile in everything if isinstance(profile, HostProfile)]
    profiles = for_host(everything, hardware.host.total_bytes.value, wished)
    return profiles, wishes.replace(profile=None if wished in hosts else wished)


def user_profiles(folder: Path | None = None, known: Iterable[AnyProfile] | None = None) -> list[AnyProfile]:
    """The profiles in the user's configuration folder, by file name; `known` are those they may have as base.

    Raises:
        DamagedFile: one cannot be read.
    """
    files = sorted((folder or config_dir() / "profiles").glob("*.toml"))
    texts = {repr(str(file)): read_text(file, "profile") for file in files}
    return parse_profiles(texts, load_plugins().profiles if known is None and texts else known or ())


def _require(backend: Backend) -> None:
    if command := backend.missing():
        raise MissingExtra(f"the backend {backend.name!r}", command)
