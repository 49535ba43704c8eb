"""Weights in RAM that plans are loaded from again and again: the same picture, however often and however narrow."""

from __future__ import annotations

import numpy as np
import pytest

from autoflux import Precision, api
from autoflux.planning.findings import Findings
from autoflux.planning.terms import TRANSFORMER, Offload
from autoflux.planning.values import Plan, Wishes
from autoflux.plugin_manager import load_plugins
from autoflux.runtime import placement
from benchmarks.host_weights import HostWeights
from benchmarks.planning_runs import _made_up


@pytest.fixture(scope="module")
def weights() -> HostWeights:
    made = HostWeights(tiny=True)
    made.draw()
    return made


@pytest.fixture(scope="module")
def model(weights, tmp_path_factory):
    return weights.model(tmp_path_factory.mktemp("models") / "hollow")


def planned(weights: HostWeights, model, quant: Precision) -> Plan:
    wishes = Wishes(device="cuda", quant=quant, offload=Offload.STREAM, width=64, height=64)
    plan = api.plan_for(model, wishes, load_plugins(), _made_up(), Findings(packs=weights.packs()))
    return plan.replace(device="cpu", graphs=False)


def drawn(weights: HostWeights, model, plan: Plan) -> np.ndarray:
    session = weights.session(plan, model, direct=True)
    try:
        return np.asarray(session.generate("a circle", seed=3, steps=2, width=64, height=64)[0].image)
    finally:
        session.close()


@pytest.mark.parametrize("quant", [Precision.INT8, Precision.FLOAT8])
def test_what_is_made_narrow_once_draws_the_same_picture(weights, model, quant, monkeypatch):
    plan = planned(weights, model, quant)
    assert plan.component(TRANSFORMER).storage == quant
    before, weights._narrow = weights._narrow, {}
    assert not weights.are_there(plan)
    wanted = drawn(weights, model, plan)
    assert weights.narrow(plan) > 0
    assert weights.are_there(plan)
    assert weights.narrow(plan) == 0
    monkeypatch.setattr(placement, "load_narrow", None)  # nothing is made narrow again
    monkeypatch.setattr(placement, "narrow_blocks", None)
    for _ in range(2):
        assert np.array_equal(drawn(weights, model, plan), wanted)
    weights._narrow |= before


def test_planners_are_told_of_packs_in_every_precision(weights, model):
    parts = {(part.component, part.storage): part.nbytes for part in weights.packs().parts}
    wide = parts[TRANSFORMER, Precision.BFLOAT16]
    for quant in (Precision.INT8, Precision.FLOAT8):
        assert wide / 2 < parts[TRANSFORMER, quant] < wide
        plan = planned(weights, model, quant)
        assert plan.component(TRANSFORMER).packed_bytes == parts[TRANSFORMER, quant]
    assert parts["text_encoder_2", Precision.BFLOAT16] > 0
