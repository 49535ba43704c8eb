"""Plans that leave weights to the backend's library: only by wish, and never reckoned too well."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoflux.errors import ContradictoryWishes, DoesNotFit
from autoflux.planning.candidates import candidates
from autoflux.planning.fit import batch_limit
from autoflux.planning.native import PINNED_EXCESS, on_device_bytes, passing_bytes
from autoflux.planning.terms import Offload, Origin, Placement
from autoflux.planning.values import Picture, Plan, Wishes
from tests.conftest import GB, card
from tests.planning.test_planner import PROFILES, plan
from tests.planning.test_streaming import FLUX

NATIVE = Wishes(device="cuda", offload=Offload.NATIVE)


def made(hardware, wishes: Wishes) -> Plan:
    """A plan for FLUX.1-dev."""
    return plan(hardware, wishes, FLUX)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(vram=st.floats(2, 100), ram=st.floats(8, 256))
def test_it_is_never_chosen(machine, vram, ram):
    picture = Picture(width=1024, height=1024, steps=28, text_tokens=512)
    tried = list(candidates(machine(card(vram), ram_gb=ram), FLUX, PROFILES, Wishes(), picture))
    assert Offload.NATIVE not in {candidate.offload for candidate in tried}


def test_a_wish_leaves_every_component_to_the_backend(machine):
    found = made(machine(card(12)), NATIVE)
    assert found.offload == Offload.NATIVE
    assert {component.placement for component in found.components} == {Placement.NATIVE}
    assert not found.hoist_modulation
    assert next(choice for choice in found.choices if choice.topic == "offload").origin == Origin.WISH
    assert Plan.from_json(found.to_json()) == found


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(vram=st.floats(9, 60))
def test_what_the_library_may_fill_leaves_room_for_everything_else(machine, vram):
    found = made(machine(card(vram)), NATIVE)
    assert found.vram_limit_bytes is not None
    assert found.predicted.peak_vram_bytes.peak <= found.vram_limit_bytes
    beside = found.vram_limit_bytes - found.ring_bytes - passing_bytes(FLUX, found.components)
    assert beside >= found.priors.context_bytes
    most = max(component.bytes_as(found.components[0].storage) for component in FLUX.components)
    assert on_device_bytes(FLUX, found.arrangement, ["transformer"]) <= most


def test_it_is_reckoned_slower_than_our_own_streaming(machine):
    streamed, native = (made(machine(card(8)), NATIVE.replace(offload=how)) for how in (Offload.STREAM, Offload.NATIVE))
    assert native.predicted.seconds_per_step > streamed.predicted.seconds_per_step
    assert native.predicted.seconds_per_image > streamed.predicted.seconds_per_image


def test_a_step_is_reckoned_to_copy_all_weights(machine):
    found = made(machine(card(12)), NATIVE)
    link_gb_per_s = 6.0
    copied = FLUX.component("transformer").bytes_as(found.components[0].storage) / (link_gb_per_s * GB)
    assert found.predicted.seconds_per_step > copied


def test_pinned_memory_counts_as_torch_rounds_it(machine):
    weights = sum(
        component.bytes_as(made(machine(card(12)), NATIVE).components[0].storage) for component in FLUX.components
    )
    need = PINNED_EXCESS * weights / GB
    with pytest.raises(DoesNotFit, match="RAM"):
        made(machine(card(12), ram_gb=0.99 * need), NATIVE)
    assert made(machine(card(12), ram_gb=need + 8), NATIVE).predicted.peak_ram_bytes > need * GB


def test_a_session_may_draw_what_was_planned_for(machine):
    found = made(machine(card(12)), NATIVE)
    assert batch_limit(found, FLUX, 1024, 1024) == found.max_batch >= 1


def test_a_card_too_small_for_what_passes_is_refused(machine):
    with pytest.raises(DoesNotFit, match="device memory"):
        made(machine(card(2)), NATIVE)


def test_it_makes_no_sense_in_the_hosts_own_memory(machine):
    with pytest.raises(ContradictoryWishes):
        made(machine(), Wishes(device="cpu", offload=Offload.NATIVE))
