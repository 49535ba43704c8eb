"""autoflux from Python: probe, plan and load, the same way the commands do it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autoflux.errors import DamagedFile, MissingExtra
from autoflux.hardware.probe import probe
from autoflux.hardware.values import Hardware
from autoflux.models.finding import find, require_weights
from autoflux.models.values import Model
from autoflux.paths import config_dir
from autoflux.planning.planner import make_plan
from autoflux.planning.profiles import parse_profile
from autoflux.planning.values import Plan, Profile, Wishes
from autoflux.plugin_manager import Plugins, load_plugins

if TYPE_CHECKING:
    from autoflux.runtime.pipeline import Backend, LoadProgress
    from autoflux.runtime.session import Session

__all__ = ["Prepared", "find_model", "load", "make_plan", "plan_for", "prepare", "probe"]

OnStage = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """Everything known before weights are loaded."""

    hardware: Hardware
    model: Model
    plan: Plan


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
        plan: a plan made before, instead of planning now.
        progress: called with what is being loaded and the share done.

    Raises:
        AutofluxError: any of those in `autoflux.errors` that planning and loading can end in.
    """
    plugins = load_plugins()
    found = find_model(model, plugins, base)
    if plan is None:
        plan = plan_for(found, wishes or Wishes(), plugins, probe())
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
) -> Prepared:
    """Take stock of a model, which need not be on this machine, measure it and plan. Does not import torch."""
    found = find_model(model, plugins, base, absent=True)
    models_path = Path(found.path) if found.path else None
    hardware = probe(refresh=refresh, models_path=models_path, on_stage=on_stage)
    return Prepared(hardware, found, plan_for(found, wishes, plugins, hardware))


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


def plan_for(model: Model, wishes: Wishes, plugins: Plugins, hardware: Hardware) -> Plan:
    """Plan with the profiles and backends of the plugins and the user's own profiles."""
    if wishes.backend is not None:
        _require(plugins.backends.get(wishes.backend))
    backends = [backend.name for backend in plugins.backends if backend.missing() is None]
    return make_plan(hardware, model, [*plugins.profiles, *user_profiles()], wishes, backends)


def user_profiles(folder: Path | None = None) -> list[Profile]:
    """The profiles in the user's configuration folder, by file name.

    Raises:
        DamagedFile: one cannot be read.
    """
    files = sorted((folder or config_dir() / "profiles").glob("*.toml"))
    try:
        texts: Mapping[Path, str] = {file: file.read_text(encoding="utf-8") for file in files}
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedFile(f"a profile cannot be read: {error}") from error
    return [parse_profile(text, repr(str(file))) for file, text in texts.items()]


def _require(backend: Backend) -> None:
    if command := backend.missing():
        raise MissingExtra(f"the backend {backend.name!r}", command)
