"""The libraries' own ways to bring weights to the device: same pictures, and what of the plan they are told."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import autoflux
from autoflux import ComponentPlan, ContradictoryWishes, Placement, Precision, Wishes
from autoflux.runtime import decoding
from autoflux.runtime.placement import Residences
from tests.plugins.plans import native
from tests.runtime.fakes import hooks_of

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def resident(tiny_model: Path):
    with autoflux.load(str(tiny_model), wishes=Wishes(device="cpu", backend="diffusers")) as session:
        yield session


@pytest.fixture(params=["diffusers", "diffsynth"])
def backend(request):
    if request.param == "diffsynth":
        pytest.importorskip("diffsynth", reason="needs the extra: pip install 'autoflux[diffsynth]'")
    return request.param


def test_pictures_are_those_with_everything_on_the_device(resident, tiny_model, backend):
    with autoflux.load(str(tiny_model), plan=native(resident.plan, backend)) as session:
        for seed in range(2):
            (wanted,) = resident.generate(PROMPT, seed=seed, steps=3)
            (found,) = session.generate(PROMPT, seed=seed, steps=3)
            difference = np.asarray(found.image).astype(int) - np.asarray(wanted.image)
            assert np.abs(difference).max() <= 1


def test_the_decoder_is_asked_to_spare_memory_however_it_is_held(resident, tiny_model, backend, monkeypatch):
    asked: list[int] = []
    with autoflux.load(str(tiny_model), plan=native(resident.plan, backend)) as session:
        monkeypatch.setattr(decoding, "_is_spared", lambda x: asked.append(x.shape[-1]))
        for opened in (resident, session):
            (picture,) = opened.generate(PROMPT, seed=0, steps=1)
            assert max(asked) == picture.image.width
            asked.clear()


def test_formats_that_a_library_cannot_hold_are_refused(resident, tiny_model, backend):
    plan = native(resident.plan, backend)
    narrow = tuple(component.replace(storage=Precision.INT8) for component in plan.components)
    with pytest.raises(ContradictoryWishes, match="own offload"):
        autoflux.load(str(tiny_model), plan=plan.replace(components=narrow))


def test_a_backend_without_an_offload_of_its_own_says_so(resident):
    residences = Residences(native(resident.plan, "diffusers"), block_lists=())
    with pytest.raises(ContradictoryWishes, match="no offload of its own"):
        residences.hold("vae", torch.nn.Linear(4, 4))


def test_diffusers_hooks_every_component(resident, tiny_model):
    from diffusers.hooks.group_offloading import _is_group_offload_enabled

    with autoflux.load(str(tiny_model), plan=native(resident.plan, "diffusers")) as session:
        pipe = session.pipeline._pipe
        for network in (session.pipeline._transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.vae):
            assert _is_group_offload_enabled(network)
    assert not _is_group_offload_enabled(resident.pipeline._transformer)


def test_closing_lets_go_of_the_weights(resident, tiny_model, backend):
    session = autoflux.load(str(tiny_model), plan=native(resident.plan, backend))
    weights = weakref.ref(next(session.pipeline._transformer.parameters()))
    session.close()
    gc.collect()
    assert weights() is None


class TestDiffSynth:
    """What it is told, and that it does it."""

    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("diffsynth", reason="needs the extra: pip install 'autoflux[diffsynth]'")

    def test_its_four_states_follow_the_plan(self):
        from autoflux.plugins.diffsynth_offload import vram_fields

        planned = ComponentPlan(
            name="transformer",
            storage=Precision.FLOAT8,
            arithmetic=Precision.BFLOAT16,
            placement=Placement.NATIVE,
        )
        fields = vram_fields(planned, "cuda:1")
        assert fields == {
            "offload_dtype": torch.float8_e4m3fn,
            "offload_device": "cpu",
            "onload_dtype": torch.float8_e4m3fn,
            "onload_device": "cpu",
            "preparing_dtype": torch.float8_e4m3fn,
            "preparing_device": "cuda:1",
            "computation_dtype": torch.bfloat16,
            "computation_device": "cuda:1",
        }
        assert vram_fields(planned.replace(storage=Precision.BFLOAT16), "cuda")["offload_dtype"] == torch.bfloat16
        with pytest.raises(ContradictoryWishes):
            vram_fields(planned.replace(name="vae"), "cuda")

    def test_its_limit_is_what_the_plan_leaves_for_weights_and_the_context(self, resident):
        from autoflux.plugins.diffsynth_offload import VramManagement

        plan = native(resident.plan, "diffsynth")
        assert VramManagement.planned(plan).limit_gib is None
        priors = plan.priors.replace(context_bytes=2**29)
        limited = plan.replace(vram_limit_bytes=2**33, ring_bytes=3 * 2**30, priors=priors)
        assert VramManagement.planned(limited).limit_gib == 3.5

    def test_only_what_is_used_is_on_the_device(self, resident, tiny_model):
        from autoflux.plugins.diffsynth_offload import _managed

        with autoflux.load(str(tiny_model), plan=native(resident.plan, "diffsynth")) as session:
            pipe, dit = session.pipeline._pipe, session.pipeline._transformer
            assert dit.vram_management_enabled
            assert not hooks_of(dit)

            def states(network):
                return {module.state for module in _managed(network)}

            assert states(dit) == {0}
            session.pipeline.encode([PROMPT])
            # 2: brought, which happens at the first use; 1: ready to be; 0: away.
            assert states(pipe.text_encoder) | states(pipe.text_encoder_2) <= {1, 2}
            assert states(dit) == {0}
            session.generate(PROMPT, seed=1, steps=1)
            assert states(dit) == states(pipe.text_encoder) == states(pipe.text_encoder_2) == {0}
            assert 2 in states(pipe.vae)

    def test_weights_stored_in_eight_bits_are_computed_wide(self, resident, tiny_model):
        plan = native(resident.plan, "diffsynth")
        parts = tuple(
            component.replace(storage=Precision.FLOAT8) if component.name == "transformer" else component
            for component in plan.components
        )
        with autoflux.load(str(tiny_model), plan=plan.replace(components=parts)) as session:
            assert {w.dtype for w in session.pipeline._transformer.parameters()} == {torch.float8_e4m3fn}
            (found,) = session.generate(PROMPT, seed=1, steps=2)
        (wanted,) = resident.generate(PROMPT, seed=1, steps=2)
        difference = np.asarray(found.image).astype(int) - np.asarray(wanted.image)
        assert 0 < np.abs(difference).mean() < 32
