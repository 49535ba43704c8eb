"""What is loaded when: text encoders first, or not before a prompt needs them."""

from __future__ import annotations

import numpy as np
import pytest

from autoflux import DamagedPack, Model, Placement, Plan, Precision, Waiting
from autoflux.api import open_session
from autoflux.models.packs import WEIGHTS
from autoflux.plugin_manager import load_plugins
from autoflux.runtime.session import Session
from tests.plugins.test_packs import flip, packed, planned

KNOWN, NEW = "a red circle", "two large green squares above the small yellow star"
ENCODERS = ["loading text encoder", "loading text encoder 2"]
OTHERS = ["loading vae", "loading transformer"]


pytestmark = pytest.mark.usefixtures("shelf")


@pytest.fixture
def model(tiny_found) -> Model:
    return tiny_found


def opened(plan: Plan, model: Model, *prompts: str) -> tuple[Session, list[str]]:
    """A session, and what was loaded for it, in order."""
    stages: list[str] = []
    session = open_session(plan, model, load_plugins(), lambda stage, _share: stages.append(stage), prompts=prompts)
    return session, stages


def picture(session: Session, prompt: str) -> np.ndarray:
    return np.asarray(session.generate(prompt, seed=5, steps=2)[0].image)


HOLDINGS = [
    {"placement": Placement.DEVICE},
    {"placement": Placement.VISITING},
    {"placement": Placement.STREAMED, "waiting": Waiting.PINNED},
    {"placement": Placement.STREAMED, "waiting": Waiting.PAGEABLE},
    {"placement": Placement.STREAMED, "waiting": Waiting.DISK},
]


@pytest.mark.parametrize("backend", ["diffusers", "diffsynth"])
def test_text_encoders_come_first(model, backend):
    if backend == "diffsynth":
        pytest.importorskip("diffsynth", reason="needs the extra: pip install 'autoflux[diffsynth]'")
    session, stages = opened(planned(model, Precision.BFLOAT16, backend=backend), model, NEW)
    with session:
        assert stages == [*ENCODERS, *OTHERS]
        assert not session.deferred


@pytest.mark.parametrize("from_packs", [False, True])
@pytest.mark.parametrize("holding", HOLDINGS, ids=lambda held: "-".join(map(str, held.values())))
def test_for_a_known_prompt_they_are_not_read_until_there_is_another(model, shelf, holding, from_packs):
    plan = planned(model, Precision.BFLOAT16, **holding)
    session, _ = opened(plan, model)
    with session:
        wanted = {prompt: picture(session, prompt) for prompt in (KNOWN, NEW)}
        session._prompts.forget(NEW)
    if from_packs:
        packed(model, shelf, Precision.BFLOAT16)
    session, stages = opened(plan, model, KNOWN, KNOWN)
    with session:
        assert stages == OTHERS
        assert np.array_equal(picture(session, KNOWN), wanted[KNOWN])
        assert session.deferred
        assert np.array_equal(picture(session, NEW), wanted[NEW])
        assert not session.deferred
        assert np.array_equal(picture(session, KNOWN), wanted[KNOWN])


def test_one_new_prompt_among_known_ones_needs_them(model):
    plan = planned(model, Precision.BFLOAT16)
    session, _ = opened(plan, model)
    with session:
        picture(session, KNOWN)
    session, stages = opened(plan, model, KNOWN, NEW)
    with session:
        assert stages == [*ENCODERS, *OTHERS]


def test_warming_up_reads_what_was_deferred(model):
    plan = planned(model, Precision.BFLOAT16)
    session, _ = opened(plan, model)
    with session:
        picture(session, KNOWN)
    session, _ = opened(plan, model, KNOWN)
    with session:
        assert session.deferred
        session.warm_up()
        assert not session.deferred


def test_where_one_format_for_all_weights_will_not_do_they_are_read_at_once(model):
    plan = planned(model, Precision.BFLOAT16)
    half = [c.replace(storage=Precision.FLOAT16, arithmetic=Precision.FLOAT16) for c in plan.components[:2]]
    plan = plan.replace(components=(*half, *plan.components[2:]))
    session, _ = opened(plan, model)
    with session:
        picture(session, KNOWN)
    session, stages = opened(plan, model, KNOWN)
    with session:
        assert stages == [*ENCODERS, *OTHERS]


def test_a_damaged_pack_that_is_met_late_ends_that_picture_with_a_message(model, shelf):
    plan = planned(model, Precision.BFLOAT16)
    session, _ = opened(plan, model)
    with session:
        picture(session, KNOWN)
    pack = packed(model, shelf, Precision.BFLOAT16)["text_encoder_2"]
    flip(shelf.folder(pack.key) / WEIGHTS, pack.nbytes - 1)
    session, _ = opened(plan, model, KNOWN)
    with session:
        picture(session, KNOWN)
        with pytest.raises(DamagedPack, match="'text_encoder_2'"):
            picture(session, NEW)
    assert shelf.find(pack.key) is None
