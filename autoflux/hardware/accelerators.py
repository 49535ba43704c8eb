"""Joins what NVML and torch say of each device. Pure: reports go in, accelerators and problems come out."""

from __future__ import annotations

from collections.abc import Sequence

from autoflux.hardware import nvml
from autoflux.hardware.child import Measured
from autoflux.hardware.nvml import Card
from autoflux.hardware.report import NO_ROOM, DeviceReport, TorchReport
from autoflux.hardware.values import Accelerator, DeviceKind, Link, Problem, Size, Source
from autoflux.units import MB, format_bytes

WDDM_RESERVE_BYTES = 1500 * MB
"""Windows keeps about 1.5 GB of a card for itself (seen on 4 GB laptop cards, where 2.5 GB can be used)."""

LINUX_RESERVE_BYTES = 32 * MB
"""On one H200 (driver 580, Linux) all but 8 MB of what was free beside the context could be allocated. The context's
own memory is counted by the planner."""

BUSY_WORDS = ("busy", "unavailable", "exclusive", "out of memory", "alloc_failed")


def join(
    cards: Sequence[Card], measured: Measured, *, available_bytes: int, wddm: bool
) -> tuple[tuple[Accelerator, ...], list[Problem]]:
    """The devices that torch can use, with NVML's figures where it knows them better.

    If the measuring child died before it listed devices, the cards of NVML stand in, unmeasured. `cards` are the
    visible ones in CUDA's order, `available_bytes` is the RAM that a unified chip shares.
    """
    devices = list(measured.devices.values())
    problems = [problem for device in devices for problem in _errors(device)]
    cuda = [device for device in devices if device.kind == DeviceKind.CUDA]
    if not cuda and cards:
        if measured.torch is None:
            devices += [_stand_in(index, card) for index, card in enumerate(cards)]
        else:
            problems += _unusable(cards, measured.torch)
    found = (_accelerator(device, _card(cards, device), available_bytes, wddm=wddm) for device in devices)
    return tuple(found), problems


def refresh(accelerator: Accelerator, cards: Sequence[Card], *, available_bytes: int, wddm: bool) -> Accelerator:
    """The same device with the memory that is free now, as far as that can be asked without torch."""
    if accelerator.unified_memory:
        shared = min(accelerator.total_bytes.value, available_bytes)
        size = Size(value=shared, source=Source.REPORTED, note="shared with RAM")
        return accelerator.replace(free_bytes=size, usable_bytes=size)
    card = nvml.by_uuid(tuple(cards), accelerator.uuid)
    if card is None or card.free_bytes is None:
        return accelerator
    free = Size(value=card.free_bytes, source=Source.REPORTED)
    return accelerator.replace(free_bytes=free, usable_bytes=usable(free, wddm=wddm))


def usable(free: Size, *, wddm: bool) -> Size:
    """Free memory less what the driver keeps."""
    reserve = WDDM_RESERVE_BYTES if wddm else LINUX_RESERVE_BYTES
    note = f"less {format_bytes(reserve)} ({'Windows' if wddm else 'driver'})"
    return Size(value=max(0, free.value - reserve), source=Source.ASSUMED, note=note)


def _accelerator(device: DeviceReport, card: Card | None, available_bytes: int, *, wddm: bool) -> Accelerator:
    total = _size(card.total_bytes if card else None, device.total_bytes)
    free = _size(card.free_bytes if card else None, device.free_bytes, "less the probe's context")
    accelerator = Accelerator(
        kind=device.kind,
        index=device.index,
        name=card.name if card else device.name,
        uuid=card.uuid if card and card.uuid else device.uuid,
        capability=device.capability,
        driver=device.driver,
        total_bytes=total,
        free_bytes=free,
        usable_bytes=usable(free, wddm=wddm and device.kind == DeviceKind.CUDA),
        unified_memory=device.unified_memory,
        link=None if device.unified_memory else _link(device, card),
        matmul_tflops=device.matmul_tflops,
        attention_tflops=device.attention_tflops,
        blocks=device.blocks,
    )
    return (
        refresh(accelerator, (), available_bytes=available_bytes, wddm=wddm) if device.unified_memory else accelerator
    )


def _link(device: DeviceReport, card: Card | None) -> Link:
    return Link(
        pcie_generation=card.pcie_generation if card else None,
        pcie_width=card.pcie_width if card else None,
        current_generation=device.current_generation,
        current_width=device.current_width,
        transfers=device.transfers,
        pin_seconds_per_gb=device.pin_seconds_per_gb,
    )


def _size(by_nvml: int | None, by_torch: int | None, torch_note: str = "") -> Size:
    if by_nvml is not None:
        return Size(value=by_nvml, source=Source.REPORTED)
    if by_torch is not None:
        return Size(value=by_torch, source=Source.REPORTED, note=torch_note)
    return Size(value=0, source=Source.ASSUMED, note="neither the driver nor torch tells")


def _card(cards: Sequence[Card], device: DeviceReport) -> Card | None:
    """By uuid, because torch and NVML number cards differently; a lone card without one must be the one."""
    if device.kind != DeviceKind.CUDA:
        return None
    found = nvml.by_uuid(tuple(cards), device.uuid)
    is_lone = len(cards) == 1 and not (device.uuid and cards[0].uuid)
    return cards[0] if found is None and is_lone else found


def _stand_in(index: int, card: Card) -> DeviceReport:
    return DeviceReport(kind=DeviceKind.CUDA, index=index, name=card.name, uuid=card.uuid, capability=card.capability)


def _errors(device: DeviceReport) -> list[Problem]:
    return [
        Problem(subject=f"{device.kind}:{device.index} {device.name}", message=error, hint=_hint(error))
        for error in device.errors
    ]


def _hint(error: str) -> str:
    if any(word in error.lower() for word in BUSY_WORDS):
        return "another process holds the card; end it, then `autoflux probe --refresh`"
    if error.endswith(NO_ROOM):
        return "end what else uses the card, then `autoflux probe --refresh`"
    return "`autoflux doctor` looks for the cause"


def _unusable(cards: Sequence[Card], torch: TorchReport) -> list[Problem]:
    if torch.error:
        return []  # reported as a problem of torch itself
    names = ", ".join(card.name for card in cards)
    if torch.cuda is None:
        reason, hint = "it is built without CUDA", "install a CUDA build of torch: https://pytorch.org/get-started"
    else:
        reason, hint = torch.cuda_error or "it sees no CUDA device", "`autoflux doctor` looks for the cause"
    return [Problem(subject="torch", message=f"torch {torch.version} cannot use {names}: {reason}", hint=hint)]
