"""Memory that drawing takes beside weights: what grows with the picture, and what is there whatever is computed."""

from __future__ import annotations

import pytest

from autoflux.hardware.known import known_machine
from autoflux.hardware.values import DeviceKind, Hardware
from autoflux.models.values import Model
from autoflux.planning.activations import (
    HOISTED_STEPS,
    activations,
    encode_activations,
    kept,
    largest_tensor_bytes,
    working_bytes,
)
from autoflux.planning.arranging import placed
from autoflux.planning.footprint import footprint
from autoflux.planning.terms import Offload, Placement, Quality
from autoflux.planning.values import Arrangement, PhaseBytes, Picture, Plan
from tests.planning.test_streaming import FLUX
from tests.planning.test_ways import SMALL, plan, without_triton

CARD = known_machine("rtx-4090-24gb")
WIDTH = 19 * 12 + 38 * 3
"""Vectors of the hidden size that FLUX.1's modulation gives: twelve for a double block, three for a single one."""


@pytest.fixture(scope="module")
def streamed() -> Plan:
    return plan(CARD, SMALL, offload=Offload.STREAM, quality=Quality.EXACT, graphs=False)


ROCM_CARD = CARD.replace(versions=CARD.versions | {"torch_hip": "assumed"})


def changed_to(capability: str) -> Hardware:
    return CARD.replace(accelerators=tuple(card.replace(capability=capability) for card in CARD.accelerators))


def of(made: Plan, *, steps: int = 28, batch: int = 1, model: Model = SMALL, **changed) -> PhaseBytes:
    """What is kept, without what the allocator keeps in each phase."""
    picture = made.predicted.picture.replace(steps=steps, batch=batch)
    arrangement = made.arrangement.replace(**changed)
    return kept(model, arrangement, made.priors.replace(allocator_bytes=0), picture)


def test_each_picture_holds_the_modulation_of_its_steps(streamed):
    """2.1 MB a step of FLUX.1, as was measured."""
    whole = kept(FLUX, streamed.arrangement, streamed.priors.replace(allocator_bytes=0), streamed.predicted.picture)
    assert whole.denoise == 28 * WIDTH * 3072 * 2
    one = of(streamed).denoise
    assert of(streamed, batch=4) == PhaseBytes(encode=0, denoise=4 * one, decode=0)
    assert of(streamed, steps=14).denoise == one // 2
    assert of(streamed, steps=HOISTED_STEPS) == of(streamed, steps=50)


def test_nothing_is_held_where_modulation_stays_in_its_blocks():
    resident = plan(CARD, SMALL, offload=Offload.NONE, quality=Quality.EXACT)
    assert of(resident, batch=4) == PhaseBytes(encode=0, denoise=0, decode=0)


def test_what_the_allocator_keeps_is_there_in_each_phase(streamed):
    def needs(nbytes: int) -> PhaseBytes:
        priors = streamed.priors.replace(allocator_bytes=nbytes)
        return working_bytes(SMALL, streamed.arrangement, priors, streamed.predicted.picture)

    assert needs(10**8) == needs(0) + PhaseBytes(encode=10**8, denoise=10**8, decode=10**8)


def test_compiled_blocks_compute_in_less(streamed):
    def computing(arrangement: Arrangement) -> int:
        return activations(SMALL, arrangement, streamed.priors, streamed.predicted.picture).denoise

    share = computing(streamed.arrangement.replace(compiled=True)) / computing(streamed.arrangement)
    assert share == pytest.approx(streamed.priors.compiled_activations)
    assert share < 1


@pytest.mark.parametrize(("batch", "native", "item"), [(1, False, 2), (4, False, 2), (4, True, 4)])
def test_the_largest_tensor_of_a_step_is_the_widest_of_all_pictures(streamed, batch, native, item):
    picture = Picture(width=1024, height=1024, batch=batch, steps=28, text_tokens=512)
    components = tuple(c.replace(native=native and c.name == "transformer") for c in streamed.components)
    arrangement = streamed.arrangement.replace(components=components)
    assert largest_tensor_bytes(FLUX, arrangement, picture) == batch * (4096 + 512) * 7 * 3072 * item


def test_an_encoder_that_the_processor_computes_takes_ram_instead(streamed):
    def counted(placement: Placement) -> tuple[int, int]:
        packed = tuple(part.replace(packed_bytes=1) for part in streamed.components)  # takes no RAM while it is read
        arrangement = placed(streamed.arrangement.replace(components=packed), "text_encoder_2", placement)
        picture: Picture = streamed.predicted.picture
        assert encode_activations(SMALL, arrangement, picture) == encoding
        taken = footprint(SMALL, arrangement, CARD.accelerators[0].kind, streamed.priors, picture)
        return activations(SMALL, arrangement, streamed.priors, picture).encode, taken.ram_bytes

    encoding = encode_activations(SMALL, streamed.arrangement, streamed.predicted.picture)
    (there, streaming), (host, on_host) = counted(Placement.STREAMED), counted(Placement.HOST)
    assert (there, host) == (encoding, 0)
    assert on_host == streaming + encoding


def test_an_encoder_that_the_processor_computes_takes_of_the_one_memory_of_a_chip(streamed):
    def need(placement: Placement) -> PhaseBytes:
        arrangement = placed(streamed.arrangement, "text_encoder_2", placement)
        picture = streamed.predicted.picture
        return footprint(SMALL, arrangement, DeviceKind.MPS, streamed.priors, picture, unified_memory=True).vram

    assert need(Placement.HOST) == need(Placement.DEVICE)


@pytest.mark.parametrize("other", [without_triton(CARD), changed_to("7.5"), ROCM_CARD])
def test_without_kernels_of_our_own_a_step_takes_more(other):
    with_triton, without = (plan(hardware, SMALL, quality=Quality.EXACT).priors for hardware in (CARD, other))
    assert without.denoise_activations == pytest.approx(with_triton.denoise_activations * 1.1)
