"""autoflux from Python: probe, plan and load, the same way the commands do it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from autoflux.errors import DamagedFile, DoesNotFit, MissingExtra
from autoflux.files import is_path, read_small
from autoflux.hardware.changes import Changes, changed
from autoflux.hardware.known import is_known, known_machine
from autoflux.hardware.probe import probe
from autoflux.hardware.saved import read_hardware
from autoflux.hardware.values import Hardware
from autoflux.models.finding import find, require_weights
from autoflux.models.values import Model
from autoflux.paths import config_dir
from autoflux.planning.calibration import Calibration
from autoflux.planning.planner import make_plan, make_plans
from autoflux.planning.profile_files import AnyProfile, parse_profile, parse_profiles
from autoflux.planning.profiles import for_host
from autoflux.planning.saved import check_plan, read_plan
from autoflux.planning.values import HostProfile, Plan, Profile, Wishes
from autoflux.plugin_manager import Plugins, load_plugins
from autoflux.runtime.calibration_store import CalibrationStore

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
        said = [f"{option} {rate:g} GB/s" for option, rate in rates if rate is not None]
        return (
            *([f"nothing of {self.machine} was measured: its figures are public specifications"] if known else []),
            *([f"{' and '.join(said)} is what you said, not what was measured"] if said else []),
        )


def load(
    model: str = "sample",
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
    found = find_model(model, plugins, base)
    if plan is None:
        plan = _plan_here(found, wishes or Wishes(), plugins, probe())
    else:
        check_plan(plan, probe(), found)
    return open_session(plan, found, plugins, progress)


def open_session(plan: Plan, model: Model, plugins: Plugins, progress: LoadProgress | None = None) -> Session:
    """Build the pipeline of a plan. Imports torch."""
    from autoflux.runtime.session import Session  # noqa: PLC0415 — imports torch

    backend = plugins.backends.get(plan.backend)
    _require(backend)
    pipeline = backend.build(plan, model, progress or (lambda _stage, _share: None))
    return Session(pipeline, plan, model)


def prepare(
    model: str,
    wishes: Wishes,
    plugins: Plugins,
    *,
    base: str | None = None,
    on_stage: OnStage | None = None,
    refresh: bool = False,
    what_if: WhatIf | None = None,
    saved: Plan | None = None,
) -> Prepared:
    """Take stock of a model, which need not be on this machine, measure it, and plan or check the `saved` plan.

    Does not import torch.

    Raises:
        PlanUnusable: the saved plan is of another machine, model or version.
        AutofluxError: any other of those that probing and planning can end in.
    """
    what_if = what_if or WhatIf()
    found = find_model(model, plugins, base, absent=True)
    if what_if.on is None:
        models_path = Path(found.path) if found.path else None
        hardware = probe(refresh=refresh, models_path=models_path, on_stage=on_stage)
    else:
        hardware = other_machine(what_if.on)
    hardware = changed(hardware, what_if.changes)
    if saved is not None:
        check_plan(saved, hardware, found)
        _require(plugins.backends.get(saved.backend))
        return Prepared(hardware, found, saved.replace(machine=what_if.machine))
    return Prepared(hardware, found, _plan_if(found, wishes, plugins, hardware, what_if))


def _plan_if(model: Model, wishes: Wishes, plugins: Plugins, hardware: Hardware, what_if: WhatIf) -> Plan:
    if what_if == WhatIf():
        return _plan_here(model, wishes, plugins, hardware)
    try:
        plan = plan_for(model, wishes, plugins, hardware)
    except DoesNotFit as error:
        if what_if.machine is None:
            raise
        raise DoesNotFit(f"on {what_if.machine}: {error.message}", hint=error.hint) from error
    return plan.replace(machine=what_if.machine, warnings=(*what_if.assumptions, *plan.warnings))


def _plan_here(model: Model, wishes: Wishes, plugins: Plugins, hardware: Hardware) -> Plan:
    """With what earlier runs of the model on this machine have measured."""
    calibration, warning = CalibrationStore().load(hardware.fingerprint, model)
    plan = plan_for(model, wishes, plugins, hardware, calibration)
    return plan.replace(warnings=(*plan.warnings, warning)) if warning else plan


@dataclass(frozen=True)
class Replanner:
    """Plans a model again on this machine when runs of it have taught something, and keeps that."""

    model: Model
    wishes: Wishes
    plugins: Plugins
    store: CalibrationStore = field(default_factory=CalibrationStore)

    def known(self, hardware: Hardware) -> Calibration | None:
        """What earlier runs have measured; what cannot be used counts as nothing."""
        return self.store.load(hardware.fingerprint, self.model)[0]

    def plan(self, hardware: Hardware, calibration: Calibration) -> Plan:
        """The best plan with that."""
        return plan_for(self.model, self.wishes, self.plugins, hardware, calibration)

    def keep(self, calibration: Calibration) -> None:
        """Remember it; where nothing can be written, it holds for this run only."""
        self.store.save(calibration, self.model)


def other_machine(on: str) -> Hardware:
    """The known machine of that name, or the one whose `probe --json` a file is.

    Raises:
        UnknownName: no machine is known by it.
        DamagedFile: the file is not a probe's, or of another version.
    """
    if is_known(on) or not is_path(on):
        return known_machine(on)
    return read_hardware(read_small(Path(on).expanduser()), repr(on))


def saved_plan(file: str) -> Plan:
    """The plan in a file that `plan --save` or `plan --json` wrote.

    Raises:
        DamagedFile: it cannot be read, or is of another version.
    """
    return read_plan(read_small(Path(file).expanduser()), repr(file))


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
    model: Model, wishes: Wishes, plugins: Plugins, hardware: Hardware, calibration: Calibration | None = None
) -> Plan:
    """Plan with the profiles and backends of the plugins and the user's own profiles."""
    profiles, wishes, backends = _given(wishes, plugins, hardware)
    return make_plan(hardware, model, profiles, wishes, backends, calibration)


def plans_for(
    model: Model, wishes: Wishes, plugins: Plugins, hardware: Hardware, calibration: Calibration | None, *, count: int
) -> list[Plan]:
    """The plans worth running, at most `count`, the one that `plan_for` makes first."""
    profiles, wishes, backends = _given(wishes, plugins, hardware)
    return make_plans(hardware, model, profiles, wishes, backends, calibration, count=count)


def _given(wishes: Wishes, plugins: Plugins, hardware: Hardware) -> tuple[list[Profile], Wishes, list[str]]:
    """The profiles that hold here, the wishes as they refer to these, and the backends that work."""
    if wishes.backend is not None:
        _require(plugins.backends.get(wishes.backend))
    backends = [backend.name for backend in plugins.backends if backend.missing() is None]
    return *_profiles(wishes, plugins, hardware), backends


def _profiles(wishes: Wishes, plugins: Plugins, hardware: Hardware) -> tuple[list[Profile], Wishes]:
    """The profiles that hold on that host, and the wishes with the name of the profile whose file was wished."""
    offered = list(plugins.profiles)
    everything = [*offered, *user_profiles(known=offered)]
    wished = wishes.profile
    if wished is not None and wished not in {profile.name for profile in everything} and is_path(wished):
        text = _profile_text(Path(wished).expanduser())
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
    texts = {repr(str(file)): _profile_text(file) for file in files}
    return parse_profiles(texts, load_plugins().profiles if known is None and texts else known or ())


def _profile_text(file: Path) -> str:
    try:
        return read_small(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedFile(f"the profile {str(file)!r} cannot be read: {error}", hint="save it as UTF-8") from error


def _require(backend: Backend) -> None:
    if command := backend.missing():
        raise MissingExtra(f"the backend {backend.name!r}", command)
