"""The planner: pure, so every machine can be made up."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoflux.errors import (
    ContradictoryWishes,
    DamagedFile,
    DeviceUnavailable,
    DoesNotFit,
    InvalidRequest,
    UnknownName,
)
from autoflux.hardware.values import DeviceKind, Problem
from autoflux.models.inventory import take_stock
from autoflux.models.values import Block, Component, Model, ParameterCount, Precision
from autoflux.planning.fit import batch_limit
from autoflux.planning.planner import make_plan
from autoflux.planning.profiles import for_host, select_profile
from autoflux.planning.terms import Offload, Origin, Placement
from autoflux.planning.values import Plan, Wishes
from autoflux.plugin_manager import load_plugins
from tests.conftest import FLUX_DEV, GB, card, size

PROFILES = for_host(load_plugins(entry_points=False).profiles, 64 * GB)


def _component(name: str, parameters: int) -> Component:
    rest = Block(parameters=ParameterCount(matmul=parameters), disk_bytes=2 * parameters)
    return Component(name=name, class_name="Network", disk_precision=Precision.BFLOAT16, rest=rest)


FLUX = Model(
    name="flux",
    path="/models/flux",
    revision="1",
    architecture=FLUX_DEV,
    components=(
        _component("text_encoder", 123_060_480),
        _component("text_encoder_2", 4_762_310_656),
        _component("transformer", 11_901_408_320),
        _component("vae", 83_819_683),
    ),
)
"""FLUX.1-dev's real sizes."""


def plan(hardware, wishes: Wishes | None = None, model: Model = FLUX, backends=("diffusers",)) -> Plan:
    return make_plan(hardware, model, PROFILES, wishes or Wishes(), backends)


def test_a_large_card_keeps_everything(machine):
    made = plan(machine(card(48)))
    assert (made.device, made.offload) == ("cuda:0", Offload.NONE)
    assert {c.placement for c in made.components} == {Placement.DEVICE}
    assert made.predicted.peak_vram_bytes.peak <= made.vram_limit_bytes
    products, attention = 59.5 / 100, 14.9 / (100 * 0.83)
    assert made.predicted.seconds_per_step == pytest.approx((products + attention) / 0.82, rel=0.01)


def test_the_processor_is_taken_only_if_it_is_far_ahead_of_the_card(machine):
    def image(tflops: float, device: str) -> float:
        wishes = Wishes(device=device)
        return plan(machine(card(48), ram_gb=128, cpu_tflops=tflops), wishes).predicted.seconds_per_image

    level = next(t for t in range(50, 1000, 10) if image(t, "cpu") < image(t, "cuda"))
    little = plan(machine(card(48), ram_gb=128, cpu_tflops=1.5 * level))
    assert little.device == "cuda:0"
    (device,) = [c for c in little.choices if c.topic == "device"]
    assert "the processor is predicted to take" in device.reason
    assert "and must be 2 times as fast" in device.reason
    assert any("and must be 2 times as fast" in r.reason for r in little.rejected if r.device == "cpu")
    far = plan(machine(card(48), ram_gb=128, cpu_tflops=3 * level))
    assert far.device == "cpu"
    (device,) = [c for c in far.choices if c.topic == "device"]
    assert device.reason.startswith("the fastest device")


def test_a_card_that_holds_the_transformer_only_is_visited(machine):
    made = plan(machine(card(30)))
    assert (made.device, made.offload) == ("cuda:0", Offload.COMPONENT)
    phases = made.predicted.peak_vram_bytes
    assert phases.encode < phases.denoise < 30 * GB
    assert phases.denoise > 23.8 * GB
    assert made.predicted.peak_ram_bytes > 33 * GB
    rejected = {r.offload: r for r in made.rejected if r.device == "cuda:0"}
    assert "device memory" in rejected[Offload.NONE].reason


def test_a_small_card_leaves_it_to_the_cpu_and_says_so(machine):
    made = plan(machine(card(8), ram_gb=128))
    assert made.device == "cpu"
    assert made.vram_limit_bytes is None
    (device,) = [c for c in made.choices if c.topic == "device"]
    assert "cuda:0 cannot" in device.reason
    assert "cuda:0 cannot: at best it needs 25." in device.reason


def test_what_fits_nowhere_is_refused_with_need_and_have(machine):
    with pytest.raises(DoesNotFit) as caught:
        plan(machine(card(8), ram_gb=16))
    assert "needs" in caught.value.message
    assert "transformer" in caught.value.message
    assert caught.value.hint


def test_the_hint_of_a_ceiling_that_is_too_low_would_fit(machine):
    hardware = machine(card(80), ram_gb=64)
    with pytest.raises(DoesNotFit) as caught:
        plan(hardware, Wishes(device="cuda", vram_bytes=10 * GB))
    hint = caught.value.hint or ""
    assert hint.startswith("--vram ")
    wish = float(hint.split()[1].removesuffix("GB")) * GB
    assert plan(hardware, Wishes(device="cuda", vram_bytes=int(wish))).device == "cuda:0"


def test_wishes_are_kept_and_called_wishes(machine):
    hardware = machine(card(80), card(80, index=1))
    wishes = Wishes(device="cuda:1", offload=Offload.COMPONENT, precision=Precision.FLOAT16, vram_bytes=40 * GB)
    made = plan(hardware, wishes)
    assert (made.device, made.offload, made.vram_limit_bytes) == ("cuda:1", Offload.COMPONENT, 40 * GB)
    assert {c.storage for c in made.components} == {Precision.FLOAT16}
    wished = {c.topic for c in made.choices if c.origin == Origin.WISH}
    assert wished == {"device", "offload", "precision"}


def test_every_choice_has_a_reason(machine):
    for hardware in (machine(), machine(card(30)), machine(card(30, kind=DeviceKind.MPS))):
        made = plan(hardware, model=FLUX)
        assert {c.topic for c in made.choices} == {"device", "precision", "offload", "backend", "batch"}
        assert all(c.reason for c in made.choices)


def test_measured_rates_beat_the_profile_and_a_missing_one_is_a_warning(machine):
    measured = plan(machine(card(48, tflops=400.0)))
    assumed = plan(machine(card(48, tflops=None)))
    assert measured.predicted.seconds_per_step < assumed.predicted.seconds_per_step
    assert not measured.warnings
    assert "arithmetic rate not measured" in assumed.warnings[0]
    (plain,) = plan(machine(card(48, tflops=None).replace(link=None))).warnings
    assert "link bandwidth" in plain
    (unified,) = plan(machine(card(48, kind=DeviceKind.MPS, tflops=None).replace(link=None))).warnings
    assert "link bandwidth" not in unified


def test_unified_memory_is_not_counted_twice(machine):
    made = plan(machine(card(40, kind=DeviceKind.MPS), ram_gb=48, cpu_tflops=0.1))
    assert (made.device, made.unified_memory) == ("mps", True)
    assert made.predicted.peak_ram_bytes < 3 * GB
    with pytest.raises(ContradictoryWishes):
        plan(machine(card(40, kind=DeviceKind.MPS)), Wishes(device="mps", offload=Offload.COMPONENT))


def test_a_device_that_is_not_there_is_named_with_what_is(machine):
    hardware = machine().replace(problems=(Problem(subject="nvml", message="no NVIDIA driver"),))
    with pytest.raises(DeviceUnavailable, match="no NVIDIA driver") as caught:
        plan(hardware, Wishes(device="cuda"))
    assert "cpu" in caught.value.message
    with pytest.raises(UnknownName, match="known: cpu, cuda, mps, xpu") as unknown:
        plan(hardware, Wishes(device="cdua"))
    assert unknown.value.hint == "did you mean 'cuda'?"
    for odd in ("cuda:x", "cuda:-1", ":"):
        with pytest.raises(UnknownName):
            plan(hardware, Wishes(device=odd))


def test_unknown_names_are_refused(machine):
    with pytest.raises(UnknownName, match="profile"):
        plan(machine(), Wishes(profile="cuda-touring"))
    with pytest.raises(UnknownName, match="backend"):
        plan(machine(), Wishes(backend="diffuser"))
    with pytest.raises(UnknownName, match="backend"):
        plan(machine(), backends=())


def test_a_size_the_model_cannot_draw_is_refused(machine):
    for wishes in (Wishes(width=100), Wishes(steps=10**6), Wishes(width=8192)):
        with pytest.raises(InvalidRequest):
            plan(machine(), wishes)


def test_a_plan_survives_json(machine):
    for hardware in (machine(), machine(card(30)), machine(card(8), ram_gb=128)):
        made = plan(hardware)
        assert Plan.from_json(made.to_json()) == made
    with pytest.raises(DamagedFile, match="as Plan"):
        Plan.from_json(made.to_json().replace("seconds_per_step", "seconds"))


def test_the_plan_says_later_how_many_pictures_of_another_size_fit(machine):
    made = plan(machine(card(30)))
    assert batch_limit(made, FLUX, 1024, 1024) == made.max_batch
    assert batch_limit(made, FLUX, 2048, 2048) < made.max_batch
    with pytest.raises(DoesNotFit, match="4096x4096"):
        batch_limit(made.replace(vram_limit_bytes=int(26.5 * GB)), FLUX, 4096, 4096)
    tight = made.replace(vram_limit_bytes=made.predicted.peak_vram_bytes.peak)
    assert batch_limit(tight, FLUX, 1024, 1024) >= made.predicted.picture.batch


MEMORY = st.floats(6, 90)


@settings(max_examples=150, deadline=None)
@given(vram=MEMORY, more=st.floats(0, 40), ram=st.floats(40, 200), tflops=st.floats(5, 900))
def test_more_memory_never_gives_a_slower_plan(machine_factory, vram, more, ram, tflops):
    def seconds(gigabytes: float) -> float:
        hardware = machine_factory(card(gigabytes, tflops=tflops), ram_gb=ram)
        return plan(hardware).predicted.seconds_per_image

    assert seconds(vram + more) <= seconds(vram) * (1 + 1e-9)


@settings(max_examples=150, deadline=None)
@given(vram=MEMORY, ram=st.floats(5, 200))
def test_a_plan_never_exceeds_its_ceilings(machine_factory, vram, ram):
    try:
        made = plan(machine_factory(card(vram), ram_gb=ram))
    except DoesNotFit:
        return
    assert made.predicted.peak_ram_bytes <= made.ram_limit_bytes <= ram * GB
    if made.vram_limit_bytes is not None:
        assert made.predicted.peak_vram_bytes.peak <= made.vram_limit_bytes <= vram * GB


@pytest.fixture(scope="module")
def machine_factory():
    """`machine` for hypothesis, which does not reset function-scoped fixtures."""
    from autoflux.hardware.values import Disk, Hardware, Host

    def make(*accelerators, ram_gb: float = 64) -> Hardware:
        memory = size(int(ram_gb * GB))
        host = Host(
            system="Linux", processor="Test", cores=2, total_bytes=memory, available_bytes=memory, pinnable_bytes=memory
        )
        return Hardware(
            fingerprint="test",
            probed_at="now",
            versions={},
            accelerators=accelerators,
            host=host,
            disk=Disk(path="/", free_bytes=memory),
        )

    return make


def test_a_real_model_is_planned(machine, tiny_model: Path):
    model = take_stock(tiny_model)
    made = plan(machine(card(8), cpu_tflops=0.001), model=model)
    assert made.device == "cuda:0"
    assert made.max_batch == 16


def test_shipped_profiles_cover_every_kind_and_cite_their_sources():
    assert {p.match.kind for p in PROFILES} == set(DeviceKind)
    for profile in PROFILES:
        assert all(profile.sources.values())


def test_the_most_particular_profile_wins_and_among_equals_the_last():
    assert select_profile(PROFILES, DeviceKind.CUDA, "7.5").name == "cuda-turing"
    assert select_profile(PROFILES, DeviceKind.CUDA, "8.9").name == "cuda-ada"
    assert select_profile(PROFILES, DeviceKind.CUDA, None).name == "cuda"
    own = select_profile(PROFILES, DeviceKind.CPU).replace(name="own")
    assert select_profile([*PROFILES, own], DeviceKind.CPU).name == "own"
    with pytest.raises(UnknownName):
        select_profile([own], DeviceKind.XPU)
