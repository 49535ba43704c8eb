"""Plans that stream: FLUX.1-dev's real sizes on made-up machines."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoflux.errors import DoesNotFit
from autoflux.models.values import Block, BlockList, Component, Model, ParameterCount, Precision
from autoflux.planning.arranging import rates_for
from autoflux.planning.schedule import Unit as Load
from autoflux.planning.schedule import bound_seconds
from autoflux.planning.sites import sites
from autoflux.planning.speed import Way
from autoflux.planning.streaming import (
    arena_bytes,
    copied_modulation,
    modulation_bytes,
    pinned_bytes,
    stage_bytes,
    staying_bytes,
    streamed_bytes,
)
from autoflux.planning.terms import Offload, Placement, Quality, TransferUnit, Waiting
from autoflux.planning.timeline import timeline
from autoflux.planning.values import Plan, Wishes
from autoflux.planning.ways import Option
from autoflux.planning.weights import component_bytes, largest_unit
from tests.conftest import FLUX_DEV, GB, card, figure, size
from tests.planning.test_planner import PROFILES

MODULATION = 3072 * 3072


def block(total: int, modulation: int) -> Block:
    counts = ParameterCount(matmul=total - modulation, modulation=modulation)
    return Block(parameters=counts, disk_bytes=2 * total)


def component(name: str, rest: int, **lists: tuple[int, Block]) -> Component:
    return Component(
        name=name,
        class_name="Network",
        disk_precision=Precision.BFLOAT16,
        block_lists=tuple(BlockList(path=path, blocks=(one,) * count) for path, (count, one) in lists.items()),
        rest=block(rest, 0),
    )


FLUX = Model(
    name="flux",
    path="/models/flux",
    revision="1",
    architecture=FLUX_DEV,
    components=(
        component("text_encoder", 38_000_000, layers=(12, block(7_087_872, 0))),
        component("text_encoder_2", 131_600_384, block=(24, block(192_946_176, 0))),
        component(
            "transformer",
            64_124_992,
            transformer_blocks=(19, block(339_831_296, 12 * MODULATION)),
            single_transformer_blocks=(38, block(141_591_808, 3 * MODULATION)),
        ),
        component("vae", 83_819_683),
    ),
)


BLOCKS = {"double": 19, "single": 38}


@pytest.fixture
def flux_machine(machine):
    """A machine with one card that copies 24 GB/s from pinned memory and 6 from other."""

    def make(vram_gb: float, *, ram_gb: float = 64, pinnable_gb: float | None = None, tflops: float = 100.0):
        plain = card(vram_gb, tflops=tflops)
        (pageable,) = plain.link.transfers
        pinned = pageable.replace(pinned=True, to_device_gb_per_s=figure(24.0))
        made = machine(plain.replace(link=plain.link.replace(transfers=(pageable, pinned))), ram_gb=ram_gb)
        host = made.host.replace(copy_gb_per_s=figure(9.0))
        if pinnable_gb is not None:
            host = host.replace(pinnable_bytes=size(int(pinnable_gb * GB)))
        return made.replace(host=host)

    return make


def plan(hardware, **wishes) -> Plan:
    from autoflux.planning.planner import make_plan

    exact = {"device": "cuda", "quality": Quality.EXACT}
    return make_plan(hardware, FLUX, PROFILES, Wishes(**{**exact, **wishes}), ("diffusers",))


def test_a_card_that_holds_a_third_streams_the_rest(flux_machine):
    made = plan(flux_machine(12, pinnable_gb=60))
    assert made.offload == Offload.STREAM
    assert made.component("transformer").placement == Placement.STREAMED
    assert made.hoist_modulation
    assert made.waiting == Waiting.PINNED
    assert 5 < len(made.component("transformer").resident) < 40
    assert made.predicted.peak_vram_bytes.peak <= made.vram_limit_bytes
    assert made.predicted.pinned_bytes == pinned_bytes(FLUX, made.arrangement)
    assert made.predicted.pinned_bytes > streamed_bytes(FLUX, made.arrangement)
    assert "pinned RAM" in next(c.reason for c in made.choices if c.topic == "offload")
    assert Plan.from_json(made.to_json()) == made


def test_the_step_is_close_to_what_link_and_arithmetic_allow(flux_machine):
    made = plan(flux_machine(12, pinnable_gb=60, tflops=300))
    blocks = FLUX.component("transformer").blocks
    seconds = made.predicted.seconds_per_step
    arithmetic = sum(BLOCKS[kind] * seconds for kind, seconds in made.predicted.block_seconds.items())
    loads = [Load(2 * (b.parameters.total - b.parameters.modulation), arithmetic / 57) for b in blocks]
    resident = made.component("transformer").resident
    assert bound_seconds(loads, resident, 24e9) <= seconds <= 1.06 * bound_seconds(loads, resident, 24e9)


@given(vram=st.floats(3.0, 40.0), more=st.floats(0.0, 8.0), tflops=st.sampled_from([20.0, 100.0, 690.0]))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_more_memory_never_gives_a_slower_picture(flux_machine, vram, more, tflops):
    def taken(gb: float) -> float:
        hardware = flux_machine(gb, ram_gb=128, pinnable_gb=120, tflops=tflops)
        made = plan(hardware, offload=Offload.STREAM, quality=Quality.BALANCED)
        assert made.predicted.peak_vram_bytes.peak <= made.vram_limit_bytes
        return made.predicted.seconds_per_image

    try:
        less = taken(vram)
    except DoesNotFit:
        return
    assert taken(vram + more) <= less * (1 + 1e-9)


def test_a_small_card_decodes_in_tiles_only_when_it_has_to(flux_machine):
    small, middle = plan(flux_machine(3.3, pinnable_gb=60)), plan(flux_machine(8, pinnable_gb=60))
    assert (small.tile_decode, middle.tile_decode) == (True, False)
    assert small.predicted.peak_vram_bytes.decode < middle.predicted.peak_vram_bytes.decode


def test_what_stays_makes_room_for_the_decoder(flux_machine):
    made = plan(flux_machine(12, pinnable_gb=60, tflops=690))
    assert (made.park_for_decode, made.tile_decode) == (True, False)
    peaks = made.predicted.peak_vram_bytes
    assert peaks.denoise > 10 * GB
    assert peaks.decode < 6 * GB
    assert next(c.value for c in made.choices if c.topic == "decode") == "parked"
    # What is brought back has to wait in pinned RAM as well.
    assert made.predicted.pinned_bytes > 33 * GB


def test_where_there_is_room_for_everything_modulation_stays_too_and_nothing_passes_through(flux_machine):
    made = plan(flux_machine(48, pinnable_gb=60))
    assert (made.offload, made.hoist_modulation, made.keep_modulation) == (Offload.STREAM, True, True)
    assert made.ring_bytes == pinned_bytes(FLUX, made.arrangement) == streamed_bytes(FLUX, made.arrangement) == 0
    copied = made.arrangement.replace(keep_modulation=False)
    modulation = modulation_bytes(FLUX, copied)
    assert pinned_bytes(FLUX, copied) == copied_modulation(FLUX, copied) == modulation > 6 * GB
    assert modulation <= arena_bytes(FLUX, made.arrangement) - arena_bytes(FLUX, copied) < modulation + 10**6
    assert "its weights stay for that too" in next(c.reason for c in made.choices if c.topic == "offload")
    whole = plan(flux_machine(48, pinnable_gb=60), offload=Offload.NONE)
    assert made.predicted.seconds_per_image <= whole.predicted.seconds_per_image
    assert Plan.from_json(made.to_json()) == made


def test_modulation_is_copied_for_each_picture_where_its_room_is_worth_more_to_blocks(flux_machine):
    made = plan(flux_machine(12, pinnable_gb=60))
    assert made.hoist_modulation
    assert not made.keep_modulation
    assert copied_modulation(FLUX, made.arrangement) == modulation_bytes(FLUX, made.arrangement) > 0


def test_where_layers_are_streamed_nothing_stays_and_the_ring_holds_the_largest(flux_machine):
    """Those outside of blocks too; and modulation lies in its blocks."""
    made = plan(flux_machine(12, pinnable_gb=60), unit=TransferUnit.LAYER).arrangement
    assert arena_bytes(FLUX, made) == made.ring_bytes
    assert modulation_bytes(FLUX, made) == 0
    assert streamed_bytes(FLUX, made) == component_bytes(FLUX, made.component("transformer"))
    wide = 6 * FLUX.architecture.hidden_size**2 * 2
    assert made.ring_bytes >= wide
    narrow = plan(flux_machine(12, pinnable_gb=60), unit=TransferUnit.LAYER, quant=Precision.INT8, quality=None)
    assert narrow.ring_bytes >= wide, "modulation is never in 8 bits"


def test_what_is_parked_comes_back_from_where_it_waits(flux_machine):
    hardware = flux_machine(12, pinnable_gb=60, tflops=690)
    arrangement = plan(hardware).arrangement
    assert arrangement.park_for_decode
    (site,) = sites(hardware, PROFILES, Wishes(device="cuda"))
    way = Way(arithmetic=Precision.BFLOAT16, storage=Precision.BFLOAT16)
    rates = rates_for(hardware, site, Option(Offload.STREAM, way), Wishes())
    picture = plan(hardware).predicted.picture

    def visits(waiting: Waiting, *, parks: bool) -> float:
        components = tuple(
            c.replace(waiting=waiting) if c.placement == Placement.STREAMED else c for c in arrangement.components
        )
        made = arrangement.replace(components=components, park_for_decode=parks)
        return timeline(FLUX, made, rates, site.profile.priors, picture, way, streamed_step=1.0).visits

    nbytes = staying_bytes(FLUX, arrangement)
    for waiting, rate in ((Waiting.PINNED, 24e9), (Waiting.PAGEABLE, 9e9)):
        longer = visits(waiting, parks=True) - visits(waiting, parks=False)
        assert longer == pytest.approx(nbytes / rate)
    through = [c.replace(waiting=Waiting.DISK) for c in arrangement.streamed if c.name == "transformer"]
    stages = [stage_bytes(FLUX, arrangement.replace(park_for_decode=parks), through) for parks in (True, False)]
    assert stages[0] - stages[1] == 2 * largest_unit(FLUX.component("transformer"), through[0])


def test_what_cannot_be_pinned_goes_through_a_small_buffer(flux_machine):
    made = plan(flux_machine(8, pinnable_gb=4))
    assert made.waiting == Waiting.PAGEABLE
    through = [c for c in made.arrangement.streamed if c.waiting != Waiting.PINNED]
    assert made.predicted.pinned_bytes == stage_bytes(FLUX, made.arrangement, through) < 4 * GB
    # The host's own copying is then the slowest part: 9 GB/s.
    assert made.predicted.seconds_per_step > streamed_bytes(FLUX, made.arrangement) / 9.01e9


def test_where_not_even_a_small_buffer_can_be_pinned_nothing_streams(flux_machine):
    with pytest.raises(DoesNotFit, match=r"of pinned RAM and may pin 100 MB"):
        plan(flux_machine(8, pinnable_gb=0.1), offload=Offload.STREAM)


def test_a_host_with_little_ram_reads_weights_from_the_disk_in_every_step(flux_machine):
    made = plan(flux_machine(8, ram_gb=16, pinnable_gb=8))
    assert made.waiting == Waiting.DISK
    assert made.predicted.peak_ram_bytes < 16 * GB
    # The disk reads 2 GB/s.
    assert made.predicted.seconds_per_step > streamed_bytes(FLUX, made.arrangement) / 2.01e9


def test_a_card_below_the_smallest_ring_is_refused_with_need_and_have(flux_machine):
    with pytest.raises(DoesNotFit) as caught:
        plan(flux_machine(2, pinnable_gb=60))
    assert "offload 'stream'" in caught.value.message
    assert "may use 1.7" in caught.value.message


def test_the_arena_is_the_ring_and_what_stays(flux_machine):
    made = plan(flux_machine(12, pinnable_gb=60))
    arrangement = made.arrangement
    blocks = FLUX.component("transformer").blocks
    staying = sum(2 * (blocks[i].parameters.total - blocks[i].parameters.modulation) for i in _resident(made))
    rest = 2 * 64_124_992
    assert arena_bytes(FLUX, arrangement) == pytest.approx(made.ring_bytes + staying + rest, rel=1e-3)


def _resident(made: Plan) -> tuple[int, ...]:
    return made.component("transformer").resident
