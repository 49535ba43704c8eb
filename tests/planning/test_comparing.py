"""Ways beside each other, and what each choice is worth."""

from __future__ import annotations

import re

import pytest

from autoflux.errors import DoesNotFit
from autoflux.hardware.known import known_machine
from autoflux.hardware.values import Source
from autoflux.models.values import Precision
from autoflux.planning.backends import BackendFacts
from autoflux.planning.comparing import as_alternative
from autoflux.planning.findings import NO_FINDINGS
from autoflux.planning.planner import Detail, all_ways, make_plan
from autoflux.planning.profiles import for_host
from autoflux.planning.reasons import origin
from autoflux.planning.speed import assumed
from autoflux.planning.terms import Offload, Origin, Placement, Quality, TransferUnit
from autoflux.planning.values import Alternative, Choice, Plan, Wishes
from autoflux.plugin_manager import load_plugins
from autoflux.units import GB, format_seconds
from tests.conftest import card, figure, size
from tests.planning.test_planner import PROFILES
from tests.planning.test_streaming import FLUX
from tests.planning.test_ways import SMALL

BACKENDS = ("diffusers",)
MACHINE = known_machine("rtx-3060-12gb")


def plan(hardware=MACHINE, *, explain=False, compare=False, **wishes) -> Plan:
    detail = Detail(explain=explain, compare=compare)
    return make_plan(hardware, SMALL, PROFILES, Wishes(**wishes), BACKENDS, detail=detail)


def kinds(ways) -> list[tuple]:
    return [(way.device, way.offload, way.precision, way.quality) for way in ways]


@pytest.fixture(scope="module")
def tight() -> Plan:
    """On a card that holds a part of the small transformer."""
    return plan(vram_bytes=4 * GB, explain=True, compare=True)


def test_the_best_of_every_kind_is_there_once_whether_it_fits_or_not(tight):
    rows = (as_alternative(tight), *tight.rejected)
    assert len(set(kinds(rows))) == len(rows)
    on_card = {(way.offload, way.precision, way.quality): way for way in rows if way.device == "cuda:0"}
    assert {
        (Offload.STREAM, Precision.BFLOAT16, Quality.EXACT),
        (Offload.STREAM, Precision.BFLOAT16, Quality.BALANCED),
        (Offload.STREAM, Precision.INT8, Quality.BALANCED),
        (Offload.NONE, Precision.BFLOAT16, Quality.EXACT),
        (Offload.COMPONENT, Precision.BFLOAT16, Quality.EXACT),
    } <= set(on_card)
    everything_there = on_card[Offload.NONE, Precision.BFLOAT16, Quality.EXACT]
    assert not everything_there.fits
    assert everything_there.reason.startswith("needs ")
    assert "of device memory and may use 4.00 GB" in everything_there.reason
    assert "cpu" in {way.device for way in rows}


def test_what_fits_comes_first_and_what_was_taken_is_the_fastest(tight):
    fits = [way.fits for way in tight.rejected]
    assert fits == sorted(fits, reverse=True)
    assert all(way.seconds_per_image >= tight.predicted.seconds_per_image for way in tight.rejected if way.fits)
    assert all("needs" in way.reason for way in tight.rejected if not way.fits)


def test_each_row_is_what_a_plan_of_that_kind_takes(tight):
    (exact,) = [w for w in tight.rejected if (w.offload, w.quality) == (Offload.STREAM, Quality.EXACT)]
    wished = plan(device="cuda", vram_bytes=4 * GB, quality=Quality.EXACT, offload=Offload.STREAM)
    assert as_alternative(wished).replace(reason=exact.reason) == exact


def test_wishes_narrow_what_is_compared():
    for wishes, allowed in (
        ({"quality": Quality.EXACT}, {Quality.EXACT}),
        ({"quant": Precision.INT8}, {Quality.BALANCED}),
    ):
        made = plan(device="cuda", compare=True, **wishes)
        assert {way.quality for way in (as_alternative(made), *made.rejected)} == allowed
    streamed = plan(device="cuda", compare=True, offload=Offload.STREAM)
    assert {way.offload for way in streamed.rejected} == {Offload.STREAM}


def test_where_nothing_fits_all_ways_say_what_they_lack():
    wishes = Wishes(device="cuda", vram_bytes=GB)
    with pytest.raises(DoesNotFit):
        make_plan(MACHINE, SMALL, PROFILES, wishes, BACKENDS)
    ways = all_ways(MACHINE, SMALL, PROFILES, wishes)
    assert len(ways) == len(set(kinds(ways))) >= 5
    assert all(not way.fits and way.reason.startswith("needs ") for way in ways)


def test_a_plan_without_detail_is_the_same_but_for_the_detail(tight):
    brief = plan(vram_bytes=4 * GB)
    bare = tuple(choice.replace(instead=None) for choice in tight.choices)
    assert tight.replace(choices=bare, rejected=brief.rejected) == brief
    assert all(choice.instead is None for choice in brief.choices)
    assert Plan.from_json(tight.to_json()) == tight


def choice(made: Plan, topic: str) -> Choice:
    return next(c for c in made.choices if c.topic == topic)


def test_every_choice_with_another_way_says_what_that_would_take(tight):
    told = tight.predicted
    for topic in ("device", "weights", "offload", "compiling", "block size", "decode", "vae", "text_encoder_2"):
        instead = choice(tight, topic).instead
        assert instead is not None, topic
        assert instead.value != choice(tight, topic).value
        assert instead.lacks or instead.seconds_per_image >= told.seconds_per_image * 0.999, topic
    assert choice(tight, "backend").instead is None
    assert "of device memory" in choice(tight, "offload").instead.lacks


def test_what_the_next_best_takes_is_what_wishing_it_takes(tight):
    wanted = {"vram_bytes": 4 * GB, "device": "cuda"}
    for topic, wishes in (
        ("block size", {"block_bytes": GB}),
        ("compiling", {"compiled": False}),
        ("weights", {"quant": Precision.BFLOAT16}),
    ):
        wished, instead = plan(**wanted, **wishes).predicted, choice(tight, topic).instead
        assert instead.seconds_per_step == pytest.approx(wished.seconds_per_step), topic
        assert instead.peak_vram_bytes == wished.peak_vram_bytes.peak, topic
        assert instead.peak_ram_bytes == wished.peak_ram_bytes, topic
        assert instead.seconds_to_start == wished.seconds_to_start, topic


@pytest.mark.parametrize(
    ("name", "value", "wishes"),
    [
        ("rtx-3060-12gb-low-ram", "on the device", {"keep": ("text_encoder_2",)}),
        ("rtx-4060-laptop-8gb", "computed by the processor", {"cpu": ("text_encoder_2",)}),
    ],
)
def test_a_place_that_fits_only_with_all_else_arranged_for_it_is_told_as_its_plan(name, value, wishes):
    def flux_plan(wished: Wishes, detail: Detail) -> Plan:
        machine = known_machine(name)
        profiles = for_host(load_plugins(entry_points=False).profiles, machine.host.total_bytes.value)
        return make_plan(machine, FLUX, profiles, wished, BACKENDS, detail=detail)

    instead = choice(flux_plan(Wishes(), Detail(explain=True)), "text_encoder_2").instead
    wished = flux_plan(Wishes(**wishes), Detail()).predicted
    assert (instead.value, instead.lacks) == (value, "")
    assert instead.seconds_per_image == pytest.approx(wished.seconds_per_image)
    assert instead.peak_ram_bytes == wished.peak_ram_bytes
    assert instead.peak_vram_bytes == wished.peak_vram_bytes.peak


def test_what_only_starts_later_is_not_told_to_draw_slower():
    facts = (BackendFacts(name="diffusers", start_seconds=3.0),)
    made = make_plan(
        known_machine("b200-180gb"),
        FLUX,
        PROFILES,
        Wishes(width=512, height=512),
        BACKENDS,
        NO_FINDINGS.replace(facts=facts),
        detail=Detail(explain=True, compare=True),
    )
    told, compiling = made.predicted, choice(made, "compiling")
    later = [way for way in made.rejected if way.fits and way.seconds_per_image < told.seconds_per_image]
    assert (compiling.value, bool(later)) == ("no", True)
    for way in later:
        share = way.seconds_per_image / told.seconds_per_image
        start = format_seconds(way.seconds_to_start - told.seconds_to_start)
        assert way.reason == f"{share:.3g} times as long a picture, and {start} more to start"
    assert compiling.reason.startswith("with it a picture takes 0.")
    assert compiling.reason.endswith("s more to start")
    assert compiling.instead.seconds_to_start > told.seconds_to_start


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        (
            {"unit": TransferUnit.LAYER, "quality": Quality.EXACT, "vram_bytes": 8 * GB},
            "layers pass through .* one by one, as you asked",
        ),
        ({"block_bytes": 2 * GB, "vram_bytes": 8 * GB}, "several at once, as you asked, so none of them stays"),
    ],
)
def test_what_was_wished_of_blocks_is_not_told_as_need(wishes, words):
    made = plan(known_machine("rtx-5090-32gb"), **wishes)
    assert re.search(words, choice(made, "offload").reason)
    assert "not fit" not in choice(made, "offload").reason


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "none of the transformer's blocks fits the device for good, so all pass"),
        (1, "1 of the transformer's blocks fits the device for good, the others pass"),
        (2, "2 of the transformer's blocks fit the device for good, the others pass"),
    ],
)
def test_blocks_that_fit_are_counted(count, words):
    tried = (plan(device="cuda", vram_bytes=mb * 10**6) for mb in range(2600, 5000, 50))
    stays = (made for made in tried if len(made.component("transformer").resident) == count)
    made = next(made for made in stays if made.unit == TransferUnit.BLOCK)
    assert choice(made, "offload").reason.startswith(words)


def test_what_was_wished_has_no_next_best():
    made = plan(explain=True, device="cuda", vram_bytes=4 * GB, offload=Offload.STREAM, unit=TransferUnit.LAYER)
    for topic in ("device", "offload", "block size"):
        assert (choice(made, topic).origin, choice(made, topic).instead) == (Origin.WISH, None)


def test_exact_is_a_wish_that_leaves_nothing_else():
    made = plan(explain=True, device="cuda", vram_bytes=4 * GB, quality=Quality.EXACT)
    for topic in ("weights", "compiling", "attention"):
        assert choice(made, topic).origin == Origin.WISH
    assert "tiles" not in choice(made, "decode").instead.value


def test_components_say_where_else_they_could_be(tight):
    places = {c.name: c.placement for c in tight.components if c.name != "transformer"}
    words = {Placement.DEVICE: "on the device", Placement.STREAMED: "streamed", Placement.HOST: "computed by"}
    for name, placement in places.items():
        assert choice(tight, name).value.startswith(words[placement])


def test_the_weakest_figure_says_how_a_choice_is_known(machine):
    assert origin(figure(1.0), None) == Origin.MEASURED
    assert origin(figure(1.0), size(1)) == Origin.REPORTED
    assert origin(figure(1.0), figure(2.0, Source.ASSUMED), size(1)) == Origin.ASSUMED
    assert origin(assumed(1.0), figure(2.0, Source.ASSUMED)) == Origin.PRIOR
    made = plan(machine(card(200, tflops=100.0)))
    assert choice(made, "device").origin == Origin.MEASURED
    assert choice(made, "batch").origin == Origin.REPORTED
    assert choice(plan(machine(card(200, tflops=None))), "device").origin == Origin.PRIOR
    assert choice(plan(), "device").origin == Origin.ASSUMED


def test_a_plan_in_a_row_is_as_exact_as_what_it_does():
    exact = plan(quality=Quality.EXACT)
    assert as_alternative(exact).quality == Quality.EXACT
    plain = plan(known_machine("h200-141gb").replace(versions={}), offload=Offload.NONE)
    assert (plain.quality, as_alternative(plain).quality) == (Quality.BALANCED, Quality.EXACT)
    assert isinstance(as_alternative(plain), Alternative)
    tiled = exact.replace(tile_decode=True)
    assert as_alternative(tiled).quality == Quality.EXACT, "tiles are exact where nothing else fits"
    for changed in (exact.replace(compiled=True), exact.replace(attention="cudnn")):
        assert as_alternative(changed).quality == Quality.BALANCED


def test_what_bounds_a_batch_is_told_as_what_it_is():
    assert choice(plan(known_machine("h200-141gb")), "batch").reason == "more gain nothing, and each waits longer"
    small = choice(plan(known_machine("rtx-4060-8gb")), "batch")
    assert small.reason == "the most pictures of this size that fit at once"
