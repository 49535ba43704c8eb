"""Stand-ins for what a probe asks: NVML, a `/sys/fs/cgroup`, a measuring child."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml

from autoflux.hardware.report import DeviceReport, Done, HostReport, Message, TorchReport, encode
from autoflux.hardware.values import DeviceKind, Figure, Source, Transfer

GB = 10**9


@dataclass
class FakeCard:
    """What NVML tells of one card; a MIG card has parts."""

    name: str = "Fake 4090"
    uuid: str = "GPU-aaaa"
    total: int = 24 * GB
    free: int = 23 * GB
    parts: tuple[FakeCard, ...] = ()
    busy_percent: int = 0


@dataclass
class FakeNvml:
    """Has the functions of `pynvml` that the probe calls; those in `errors` raise NVML's error of that number."""

    cards: list[FakeCard] = field(default_factory=lambda: [FakeCard()])
    errors: Mapping[str, int] = field(default_factory=dict)
    compute_mode: int = 0

    def __getattribute__(self, name: str) -> Any:
        errors = object.__getattribute__(self, "errors")
        if name in errors:
            return lambda *_arguments: _fail(errors[name])
        return object.__getattribute__(self, name)

    def nvmlInit(self): ...  # noqa: N802
    def nvmlShutdown(self): ...  # noqa: N802

    def nvmlSystemGetDriverVersion(self):  # noqa: N802
        return b"580.1"

    def nvmlSystemGetCudaDriverVersion_v2(self):  # noqa: N802
        return 13010

    def nvmlDeviceGetCount(self):  # noqa: N802
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802
        return self.cards[index]

    def nvmlDeviceGetMigMode(self, card):  # noqa: N802
        return [1, 1] if card.parts else _fail(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def nvmlDeviceGetMaxMigDeviceCount(self, _card):  # noqa: N802
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card, index):  # noqa: N802
        return card.parts[index] if index < len(card.parts) else _fail(pynvml.NVML_ERROR_NOT_FOUND)

    def nvmlDeviceGetName(self, card):  # noqa: N802
        return card.name

    def nvmlDeviceGetUUID(self, card):  # noqa: N802
        return card.uuid

    def nvmlDeviceGetMemoryInfo(self, card):  # noqa: N802
        return SimpleNamespace(total=card.total, free=card.free, used=card.total - card.free)

    def nvmlDeviceGetCudaComputeCapability(self, _card):  # noqa: N802
        return (8, 9)

    def nvmlDeviceGetComputeMode(self, _card):  # noqa: N802
        return self.compute_mode

    def nvmlDeviceGetUtilizationRates(self, card):  # noqa: N802
        return SimpleNamespace(gpu=card.busy_percent, memory=0)

    def nvmlDeviceGetMaxPcieLinkGeneration(self, _card):  # noqa: N802
        return 4

    def nvmlDeviceGetMaxPcieLinkWidth(self, _card):  # noqa: N802
        return 16

    def nvmlDeviceGetCurrPcieLinkGeneration(self, _card):  # noqa: N802
        return 1

    def nvmlDeviceGetCurrPcieLinkWidth(self, _card):  # noqa: N802
        return 16


def _fail(code: int) -> Any:
    raise pynvml.NVMLError(code)


def measured(value: float) -> Figure:
    return Figure(value=value, source=Source.MEASURED)


def device_report(uuid: str = "aaaa", index: int = 0, **changes: Any) -> DeviceReport:
    copies = Transfer(block_bytes=2**26, pinned=True, to_device_gb_per_s=measured(25), to_host_gb_per_s=measured(26))
    fields: dict[str, Any] = {
        "kind": DeviceKind.CUDA,
        "index": index,
        "name": f"torch's name of {uuid}",
        "uuid": uuid,
        "capability": "8.9",
        "total_bytes": 24 * GB,
        "free_bytes": 22 * GB,
        "transfers": (copies,),
        "pin_seconds_per_gb": measured(0.2),
        "matmul_tflops": {"bfloat16": measured(160)},
        "attention_tflops": {"default": measured(120)},
    }
    return DeviceReport(**(fields | changes))


def torch_report(**changes: Any) -> TorchReport:
    return TorchReport(**({"version": "2.11.0+cu130", "cuda": "13.0"} | changes))


def child(*messages: Message | str, then: str = "") -> tuple[str, ...]:
    """A command line that says `messages` (a string: as it is), then runs the statement `then`."""
    said = b"".join(m.encode() + b"\n" if isinstance(m, str) else encode(m) for m in messages)
    return (sys.executable, "-c", f"import os, sys, time\nos.write(1, {said!r})\n{then}")


def healthy_child(*devices: DeviceReport, share: float | None = None, tflops: float = 0.2) -> tuple[str, ...]:
    """One that measured `tflops` on the processor, of which others left that share."""
    rates = {"float32": measured(tflops)}
    host = HostReport(copy_gb_per_s=measured(15), matmul_tflops=rates, processor_share=share)
    return child(torch_report(), *devices, host, Done())


def write(root: Path, files: Mapping[str, str | int]) -> Path:
    """Write small files below `root`, folders included."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(text))
    return root
