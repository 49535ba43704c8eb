"""Layers streamed one by one: what they are, how long a pass takes, and when they are chosen."""

from __future__ import annotations

import pytest

from autoflux.hardware.changes import Changes, changed
from autoflux.hardware.known import known_machine
from autoflux.models.values import Precision
from autoflux.planning.layers import LayerPass, layer_seconds, layers_of
from autoflux.planning.replay import step_seconds
from autoflux.planning.schedule import CONTENTION
from autoflux.planning.terms import Offload, Placement, Quality, TransferUnit
from autoflux.planning.values import ComponentPlan
from autoflux.planning.weights import component_bytes
from tests.conftest import GB
from tests.planning.test_streaming import FLUX
from tests.planning.test_ways import plan

SECONDS = {"double": 2.0, "single": 1.0}
HIDDEN = FLUX.architecture.hidden_size


def planned(storage: Precision = Precision.BFLOAT16) -> ComponentPlan:
    return ComponentPlan(
        name="transformer", storage=storage, arithmetic=Precision.BFLOAT16, placement=Placement.STREAMED
    )


def layered(seconds: dict[str, float] = SECONDS, rate: float = 50e9, pause: float = 0.0) -> LayerPass:
    return LayerPass(layers_of(FLUX, planned(), seconds, text_share=1 / 9), rate, pause)


@pytest.mark.parametrize("storage", [Precision.BFLOAT16, Precision.INT8])
def test_layers_hold_all_weights_and_compute_what_their_blocks_do(storage):
    layers = layers_of(FLUX, planned(storage), SECONDS, text_share=1 / 9)
    assert sum(layer.nbytes for layer in layers) == pytest.approx(component_bytes(FLUX, planned(storage)), rel=1e-5)
    assert sum(layer.seconds for layer in layers) == pytest.approx(19 * 2.0 + 38 * 1.0)
    # The modulation of a double block, which is never in 8 bits.
    assert max(layer.nbytes for layer in layers) == pytest.approx(6 * HIDDEN**2 * 2, rel=0.01)


def test_a_pass_takes_no_less_than_all_copies_and_all_arithmetic():
    slow_link, slow_card = layered(rate=1e9), layered(rate=1e15)
    nbytes = sum(layer.nbytes for layer in slow_link.layers)
    assert layer_seconds(slow_link, slow_link.largest) >= nbytes / 1e9
    assert layer_seconds(slow_card, slow_card.largest) == pytest.approx(76.0 + CONTENTION * nbytes, rel=1e-3)
    assert layer_seconds(layered(rate=1e15, pause=5.0), slow_card.largest) >= 81.0


def test_a_larger_ring_lets_more_copies_run_ahead():
    """At the rates of an H200, where copies and arithmetic of four pictures take about equally long."""
    four = layered({"double": 0.01, "single": 0.01}, rate=55e9)
    times = [layer_seconds(four, int(size * four.largest)) for size in (1, 4 / 3, 2, 3)]
    assert times == sorted(times, reverse=True)
    assert times[0] > 1.2 * times[-1]


def test_the_ring_takes_what_room_there_is_for_layers():
    machine = known_machine("rtx-3060-12gb")
    small, large = (
        plan(machine, unit=TransferUnit.LAYER, quality=Quality.EXACT, cpu=("text_encoder_2",), vram_bytes=int(cap * GB))
        for cap in (3.3, 12)
    )
    assert small.ring_bytes < large.ring_bytes
    assert small.predicted.seconds_per_step > large.predicted.seconds_per_step


def test_layers_are_taken_where_they_are_faster_though_blocks_fit_and_blocks_where_these_are():
    machine = changed(known_machine("rtx-3060-12gb"), Changes(vram_bytes=int(4.2 * GB)))
    made = plan(machine, quality=Quality.EXACT)
    blocks = plan(machine, quality=Quality.EXACT, unit=TransferUnit.BLOCK)
    assert (made.unit, blocks.unit) == (TransferUnit.LAYER, TransferUnit.BLOCK)
    assert made.predicted.seconds_per_image < blocks.predicted.seconds_per_image
    assert plan(known_machine("rtx-3060-12gb"), quality=Quality.EXACT).unit == TransferUnit.BLOCK


def test_a_plan_of_layers_is_reckoned_again_as_it_was_made():
    made = plan(known_machine("rtx-3060-12gb"), unit=TransferUnit.LAYER, quality=Quality.EXACT)
    assert step_seconds(made, FLUX) == pytest.approx(made.predicted.seconds_per_step)
    larger = made.predicted.picture.replace(width=1536, height=1536)
    assert step_seconds(made, FLUX, larger) > 2 * made.predicted.seconds_per_step
    assert step_seconds(made, FLUX, copies=0.01) > 2 * made.predicted.seconds_per_step


def test_others_move_to_the_card_where_ram_is_what_lacks():
    machine = known_machine("rtx-3060-12gb")
    made = plan(machine, ram_bytes=int(8.5 * GB))
    assert made.predicted.peak_ram_bytes <= made.ram_limit_bytes
    assert made.component("vae").placement == Placement.DEVICE


def test_the_transformer_is_kept_whole_beside_others_that_stream():
    made = plan(known_machine("rtx-3060-12gb"), keep=("transformer",), quant=Precision.INT8)
    assert made.offload == Offload.STREAM
    assert len(made.component("transformer").resident) == 57
    assert made.component("text_encoder_2").placement != Placement.DEVICE


def test_tiles_are_told_where_exact_was_wished():
    machine = known_machine("rtx-3060-12gb")
    small, large = (plan(machine, quality=Quality.EXACT, vram_bytes=int(cap * GB)) for cap in (3, 12))
    assert (small.tile_decode, large.tile_decode) == (True, False)
    assert any("decoded in tiles" in warning for warning in small.warnings)
    assert not any("tiles" in warning for warning in large.warnings)
