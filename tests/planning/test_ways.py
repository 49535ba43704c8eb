"""What the planner chooses beside places: formats, compiling, attention, components; and what wishes make of it."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoflux.errors import ContradictoryWishes, DoesNotFit, UnknownName
from autoflux.hardware.changes import Changes, changed
from autoflux.hardware.known import known_machine
from autoflux.hardware.values import BlockTiming, Hardware
from autoflux.models.values import Precision
from autoflux.planning.activations import GRAPHS_BYTES, GRAPHS_SHARE, activations, working_bytes
from autoflux.planning.arranging import rates_for
from autoflux.planning.findings import NO_FINDINGS
from autoflux.planning.planner import make_plan
from autoflux.planning.schedule import CONTENTION
from autoflux.planning.sites import sites
from autoflux.planning.speed import (
    COMPILED_LAUNCHES,
    LAUNCHED_BESIDE,
    NARROW_WAVE_SECONDS,
    NATIVE_LAUNCHES,
    UNALIGNED_ROWS,
    WIDENED_LAUNCHES,
    Rates,
    Way,
    assumed,
    block_seconds,
)
from autoflux.planning.streaming import block_kinds
from autoflux.planning.terms import Offload, Origin, Placement, Quality, TransferUnit, Waiting
from autoflux.planning.timeline import timeline
from autoflux.planning.values import PhaseBytes, Picture, Plan, Wishes
from autoflux.planning.ways import Option
from tests.conftest import GB, figure, size
from tests.planning.test_planner import PROFILES
from tests.planning.test_streaming import FLUX

BF16 = Precision.BFLOAT16

SMALL = FLUX.replace(
    architecture=FLUX.architecture.replace(double_blocks=3, single_blocks=6),
    components=tuple(
        c.replace(
            block_lists=tuple(
                blocks.replace(blocks=blocks.blocks[:count])
                for blocks, count in zip(c.block_lists, (3, 6), strict=False)
            )
        )
        for c in FLUX.components
    ),
)
"""FLUX.1's widths with few blocks, which is planned ten times as fast."""


def plan(hardware: Hardware, model=FLUX, **wishes) -> Plan:
    return make_plan(hardware, model, PROFILES, Wishes(**{"device": "cuda", **wishes}), ("diffusers",))


def without_triton(hardware: Hardware) -> Hardware:
    return hardware.replace(versions={})


def reason(made: Plan, topic: str) -> str:
    return next(choice.reason for choice in made.choices if choice.topic == topic)


def test_balanced_takes_eight_bits_and_compiling_where_they_are_faster():
    made = plan(known_machine("h200-141gb"))
    transformer = made.component("transformer")
    assert (transformer.storage, transformer.native) == (Precision.FLOAT8, True)
    assert made.compiled
    assert made.predicted.streamed_bytes == 0
    assert "times as long" in reason(made, "weights")
    exact = plan(known_machine("h200-141gb"), quality=Quality.EXACT)
    assert made.predicted.seconds_per_step < 0.72 * exact.predicted.seconds_per_step


def test_exact_allows_nothing_that_changes_bits():
    for name in ("h200-141gb", "rtx-4060-8gb", "rtx-3060-12gb"):
        made = plan(known_machine(name), quality=Quality.EXACT)
        assert made.component("transformer").storage == Precision.BFLOAT16
        assert not made.compiled
        assert made.attention == "default"
        assert made.quality == Quality.EXACT


def test_geforce_multiplies_in_int8_and_hopper_in_fp8():
    assert plan(known_machine("rtx-4090-24gb")).component("transformer").storage == Precision.INT8
    assert plan(known_machine("h100-80gb")).component("transformer").storage == Precision.FLOAT8


def test_few_pictures_are_not_worth_compiling_for():
    machine = known_machine("h200-141gb")
    assert plan(machine, pictures=1000).compiled
    assert not plan(machine, pictures=1).compiled


def test_nothing_is_compiled_without_a_compiler_unless_wished():
    machine = without_triton(known_machine("h200-141gb"))
    made = plan(machine)
    assert not made.compiled
    assert "nothing here compiles" in reason(made, "compiling")
    assert plan(machine, compiled=True).compiled
    assert not plan(known_machine("h200-141gb"), compiled=False).compiled


def test_a_compiler_takes_ram_where_it_is_used():
    made = plan(known_machine("h200-141gb"), SMALL, compiled=True)
    plain = plan(known_machine("h200-141gb"), SMALL, compiled=False, graphs=False)
    assert (made.compiled, plain.compiled) == (True, False)
    assert made.arrangement.replace(compiled=False) == plain.arrangement
    assert made.predicted.peak_ram_bytes - plain.predicted.peak_ram_bytes == made.priors.compiler_bytes > 0


def test_what_is_wished_is_kept_and_called_a_wish():
    machine = known_machine("rtx-4090-24gb")
    made = plan(machine, quant=Precision.FLOAT8, attention="cudnn", batch=2, offload=Offload.STREAM)
    assert made.component("transformer").storage == Precision.FLOAT8
    assert (made.attention, made.predicted.picture.batch) == ("cudnn", 2)
    assert made.max_batch >= 2
    wished = {choice.topic for choice in made.choices if choice.origin == Origin.WISH}
    assert wished == {"device", "weights", "attention", "batch", "offload"}
    wide = plan(machine, quant=Precision.BFLOAT16)
    assert wide.component("transformer").storage == Precision.BFLOAT16


def test_components_are_kept_or_left_to_the_processor():
    machine = known_machine("rtx-4060-8gb")
    made = plan(machine, keep=("text_encoder",), cpu=("text_encoder_2",))
    assert made.component("text_encoder").placement == Placement.DEVICE
    assert made.component("text_encoder_2").placement == Placement.HOST
    with pytest.raises(DoesNotFit, match=r"needs .* of device memory"):
        plan(machine, keep=("text_encoder_2",))


@pytest.mark.parametrize(
    ("wishes", "error", "words"),
    [
        ({"keep": ("veh",)}, UnknownName, "no component named 'veh'"),
        ({"cpu": ("transformer",)}, ContradictoryWishes, "the transformer computes on the device"),
        ({"keep": ("vae",), "cpu": ("vae",)}, ContradictoryWishes, "'vae' is to be kept"),
        ({"quality": Quality.EXACT, "quant": Precision.INT8}, ContradictoryWishes, "--quality exact"),
        ({"quality": Quality.EXACT, "compiled": True}, ContradictoryWishes, "--compile changes the last bits"),
        ({"quality": Quality.EXACT, "attention": "cudnn"}, ContradictoryWishes, "--attention cudnn changes"),
        ({"offload": Offload.NATIVE, "block_bytes": 10**9}, ContradictoryWishes, "--block-size says what is streamed"),
        ({"offload": Offload.COMPONENT, "unit": TransferUnit.LAYER}, ContradictoryWishes, "drop --block-size"),
        ({"device": "cpu", "unit": TransferUnit.BLOCK}, ContradictoryWishes, "--block-size or --device"),
        ({"offload": Offload.COMPONENT, "quant": Precision.INT8}, ContradictoryWishes, "--quant int8"),
        ({"keep": ("transformer",), "offload": Offload.COMPONENT}, ContradictoryWishes, "--keep transformer"),
        ({"keep": ("transformer",), "unit": TransferUnit.LAYER}, ContradictoryWishes, "--keep transformer"),
        ({"keep": ("transformer",), "block_bytes": 10**9}, ContradictoryWishes, "--keep transformer"),
        ({"device": "cpu", "attention": "cudnn"}, ContradictoryWishes, "'cpu' has no attention of cuDNN"),
        ({"attention": "cudnn", "precision": Precision.FLOAT32}, ContradictoryWishes, "no attention in float32"),
        ({"device": "cpu", "offload": Offload.STREAM}, ContradictoryWishes, "makes no sense on 'cpu'"),
    ],
)
def test_wishes_that_cannot_be_kept_are_refused_by_name(wishes, error, words):
    with pytest.raises(error) as refused:
        plan(known_machine("rtx-4090-24gb"), **wishes)
    assert words in f"{refused.value.message}; {refused.value.hint}"


def test_an_offload_leaves_out_devices_that_have_none():
    made = make_plan(known_machine("rtx-3060-12gb"), FLUX, PROFILES, Wishes(offload=Offload.STREAM), ("diffusers",))
    assert made.device == "cuda:0"


@pytest.mark.parametrize(
    "wishes",
    [
        {"quant": Precision.INT8},
        {"quant": Precision.FLOAT8},
        {"quant": Precision.BFLOAT16},
        {"compiled": True},
        {"compiled": False},
        {"unit": TransferUnit.LAYER},
        {"block_bytes": 10**9},
        {"attention": "cudnn"},
        {"keep": ("vae",)},
        {"cpu": ("text_encoder_2",)},
        {"precision": Precision.FLOAT16},
    ],
    ids=str,
)
def test_a_wish_that_the_processor_cannot_keep_leaves_the_card(wishes):
    """The processor is always there, and asked of a machine with a card none of these is for it."""
    made = make_plan(known_machine("rtx-4090-24gb"), FLUX, PROFILES, Wishes(**wishes), ("diffusers",))
    assert made.device == "cuda:0"


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ({"quant": Precision.INT8}, "--quant int8 asks for blocks in 8 bits, which only devices have that"),
        ({"compiled": True}, "--compile asks for compiled blocks, which only devices have that"),
    ],
)
def test_where_only_the_processor_is_there_the_wish_is_refused_by_name(wishes, words):
    with pytest.raises(ContradictoryWishes, match=words) as refused:
        make_plan(known_machine("cpu-12-core-64gb"), FLUX, PROFILES, Wishes(**wishes), ("diffusers",))
    assert words.split()[0] in refused.value.hint


def test_layers_pass_one_by_one_when_blocks_are_too_large():
    machine = known_machine("rtx-4090-24gb")
    made = plan(machine, unit=TransferUnit.LAYER, quality=Quality.EXACT)
    assert (made.unit, made.hoist_modulation) == (TransferUnit.LAYER, False)
    assert made.predicted.seconds_per_step > plan(machine, quality=Quality.EXACT).predicted.seconds_per_step
    told, fast = (
        made.predicted,
        plan(changed(machine, Changes(link_gb_per_s=1e4)), unit=TransferUnit.LAYER, quality=Quality.EXACT),
    )
    computing = made.priors.pause_seconds + sum(
        told.block_seconds[kind] for kind in block_kinds(FLUX.component("transformer"))
    )
    copies = CONTENTION * told.streamed_bytes
    assert fast.predicted.seconds_per_step == pytest.approx(computing + copies, rel=1e-3)  # no link computes
    several = plan(machine, block_bytes=2 * GB, quality=Quality.EXACT, offload=Offload.STREAM)
    assert several.ring_bytes > 1.8 * GB


def test_with_little_ram_encoders_wait_on_the_disk_before_the_transformer_does():
    machine = known_machine("rtx-4060-8gb")
    made = plan(machine.replace(host=machine.host.replace(available_bytes=size(24 * GB))))
    assert made.component("text_encoder_2").waiting == Waiting.DISK
    assert made.waiting == Waiting.PINNED
    assert made.predicted.peak_ram_bytes <= made.ram_limit_bytes


def measured(hardware: Hardware, *, cudnn: float) -> Hardware:
    (card,) = hardware.accelerators
    timing = BlockTiming(
        seconds=figure(0.0031), precision="bfloat16", hidden_size=3072, image_tokens=4096, text_tokens=512
    )
    attention = {"default": figure(400.0), "cudnn": figure(cudnn)}
    return hardware.replace(
        accelerators=(card.replace(attention_tflops=attention, blocks={"double": timing, "single": timing}),)
    )


def test_the_fastest_attention_that_was_measured_is_taken():
    machine = known_machine("h200-141gb")
    assert plan(measured(machine, cudnn=550.0)).attention == "cudnn"
    slower = plan(measured(machine, cudnn=300.0))
    assert slower.attention == "default"
    faster = plan(measured(machine, cudnn=550.0))
    assert faster.predicted.seconds_per_step < slower.predicted.seconds_per_step


def timed(hardware: Hardware, picture: Picture, way: Way) -> float:
    """Seconds of a double block, as the probe's figures have it."""
    (site,) = sites(hardware, PROFILES, Wishes(device="cuda"), NO_FINDINGS)
    rates = rates_for(hardware, site, Option(Offload.STREAM, way), Wishes())
    return block_seconds(FLUX, rates, site.profile.priors, picture, way)["double"]


def test_products_compute_whole_tiles_of_rows_and_are_slower_where_the_last_is_not_full():
    """A picture of 1344x768 has 64 tokens less than one of 1024x1024; four of each have as many less."""
    hardware, wide = measured(known_machine("h200-141gb"), cudnn=550.0), Way(arithmetic=BF16, storage=BF16)
    square, narrow = (Picture(width=w, height=h, steps=28, text_tokens=512) for w, h in ((1024, 1024), (1344, 768)))
    one, four = (
        timed(hardware, narrow.replace(batch=batch), wide) / timed(hardware, square.replace(batch=batch), wide)
        for batch in (1, 4)
    )
    assert four < 1 < one < UNALIGNED_ROWS, "only of four the last tile is full"


def test_products_in_eight_bits_lose_by_few_tokens_and_gain_nothing_by_many():
    hardware = measured(known_machine("h200-141gb"), cudnn=550.0)
    small = Picture(width=512, height=512, steps=28, text_tokens=512)
    # Replayed, so that no block waits for its launch.
    narrow = Way(arithmetic=BF16, storage=Precision.FLOAT8, native=True, graphs=True)
    wide = Way(arithmetic=BF16, storage=BF16, graphs=True)
    one, four = (timed(hardware, small.replace(batch=batch), narrow) for batch in (1, 4))
    assert one - four / 4 == pytest.approx(NARROW_WAVE_SECONDS * (1 - 1536 / 4608))
    one, four = (timed(hardware, small.replace(batch=batch), wide) for batch in (1, 4))
    assert one == pytest.approx(four / 4)


@pytest.mark.parametrize(("compiled", "share"), [(False, WIDENED_LAUNCHES), (True, COMPILED_LAUNCHES)])
def test_no_block_takes_less_than_launching_it(compiled, share):
    """And not compiled, what multiplies 8 bits takes longest to launch: there, weights are made wide instead."""
    hardware = measured(known_machine("h200-141gb"), cudnn=550.0)
    (card,) = hardware.accelerators
    slow = {kind: timing.replace(launch_seconds=figure(0.05)) for kind, timing in card.blocks.items()}
    hardware = hardware.replace(accelerators=(card.replace(blocks=slow),), versions={"triton": "3.6.0"})
    made = plan(hardware, quant=Precision.FLOAT8, compiled=compiled, graphs=False)
    launched = 0.05 * LAUNCHED_BESIDE * share
    assert made.predicted.block_seconds == pytest.approx({"double": launched, "single": launched})


def slow_to_launch(seconds: float = 0.05, name: str = "h200-141gb") -> Hardware:
    """A machine whose processor takes so long to launch a block."""
    hardware = measured(known_machine(name), cudnn=550.0)
    (card,) = hardware.accelerators
    slow = {kind: timing.replace(launch_seconds=figure(seconds)) for kind, timing in card.blocks.items()}
    return without_triton(hardware.replace(accelerators=(card.replace(blocks=slow),)))


def test_graphs_are_replayed_where_the_device_would_wait_for_launches():
    """They change no bit, so quality 'exact' has them too."""
    for quality in Quality:
        made = plan(slow_to_launch(), quality=quality)
        assert made.graphs
        assert "times as long as the device" in reason(made, "CUDA graphs")
        launched = plan(slow_to_launch(), quality=quality, graphs=False, offload=Offload.STREAM)
        assert not launched.graphs
        assert reason(launched, "CUDA graphs") == "you asked for it"
        assert made.predicted.seconds_per_step < 0.2 * launched.predicted.seconds_per_step
    quick = plan(slow_to_launch(1e-5))
    assert not quick.graphs
    assert reason(quick, "CUDA graphs") == "the host launches operations faster than the device computes them"
    assert plan(slow_to_launch(1e-5), graphs=True).graphs


def test_graphs_are_not_replayed_where_copies_take_longer_than_launches():
    made = plan(slow_to_launch(0.002), quality=Quality.EXACT, vram_bytes=6 * GB)
    assert made.predicted.streamed_bytes > 0
    assert not made.graphs
    assert "copies" in reason(made, "CUDA graphs")


def test_graphs_keep_the_memory_that_blocks_compute_in():
    hardware = slow_to_launch()
    wishes = {"quality": Quality.EXACT, "offload": Offload.STREAM}
    made, launched = (plan(hardware, SMALL, graphs=graphs, **wishes) for graphs in (True, False))
    assert made.arrangement.replace(graphs=False) == launched.arrangement
    picture, priors = made.predicted.picture, made.priors
    computing = int(GRAPHS_SHARE * activations(SMALL, launched.arrangement, priors, picture).denoise)
    more, less = made.predicted.peak_vram_bytes, launched.predicted.peak_vram_bytes
    assert more.encode - less.encode == more.decode - less.decode == computing + GRAPHS_BYTES
    assert more.denoise - less.denoise == GRAPHS_BYTES
    parked = working_bytes(SMALL, made.arrangement.replace(park_for_decode=True), priors, picture)
    unparked = working_bytes(SMALL, launched.arrangement, priors, picture)
    assert parked == unparked + PhaseBytes(encode=GRAPHS_BYTES, denoise=GRAPHS_BYTES, decode=GRAPHS_BYTES)


def test_graphs_that_leave_for_each_decode_are_recorded_for_each_batch():
    made = plan(slow_to_launch(), SMALL, graphs=True, offload=Offload.STREAM)
    (site,) = sites(slow_to_launch(), PROFILES, Wishes(device="cuda"), NO_FINDINGS)
    way = Way(arithmetic=Precision.BFLOAT16, storage=made.component("transformer").storage, native=True)
    rates = rates_for(slow_to_launch(), site, Option(Offload.STREAM, way), Wishes())

    def visits(**changes):
        arrangement = made.arrangement.replace(**changes)
        picture = made.predicted.picture
        return timeline(SMALL, arrangement, rates, made.priors, picture, way, streamed_step=0.01).visits

    extra = visits(park_for_decode=True) - visits(park_for_decode=True, graphs=False)
    launched = sum(
        block_seconds(SMALL, rates, made.priors, made.predicted.picture, way)[kind] * n
        for kind, n in (("double", 3), ("single", 6))
    )
    assert extra == pytest.approx(2 * (made.priors.pause_seconds + launched - 0.01))
    assert visits() == visits(graphs=False)


def test_layers_one_by_one_are_neither_replayed_nor_compiled():
    machine = known_machine("h200-141gb")
    with pytest.raises(ContradictoryWishes, match="--graphs replays whole blocks, and --block-size layer"):
        plan(machine, graphs=True, unit=TransferUnit.LAYER)
    with pytest.raises(ContradictoryWishes, match="--compile compiles whole blocks, and --block-size layer"):
        plan(machine, compiled=True, unit=TransferUnit.LAYER)
    assert not plan(machine, unit=TransferUnit.LAYER).compiled
    made = plan(slow_to_launch(), unit=TransferUnit.LAYER, offload=Offload.STREAM, quality=Quality.EXACT)
    assert (made.unit, made.graphs) == (TransferUnit.LAYER, False)


def test_graphs_are_not_taken_on_rocm_unless_wished():
    machine = slow_to_launch()
    rocm = machine.replace(versions={"torch_hip": "7.0"})
    assert plan(machine, quality=Quality.EXACT).graphs
    assert not plan(rocm, quality=Quality.EXACT).graphs
    assert plan(rocm, quality=Quality.EXACT, graphs=True).graphs


def test_why_layers_are_not_replayed_is_told():
    made = plan(slow_to_launch(), unit=TransferUnit.LAYER, offload=Offload.STREAM, quality=Quality.EXACT)
    assert reason(made, "CUDA graphs") == "a graph holds a whole block, and layers are brought one by one"


def test_graphs_are_refused_by_name_where_there_are_none():
    with pytest.raises(ContradictoryWishes, match="there are no CUDA graphs on 'cpu'"):
        plan(known_machine("cpu-12-core-64gb"), graphs=True, device="cpu")
    with pytest.raises(ContradictoryWishes, match="CUDA graphs of blocks, which only streamed weights have, and"):
        plan(known_machine("h200-141gb"), graphs=True, offload=Offload.COMPONENT)


@pytest.mark.parametrize(
    ("way", "share"),
    [
        (Way(arithmetic=Precision.BFLOAT16, storage=Precision.BFLOAT16), 1.0),
        (Way(arithmetic=Precision.BFLOAT16, storage=Precision.FLOAT8), WIDENED_LAUNCHES),
        (Way(arithmetic=Precision.BFLOAT16, storage=Precision.FLOAT8, native=True), NATIVE_LAUNCHES),
        (Way(arithmetic=Precision.BFLOAT16, storage=Precision.FLOAT8, native=True, compiled=True), COMPILED_LAUNCHES),
    ],
)
def test_launching_takes_as_long_as_a_block_has_operations(way, share):
    priors = next(profile.priors for profile in PROFILES if profile.name == "cuda")
    picture = plan(known_machine("h200-141gb")).predicted.picture
    rates = Rates(
        matmul_tflops=figure(1e4), narrow_tflops=figure(1e4), attention_tflops=figure(1e4),
        link_gb_per_s=assumed(10), disk_gb_per_s=assumed(1), host_tflops=assumed(1),
        launch_seconds={"double": 0.04, "single": 0.03},
    )  # fmt: skip
    seconds = block_seconds(FLUX, rates, priors, picture, way)
    assert seconds == pytest.approx(
        {"double": 0.04 * LAUNCHED_BESIDE * share, "single": 0.03 * LAUNCHED_BESIDE * share}
    )


def test_a_timed_block_takes_as_long_as_it_was_timed():
    made = plan(measured(known_machine("h200-141gb"), cudnn=300.0), quality=Quality.EXACT)
    assert made.predicted.block_seconds == pytest.approx({"double": 0.0031, "single": 0.0031})
    assert made.predicted.seconds_per_step == pytest.approx(made.priors.pause_seconds + 57 * 0.0031)


def test_native_products_are_reckoned_at_their_rate_and_widened_ones_at_the_wide_one():
    priors = next(profile.priors for profile in PROFILES if profile.name == "cuda")
    picture = plan(known_machine("h200-141gb")).predicted.picture
    rates = Rates(
        matmul_tflops=figure(100.0), narrow_tflops=figure(200.0), attention_tflops=figure(50.0),
        link_gb_per_s=assumed(10), disk_gb_per_s=assumed(1), host_tflops=assumed(1),
    )  # fmt: skip

    def seconds(**way: object) -> float:
        made = Way(**{"arithmetic": Precision.BFLOAT16, "storage": Precision.FLOAT8, **way})
        return block_seconds(FLUX, rates, priors, picture, made)["single"]

    assert (
        seconds(native=True, compiled=True)
        < seconds(storage=Precision.BFLOAT16, compiled=True)
        < seconds(compiled=True)
    )


MACHINES = st.fixed_dictionaries(
    {
        "vram": st.floats(3.0, 40.0),
        "ram": st.floats(12.0, 96.0),
        "link": st.floats(2.0, 60.0),
        "tflops": st.sampled_from([15.0, 100.0, 690.0]),
    }
)


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(machine=MACHINES, better=st.sampled_from(["vram", "ram", "link"]), factor=st.floats(1.0, 3.0))
def test_more_memory_or_a_faster_link_never_gives_a_slower_plan(machine, better, factor):
    def seconds(**changes: float) -> float:
        hardware = made_up(**machine | changes)
        made = plan(hardware, model=SMALL, offload=Offload.STREAM, compiled=False)
        return made.predicted.seconds_per_image

    try:
        before = seconds()
    except DoesNotFit:
        return
    assert seconds(**{better: machine[better] * factor}) <= before * 1.002


def made_up(*, vram: float, ram: float, link: float, tflops: float) -> Hardware:
    base = known_machine("rtx-4090-24gb")
    (card,) = base.accelerators
    rates = {"bfloat16": figure(tflops), "int8": figure(2 * tflops), "float8_e4m3fn": figure(1.8 * tflops)}
    transfers = tuple(t.replace(to_device_gb_per_s=figure(link)) for t in card.link.transfers)
    memory = size(int(vram * GB))
    return base.replace(
        accelerators=(
            card.replace(
                total_bytes=memory,
                free_bytes=memory,
                usable_bytes=memory,
                matmul_tflops=rates,
                link=card.link.replace(transfers=transfers),
            ),
        ),
        host=base.host.replace(
            total_bytes=size(int(ram * GB)), available_bytes=size(int(ram * GB)), pinnable_bytes=size(int(ram * GB / 2))
        ),
    )


@pytest.mark.parametrize(("precision", "times"), [(Precision.FLOAT32, 2 * 1.65), (Precision.FLOAT16, 1.0)])
def test_a_decode_in_float32_takes_more_than_twice_the_memory_of_a_card(precision, times):
    made = plan(known_machine("h200-141gb"), SMALL)
    assert made.priors.float32_decode == 1.65
    arrangement = made.arrangement
    other = arrangement.replace(
        components=tuple(
            part.replace(arithmetic=precision) if part.name == "vae" else part for part in arrangement.components
        )
    )
    counted = [activations(SMALL, way, made.priors, made.predicted.picture).decode for way in (arrangement, other)]
    assert counted[1] == pytest.approx(times * counted[0])
