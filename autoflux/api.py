"""autoflux from Python: probe, plan and load, the same way the commands do it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autoflux.errors import DamagedFile, MissingExtra, ModelNotFound
from autoflux.hardware.probe import probe
from autoflux.hardware.values import Hardware
from autoflux.models.hubs.cached import find_cached, model_path
from autoflux.models.hubs.names import default_source, parse_reference
from autoflux.models.hubs.stores import stores
from autoflux.models.hubs.values import Reference
from autoflux.models.inventory import take_stock
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
    wishes: Wishes | None = None,
    plan: Plan | None = None,
    progress: LoadProgress | None = None,
) -> Session:
    """Measure this machine (or take the last measurement), plan, and load a model.

    Args:
        model: a registered name or the path of a model folder.
        wishes: what the plan must keep to.
        plan: a plan made before, instead of planning now.
        progress: called with what is being loaded and the share done.

    Raises:
        AutofluxError: any of those in `autoflux.errors` that planning and loading can end in.
    """
    plugins = load_plugins()
    found = find_model(model, plugins)
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
    model: str, wishes: Wishes, plugins: Plugins, *, on_stage: OnStage | None = None, refresh: bool = False
) -> Prepared:
    """Take stock of a model, measure the machine and plan. Does not import torch."""
    found = find_model(model, plugins)
    hardware = probe(refresh=refresh, models_path=Path(found.path), on_stage=on_stage)
    return Prepared(hardware, found, plan_for(found, wishes, plugins, hardware))


def find_model(model: str, plugins: Plugins) -> Model:
    """The model registered under that name, the one in that folder, or the one downloaded under that name or id.

    Raises:
        UnknownName: neither a name nor a path.
        ModelNotFound: a model of a hub that is not on this machine, or only in part.
        AutofluxError: what `take_stock` says of the folder.
    """
    if model in plugins.models.names():
        return take_stock(Path(plugins.models.get(model).path), model)
    path = Path(model).expanduser()
    if path.exists():
        return take_stock(path)
    if reference := parse_reference(model, usual=default_source()):
        return _downloaded(reference)
    if any(mark in model for mark in "/\\."):
        return take_stock(path)
    return take_stock(Path(plugins.models.get(model).path), model)


def _downloaded(reference: Reference) -> Model:
    found = find_cached(reference, stores())
    if found is None:
        raise ModelNotFound(
            f"{reference.name!r} is neither a folder nor a model that was downloaded to this machine",
            hint=f"autoflux models pull {reference.name}",
        )
    return take_stock(model_path(found, reference.file), found.name)


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
