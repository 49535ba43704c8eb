"""NVIDIA cards as the driver reports them, without torch and without creating a context on any card.

Every question is asked on its own: what a driver, a virtual machine or an old card does not answer is None, and only
that. Answers that mean trouble become problems.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoflux.hardware.values import Problem
from autoflux.values import Value

# Return codes of NVML (nvml.h, nvmlReturn_t).
NO_PERMISSION = 4
DRIVER_NOT_LOADED = 9
LIBRARY_NOT_FOUND = 12
GPU_IS_LOST = 15
RESET_REQUIRED = 16
LIBRARY_MISMATCH = 18
SILENT = frozenset({3, 6, 13, 25, 30})
"""Not supported, not found, function not found, argument version mismatch, no data: not told, and nothing is wrong."""

EXCLUSIVE_MODES = {2: "prohibits all compute", 3: "admits one process at a time"}

HINTS = {
    NO_PERMISSION: "the user has no access to /dev/nvidia*; in a container pass the devices in (--gpus all)",
    DRIVER_NOT_LOADED: "load the NVIDIA kernel module (modprobe nvidia) or reboot",
    LIBRARY_NOT_FOUND: "install the NVIDIA driver; in a container start it with --gpus all",
    GPU_IS_LOST: "the card fell off the bus: reboot, and check its power and seat",
    RESET_REQUIRED: "reset the card (nvidia-smi --gpu-reset) or reboot",
    LIBRARY_MISMATCH: "the driver was updated while running: reboot",
}

NVIDIA_VENDOR = "0x10de"
"""PCI vendor number."""


class Card(Value, frozen=True, kw_only=True):
    """One NVIDIA card, or one slice of it (MIG). None is what the driver did not tell."""

    index: int
    name: str
    uuid: str | None = None
    capability: str | None = None
    total_bytes: int | None = None
    free_bytes: int | None = None
    pcie_generation: int | None = None
    pcie_width: int | None = None
    current_generation: int | None = None
    current_width: int | None = None
    compute_mode: int | None = None
    busy_share: float | None = None
    """Of the time just before, the part in which it computed for anyone."""


class Report(Value, frozen=True, kw_only=True):
    """What NVML says. Without a driver: no cards."""

    driver: str | None = None
    cuda: str | None = None
    cards: tuple[Card, ...] = ()
    problems: tuple[Problem, ...] = ()


@dataclass
class _Asker:
    """Calls NVML's functions by name; an error becomes None, and a problem if it means one."""

    library: Any
    problems: list[Problem] = field(default_factory=list)

    def ask(self, subject: str, function: str, *arguments: object) -> Any:
        try:
            answer = getattr(self.library, function)(*arguments)
        except Exception as error:  # noqa: BLE001 — NVML's errors, and ctypes' for a library that lacks the function
            self._note(subject, function, error)
            return None
        return answer.decode(errors="replace") if isinstance(answer, bytes) else answer

    def _note(self, subject: str, function: str, error: Exception) -> None:
        code = _code(error)
        if code in SILENT or isinstance(error, AttributeError):
            return
        problem = Problem(subject=subject, message=f"{function}: {error}", hint=HINTS.get(code))
        # A lost card answers every question with the same error: say it once.
        if not any(p.subject == subject and p.message.endswith(f": {error}") for p in self.problems):
            self.problems.append(problem)


def read(library: Any = None, root: Path = Path("/")) -> Report:
    """All cards of this machine. `library` is anything with the functions of `pynvml`."""
    try:
        library = library or _pynvml()
        library.nvmlInit()
    except Exception as error:  # noqa: BLE001 — no package, no library, no driver, no permission
        return Report(problems=_no_driver(error, root))
    asker = _Asker(library)
    try:
        return _report(asker)
    finally:
        asker.ask("nvml", "nvmlShutdown")


def visible(cards: tuple[Card, ...], setting: str | None) -> list[Card]:
    """The cards that `CUDA_VISIBLE_DEVICES` leaves, in its order; like CUDA, everything after an unknown name is lost.

    CUDA numbers cards by speed unless CUDA_DEVICE_ORDER=PCI_BUS_ID, so among unlike cards numbers are a guess here;
    where torch answers, uuids decide.
    """
    if setting is None:
        return list(cards)
    chosen: list[Card] = []
    for name in (part.strip() for part in setting.split(",")):
        card = _named(cards, name)
        if card is None or card in chosen:
            break
        chosen.append(card)
    return chosen


def by_uuid(cards: tuple[Card, ...], uuid: str | None) -> Card | None:
    """The card of that uuid; torch writes uuids without NVML's prefix `GPU-`."""
    wanted = bare_uuid(uuid)
    return next((card for card in cards if wanted and bare_uuid(card.uuid) == wanted), None)


def bare_uuid(uuid: str | None) -> str:
    """`GPU-1234…` and `1234…` are the same card."""
    return (uuid or "").lower().removeprefix("gpu-").removeprefix("mig-")


def has_nvidia_device(root: Path) -> bool:
    """Whether an NVIDIA graphics device is on the PCI bus (Linux), with or without a driver."""
    return any(_is_nvidia_display(device) for device in (root / "sys/bus/pci/devices").glob("*"))


def _is_nvidia_display(device: Path) -> bool:
    try:
        vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text().strip()
    except OSError:
        return False
    return vendor == NVIDIA_VENDOR and kind.startswith("0x03")


def _pynvml() -> Any:
    import pynvml  # noqa: PLC0415 — loads the driver's library; only on machines that are asked

    return pynvml


def _no_driver(error: Exception, root: Path) -> tuple[Problem, ...]:
    code = _code(error)
    if code in (LIBRARY_NOT_FOUND, DRIVER_NOT_LOADED) and not has_nvidia_device(root):
        return ()  # no driver because there is no card
    hint = HINTS.get(code) or "check `nvidia-smi`; `pip install nvidia-ml-py` if the package is missing"
    return (Problem(subject="nvml", message=f"the NVIDIA driver does not answer: {error}", hint=hint),)


def _code(error: Exception) -> int:
    code = getattr(error, "value", None)
    return code if isinstance(code, int) else -1


def _report(asker: _Asker) -> Report:
    driver = asker.ask("nvml", "nvmlSystemGetDriverVersion")
    cuda = asker.ask("nvml", "nvmlSystemGetCudaDriverVersion_v2")
    cards = list(_cards(asker))
    return Report(
        driver=driver,
        cuda=f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else None,
        cards=tuple(cards),
        problems=tuple(asker.problems),
    )


def _cards(asker: _Asker) -> Iterator[Card]:
    for index in range(asker.ask("nvml", "nvmlDeviceGetCount") or 0):
        handle = asker.ask(f"card {index}", "nvmlDeviceGetHandleByIndex", index)
        if handle is None:
            continue
        slices = list(_slices(asker, handle, index))
        yield from slices or [_card(asker, handle, index)]


def _slices(asker: _Asker, handle: Any, index: int) -> Iterator[Card]:
    """The MIG instances of a card; a card in that mode cannot be used as a whole."""
    mode = asker.ask(f"card {index}", "nvmlDeviceGetMigMode", handle)
    if not mode or not mode[0]:
        return
    whole = _card(asker, handle, index)
    for number in range(asker.ask(f"card {index}", "nvmlDeviceGetMaxMigDeviceCount", handle) or 0):
        part = asker.ask(f"card {index}", "nvmlDeviceGetMigDeviceHandleByIndex", handle, number)
        if part is not None:
            yield _slice(asker, part, whole)


def _slice(asker: _Asker, part: Any, whole: Card) -> Card:
    subject = f"card {whole.index}"
    total, free = _memory(asker, subject, part)
    return whole.replace(
        name=asker.ask(subject, "nvmlDeviceGetName", part) or whole.name,
        uuid=asker.ask(subject, "nvmlDeviceGetUUID", part),
        total_bytes=total,
        free_bytes=free,
    )


def _card(asker: _Asker, handle: Any, index: int) -> Card:
    subject = f"card {index}"

    def ask(function: str) -> Any:
        return asker.ask(subject, function, handle)

    total, free = _memory(asker, subject, handle)
    capability = ask("nvmlDeviceGetCudaComputeCapability")
    mode = ask("nvmlDeviceGetComputeMode")
    rates = ask("nvmlDeviceGetUtilizationRates")
    _note_exclusive(asker, subject, mode)
    return Card(
        index=index,
        name=ask("nvmlDeviceGetName") or f"NVIDIA card {index}",
        uuid=ask("nvmlDeviceGetUUID"),
        capability=f"{capability[0]}.{capability[1]}" if capability else None,
        total_bytes=total,
        free_bytes=free,
        pcie_generation=_positive(ask("nvmlDeviceGetMaxPcieLinkGeneration")),
        pcie_width=_positive(ask("nvmlDeviceGetMaxPcieLinkWidth")),
        current_generation=_positive(ask("nvmlDeviceGetCurrPcieLinkGeneration")),
        current_width=_positive(ask("nvmlDeviceGetCurrPcieLinkWidth")),
        compute_mode=mode,
        busy_share=rates.gpu / 100 if rates else None,
    )


def _memory(asker: _Asker, subject: str, handle: Any) -> tuple[int | None, int | None]:
    """Total and free bytes. Chips that share the host's memory (Grace, Jetson) do not answer."""
    memory = asker.ask(subject, "nvmlDeviceGetMemoryInfo", handle)
    return (int(memory.total), int(memory.free)) if memory and memory.total else (None, None)


def _note_exclusive(asker: _Asker, subject: str, mode: int | None) -> None:
    if mode in EXCLUSIVE_MODES:
        asker.problems.append(
            Problem(
                subject=subject,
                message=f"its compute mode {EXCLUSIVE_MODES[mode]}",
                hint="nvidia-smi -c 0 lets several processes use the card",
            )
        )


def _positive(number: object) -> int | None:
    return number if isinstance(number, int) and number > 0 else None


def _named(cards: tuple[Card, ...], name: str) -> Card | None:
    if name.isdigit():
        return next((card for card in cards if card.index == int(name)), None)
    matches = [card for card in cards if name and (card.uuid or "").lower().startswith(name.lower())]
    return matches[0] if len(matches) == 1 else None


def cuda_visible_devices() -> str | None:
    """The setting that hides or reorders cards."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")
