"""Opening a model: what is read ahead while the backend imports its libraries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autoflux import DamagedCheckpoint, Model, Plan, Precision
from autoflux.models.packs import WEIGHTS
from autoflux.planning.packs import recipe_for
from autoflux.runtime import opening
from autoflux.runtime.cache_filling import Filling
from tests.plugins.test_packs import packed, planned

pytestmark = pytest.mark.usefixtures("shelf")


class Backend:
    """Notes whether files are still read ahead, before and after it begins with the first weights."""

    defers = True

    def __init__(self, ahead: list[Filling], *, fails: bool = False) -> None:
        self._ahead, self._fails = ahead, fails
        self.stopped: list[bool] = []

    def build(self, plan: Plan, model: Model, progress, later: tuple[str, ...] = ()) -> Any:
        self.stopped.append(self._ahead[0]._stopped)
        if self._fails:
            raise DamagedCheckpoint("broken", hint="none")
        progress("loading", 0.0)
        self.stopped.append(self._ahead[0]._stopped)
        return SimpleNamespace(later=later)


@pytest.fixture
def model(tiny_found) -> Model:
    return tiny_found


@pytest.fixture
def plan(model) -> Plan:
    return planned(model, Precision.BFLOAT16)


@pytest.fixture
def ahead(monkeypatch) -> list[Filling]:
    """What reads ahead; its files are in `wanted`."""
    begun: list[Filling] = []

    def begin(paths: list[Path]) -> Filling:
        begun.append(Filling(paths))
        begun[-1].wanted = paths  # type: ignore[attr-defined]
        return begun[-1]

    monkeypatch.setattr(opening, "read_ahead", begin)
    return begun


def open_with(backend: Backend, plan: Plan, model: Model, *prompts: str) -> list[str]:
    stages: list[str] = []
    opening.open_with(backend, plan, model, lambda stage, _: stages.append(stage), prompts)  # type: ignore[arg-type]
    return stages


def test_files_are_read_ahead_until_the_backend_begins_with_the_first(plan, model, ahead):
    backend = Backend(ahead)
    assert open_with(backend, plan, model) == ["loading"]
    assert backend.stopped == [False, True]
    assert ahead[0].wanted == [Path(file) for component in model.in_loading_order for file in component.files]


def test_nothing_is_read_any_more_when_opening_has_failed(plan, model, ahead):
    with pytest.raises(DamagedCheckpoint, match="broken"):
        open_with(Backend(ahead, fails=True), plan, model)
    assert ahead[0]._stopped


@pytest.mark.parametrize("as_packed", [True, False, None])
def test_the_backend_says_whether_tensors_stay_as_they_are_packed(plan, model, ahead, monkeypatch, as_packed):
    told: list[bool] = []

    @contextmanager
    def bringing(*_: object, as_packed: bool) -> Iterator[bool]:
        told.append(as_packed)
        yield False

    monkeypatch.setattr("autoflux.runtime.ahead.bringing_ahead", bringing)
    backend = Backend(ahead)
    if as_packed is not None:
        backend.as_packed = as_packed  # type: ignore[attr-defined]
    open_with(backend, plan.replace(device="cuda:0"), model)
    assert told == [bool(as_packed)]


def test_packs_are_read_where_there_are(model, plan, shelf, ahead, monkeypatch):
    packed(model, shelf, Precision.BFLOAT16)
    packs = [
        shelf.folder(recipe.key()) / WEIGHTS
        for component in model.in_loading_order
        if (recipe := recipe_for(component, plan.component(component.name)))
    ]
    open_with(Backend(ahead), plan, model)
    assert ahead[0].wanted == packs
    monkeypatch.setenv("AUTOFLUX_NO_PACK", "1")
    open_with(Backend(ahead), plan, model)
    assert not set(ahead[1].wanted) & set(packs)


def test_the_models_files_are_read_where_packs_may_not_be_looked_at(model, plan, shelf, ahead, monkeypatch):
    packed(model, shelf, Precision.BFLOAT16)
    stat = Path.stat

    def refusing(path: Path, **options):
        if path.is_relative_to(shelf.root):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refusing)
    assert open_with(Backend(ahead), plan, model) == ["loading"]
    assert ahead[0].wanted == [Path(file) for component in model.in_loading_order for file in component.files]


def test_text_encoders_are_left_out_where_the_prompts_are_known(plan, model, ahead, monkeypatch):
    monkeypatch.setattr(opening.PromptCache, "knows", lambda _self, prompt: prompt == "known")
    encoders = {Path(f) for part in model.in_loading_order if part.name.startswith("text_encoder") for f in part.files}
    for prompts, left_out in {("known",): True, ("known", "new"): False}.items():
        open_with(Backend(ahead), plan, model, *prompts)
        assert encoders.isdisjoint(ahead[-1].wanted) == left_out
