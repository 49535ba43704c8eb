from __future__ import annotations

from autoflux.hardware import accelerators, nvml
from autoflux.hardware.child import Measured
from autoflux.hardware.report import NO_ROOM, DeviceReport, TorchReport
from autoflux.hardware.values import DeviceKind, Problem, Size, Source
from tests.hardware.fakes import GB, FakeCard, FakeNvml, device_report, torch_report

TWO = nvml.read(
    FakeNvml([FakeCard("Big", "GPU-aaaa", free=20 * GB), FakeCard("Small", "GPU-bbbb", 8 * GB, 7 * GB)])
).cards


def listened(*devices: DeviceReport, torch: TorchReport | None = None) -> Measured:
    return Measured(torch=torch or torch_report(), devices={(d.kind, d.index): d for d in devices})


def join(cards, measured, *, wddm=False):
    return accelerators.join(cards, measured, available_bytes=16 * GB, wddm=wddm)


def test_torch_and_nvml_are_matched_by_uuid_not_by_number():
    found, problems = join(TWO, listened(device_report("bbbb", 0), device_report("aaaa", 1)))
    assert [(a.device, a.name, a.free_bytes.value) for a in found] == [
        ("cuda:0", "Small", 7 * GB),
        ("cuda:1", "Big", 20 * GB),
    ]
    assert problems == []


def test_what_nvml_knows_comes_from_nvml_and_what_torch_measured_from_torch():
    (found,), _ = join(TWO, listened(device_report(current_generation=4, current_width=8)))
    assert found.link is not None
    assert (found.link.pcie_generation, found.link.pcie_width) == (4, 16)
    assert (found.link.current_generation, found.link.current_width) == (4, 8)
    assert found.link.to_device_gb_per_s(pinned=True).value == 25
    assert found.link.pin_seconds_per_gb is not None
    assert found.matmul_tflops["bfloat16"].source == Source.MEASURED
    assert found.attention_tflops["default"].value == 120


def test_a_card_without_memory_figures_of_nvml_takes_torchs():
    (found,), _ = join((), listened(device_report()))
    assert (found.total_bytes.value, found.free_bytes.value) == (24 * GB, 22 * GB)


def test_nobody_tells_the_memory():
    (found,), _ = join((), listened(device_report(total_bytes=None, free_bytes=None)))
    assert found.usable_bytes.value == 0
    assert found.total_bytes.source == Source.ASSUMED


def test_windows_keeps_more():
    (linux,), _ = join(TWO, listened(device_report()))
    (windows,), _ = join(TWO, listened(device_report()), wddm=True)
    assert linux.usable_bytes.value > 19.5 * GB
    assert windows.usable_bytes.value == 20 * GB - 1500 * 10**6
    assert "Windows" in windows.usable_bytes.note


def test_a_unified_chip_shares_the_ram():
    report = device_report(unified_memory=True, total_bytes=48 * GB, transfers=())
    (found,), _ = join((), listened(report))
    assert found.unified_memory
    assert found.link is None
    assert found.usable_bytes.value == 16 * GB


def test_mps():
    chip = DeviceReport(kind=DeviceKind.MPS, index=0, name="Apple GPU", unified_memory=True, total_bytes=12 * GB)
    (found,), _ = join((), listened(chip))
    assert (found.device, found.usable_bytes.value) == ("mps", 12 * GB)


def test_measurements_that_failed_are_problems():
    report = device_report(
        errors=("memory: CUDA-capable device(s) is/are busy or unavailable", "odd: what", f"blocks: {NO_ROOM}")
    )
    _, problems = join(TWO, listened(report))
    assert "another process" in (problems[0].hint or "")
    assert "end what else uses the card" in (problems[2].hint or "")
    assert len(problems) == 3


def test_a_dead_child_leaves_the_cards_of_nvml_unmeasured():
    found, _ = join(TWO, Measured(problem=Problem(subject="measuring", message="crashed")))
    assert [(a.device, a.name, a.matmul_tflops) for a in found] == [("cuda:0", "Big", {}), ("cuda:1", "Small", {})]


def test_a_torch_without_cuda_beside_a_card():
    found, (problem,) = join(TWO, listened(torch=torch_report(cuda=None)))
    assert found == ()
    assert "without CUDA" in problem.message
    assert "Big" in problem.message


def test_a_torch_that_does_not_like_the_driver():
    _, (problem,) = join(TWO, listened(torch=torch_report(cuda_error="driver too old")))
    assert "driver too old" in problem.message


def test_free_memory_is_refreshed_without_torch():
    (found,), _ = join(TWO, listened(device_report()))
    later = nvml.read(FakeNvml([FakeCard("Big", "GPU-aaaa", free=3 * GB)])).cards
    refreshed = accelerators.refresh(found, later, available_bytes=16 * GB, wddm=False)
    assert refreshed.free_bytes.value == 3 * GB
    assert refreshed.usable_bytes.value < 3 * GB
    assert refreshed.matmul_tflops == found.matmul_tflops


def test_what_cannot_be_refreshed_stays():
    (found,), _ = join((), listened(device_report()))
    assert accelerators.refresh(found, (), available_bytes=GB, wddm=False) == found


def test_usable_is_never_below_zero():
    assert accelerators.usable(Size(value=5, source=Source.REPORTED), wddm=True).value == 0
