"""The measuring child's own code, with the processor posing as a device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from autoflux.hardware import measure
from autoflux.hardware.report import NO_ROOM, DeviceReport, Message, Stage
from autoflux.hardware.values import BlockTiming, DeviceKind
from tests.hardware.fakes import device_report
from tests.hardware.fakes import measured as figure

MIB = 2**20
FREE = 64 * MIB
GB = 10**9


class PosingTorch:
    """torch with one card, whose tensors lie in RAM."""

    def __init__(self, kind: str, module: Any) -> None:
        import torch

        self._torch = torch
        setattr(self, kind, module)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._torch, name)
        if name not in ("empty", "ones", "randn", "randint"):
            return found

        def in_ram(*sizes: Any, **options: Any) -> Any:
            return found(*sizes, **{k: v for k, v in options.items() if k not in ("device", "pin_memory")})

        return in_ram


def module(**changes: Any) -> SimpleNamespace:
    """Stands in for `torch.cuda` or `torch.xpu`."""
    properties = SimpleNamespace(name="Posing", total_memory=2 * GB, major=9, minor=0, uuid="aaaa")
    found = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_properties": lambda _index: properties,
        "mem_get_info": lambda _index: (FREE, 2 * GB),
        "synchronize": lambda _index: None,
        "empty_cache": lambda: None,
    }
    return SimpleNamespace(**(found | changes))


def measured(torch: Any, kind: DeviceKind = DeviceKind.XPU) -> tuple[DeviceReport, list[Message]]:
    said: list[Message] = []
    measure.measure_device(said.append, measure.Device(torch, kind), host_bytes=256 * MIB)
    reports = [message for message in said if isinstance(message, DeviceReport)]
    assert reports[0].matmul_tflops == {}
    return reports[-1], said


@pytest.fixture(scope="module")
def healthy() -> tuple[DeviceReport, list[Message]]:
    return measured(PosingTorch("xpu", module()))


def test_a_device_is_said_before_and_after_each_sort_of_measuring(healthy):
    report, said = healthy
    assert [type(message) for message in said] == [DeviceReport, *[Stage, DeviceReport] * 3]
    assert (report.name, report.capability, report.uuid, report.free_bytes) == ("Posing", "9.0", "aaaa", FREE)
    assert set(report.matmul_tflops) == {"bfloat16", "float16", "float32"}
    assert set(report.attention_tflops) == {"default"}
    assert all(figure.value > 0 for figure in (*report.matmul_tflops.values(), *report.attention_tflops.values()))


def test_what_there_is_no_room_for_is_said(healthy):
    report, _ = healthy
    assert report.blocks == {}
    (error,) = report.errors
    assert error.startswith("blocks not timed: 67.1 MB are free")
    assert error.endswith(NO_ROOM)


def test_copies_never_take_more_than_a_share_of_what_is_free(healthy):
    report, _ = healthy
    assert {(t.block_bytes, t.pinned) for t in report.transfers} == {
        (size, pinned) for size in (MIB // 4, MIB, 4 * MIB, 16 * MIB) for pinned in (True, False)
    }


def test_a_full_card_is_not_measured_and_nothing_is_thrown():
    report, _ = measured(PosingTorch("xpu", module(mem_get_info=lambda _index: (100, 2 * GB))))
    assert report.transfers == ()
    assert report.matmul_tflops == report.attention_tflops == {}
    (error,) = report.errors
    assert error.startswith("matrix products, attention, blocks not timed")


def test_whatever_a_driver_throws_is_said():
    def fail(*_arguments: object) -> None:
        raise RuntimeError("CUDA error: device busy\nlong advice")

    broken = module(get_device_properties=fail, mem_get_info=fail, synchronize=fail)
    report, _ = measured(PosingTorch("xpu", broken))
    assert report.name == "xpu:0"
    assert "properties: CUDA error: device busy" in report.errors
    for what in ("pinned copies", "pageable copies", "arithmetic in bfloat16", "attention by default"):
        assert any(error.startswith(f"{what}: CUDA error") for error in report.errors), what
    assert report.matmul_tflops == report.attention_tflops == {}


def test_a_chip_with_the_hosts_memory_copies_nothing():
    facts = SimpleNamespace(name="Chip", total_memory=GB, is_integrated=1)
    chip = module(get_device_properties=lambda _: facts, mem_get_info=lambda _: (100, GB))
    report, _ = measured(PosingTorch("xpu", chip))
    assert report.unified_memory
    assert report.transfers == ()


def test_listing_that_fails_leaves_that_kind_out():
    def fail() -> bool:
        raise OSError("no such library")

    torch = PosingTorch("xpu", module())
    torch.cuda = module(is_available=fail)  # type: ignore[attr-defined]
    assert [(device.name) for device in measure.devices(torch)] == ["xpu:0"]


def test_capabilities_decide_which_formats_are_tried():
    def has(precision: str, capability: str | None) -> bool:
        card = DeviceReport(kind=DeviceKind.CUDA, index=0, name="c", capability=capability)
        return measure._has(precision, card)

    assert has("float8_e4m3fn", "8.9")
    assert has("int8", "10.0")
    assert not has("float8_e4m3fn", "8.6")
    assert not has("int8", None)


def test_a_second_card_of_the_same_make_is_only_copied_to():
    timing = BlockTiming(
        seconds=figure(0.004), precision="bfloat16", hidden_size=3072, image_tokens=4096, text_tokens=512
    )
    first = device_report(
        kind=DeviceKind.XPU,
        name="Posing",
        capability="9.0",
        total_bytes=2 * GB,
        attention_tflops={"default": figure(90)},
        blocks={"double": timing},
    )
    said: list[Message] = []
    device = measure.Device(PosingTorch("xpu", module()), DeviceKind.XPU, 1)
    report = measure.measure_device(said.append, device, 64 * MIB, [device_report(), first])
    assert report.transfers
    assert report.matmul_tflops["bfloat16"].value == 160
    assert report.attention_tflops["default"].value == 90
    assert report.blocks["double"].seconds.note.endswith("on xpu:0")


def test_cards_before_ampere_compute_in_float16():
    def wide(**changes: Any) -> str:
        return measure._wide(device_report(**changes))

    assert wide(capability="7.5") == "float16"
    assert wide(capability="8.0") == "bfloat16"
    assert wide(capability=None) == wide(kind=DeviceKind.MPS, capability="7.5") == "bfloat16"
