"""Machines that were not measured: known cards and hosts by name, from public specifications. All figures assumed.

The figures are in `known.toml`; this file turns them into what a probe would have found there.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources

import msgspec

from autoflux.errors import UnknownName
from autoflux.hardware.accelerators import usable
from autoflux.hardware.cache import fingerprint
from autoflux.hardware.host import pinnable
from autoflux.hardware.values import (
    NEVER,
    Accelerator,
    DeviceKind,
    Disk,
    Figure,
    Hardware,
    Host,
    Link,
    Size,
    Source,
    Transfer,
)
from autoflux.units import GB, GIB, MIB
from autoflux.values import Value

WINDOWS = "-windows"
"""Ending of a name for the same machine under Windows, which keeps 1.5 GB of a card and half of the RAM unpinned."""

LOW_RAM = "-low-ram"
"""Ending of a name for the same machine with no more than `LOW_RAM_GIB` of RAM."""

LOW_RAM_GIB = 16

SYSTEM_BYTES = {"Linux": 3 * GB, "Windows": 4 * GB, "Darwin": 4 * GB}
"""RAM that the system and a desktop take. Assumed: what idle ones show."""

DRIVER_SHARE = 0.02
"""Share of a card's memory that is not free on an idle one: an RTX 4090 of 24 GiB reports 23.6, an RTX 3060 of 12
GiB 11.75."""

PINNED_GB_PER_S_BY_LANE = {3: 6.8 / 8, 4: 27 / 16, 5: 55 / 16}
"""By PCIe generation, what a lane brings to the device from pinned memory: 3 x8 and 4 x16 as others report, 5 x16
measured on one H200."""

PAGEABLE_GB_PER_S = 6.3
"""Measured on one H200; bound by the host's memory copy. A slow link is slower by its own."""

PAGEABLE_SHARE = 0.8
"""Of a slow link's pinned rate. Assumed."""

COPY_SECONDS = 5e-6
"""What a copy takes beside its bytes: on one H200 pieces of 1 MiB reached 47 of 55 GB/s, which is 3 us."""

COPY_SIZES = tuple(mib * MIB for mib in (1, 16, 64, 256))


class KnownHost(Value, frozen=True, kw_only=True):
    """A computer around cards, as `known.toml` gives it."""

    system: str
    processor: str
    cores: int
    ram_gib: float
    disk_gb_per_s: float
    copy_gb_per_s: float
    tflops: dict[str, float]
    source: str


class KnownMachine(Value, frozen=True, kw_only=True):
    """A card in its usual host, or a host alone, as `known.toml` gives it."""

    host: str
    source: str
    product: str = ""
    """The name by which torch reports the card; empty for a host alone."""
    kind: DeviceKind = DeviceKind.CPU
    capability: str | None = None
    memory_gib: float = 0
    pcie: tuple[int, int] | None = None
    """Generation and lanes."""
    tflops: dict[str, float] = msgspec.field(default_factory=dict)
    sustained: float = 0.85


class _Known(Value, frozen=True, kw_only=True):
    hosts: dict[str, KnownHost]
    machines: dict[str, KnownMachine]


def known_names() -> list[str]:
    """All names, without the endings `WINDOWS` and `LOW_RAM`, in the order of the file: by maker and generation."""
    return list(_known().machines)


def is_known(name: str) -> bool:
    """Whether `known_machine` knows it."""
    try:
        known_machine(name)
    except UnknownName:
        return False
    return True


def known_machine(name: str) -> Hardware:
    """What a probe would probably find on the machine of that name.

    Raises:
        UnknownName: none is known by it, or there is no such thing as an Apple chip under Windows.
    """
    plain, endings = _without_endings(name.lower())
    known = _known()
    machine = known.machines.get(plain)
    if machine is None:
        given = name.lower().removeprefix(plain)
        alike = [f"{other}{given}" for other, found in known.machines.items() if _can_have(found, endings)]
        raise UnknownName("machine", name, known.machines, hint="autoflux machines", like=alike)
    if not _can_have(machine, endings):
        raise UnknownName("machine", name, known.machines, hint="autoflux machines")
    host = known.hosts[machine.host]
    if LOW_RAM in endings:
        machine, host = _with_low_ram(machine, host)
    if WINDOWS in endings:
        host = host.replace(system="Windows")
    # The endings in one order: whichever is given first, it is the same machine.
    return _hardware(plain + "".join(e for e in (WINDOWS, LOW_RAM) if e in endings), machine, host)


def _can_have(machine: KnownMachine, endings: set[str]) -> bool:
    return not (WINDOWS in endings and machine.kind == DeviceKind.MPS)


def _with_low_ram(machine: KnownMachine, host: KnownHost) -> tuple[KnownMachine, KnownHost]:
    """An Apple chip has a share of the RAM, so it shrinks alike; a card keeps its own."""
    ram_gib = min(host.ram_gib, LOW_RAM_GIB)
    if machine.kind == DeviceKind.MPS:
        machine = machine.replace(memory_gib=machine.memory_gib * ram_gib / host.ram_gib)
    return machine, host.replace(ram_gib=ram_gib)


@cache
def _known() -> _Known:
    text = (resources.files("autoflux.hardware") / "known.toml").read_text(encoding="utf-8")
    return msgspec.convert(tomllib.loads(text), _Known)


def _without_endings(name: str) -> tuple[str, set[str]]:
    endings: set[str] = set()
    while ending := next((e for e in (WINDOWS, LOW_RAM) if name.endswith(e) and e not in endings), None):
        name = name.removesuffix(ending)
        endings.add(ending)
    return name, endings


def _hardware(name: str, machine: KnownMachine, host: KnownHost) -> Hardware:
    computer = _host(host)
    cards = () if machine.kind == DeviceKind.CPU else (_accelerator(machine, computer),)
    hardware = Hardware(
        fingerprint="",
        probed_at=NEVER,
        # What compiles blocks is there on Linux, for cards of NVIDIA's.
        versions={"triton": "assumed"} if machine.kind == DeviceKind.CUDA else {},
        accelerators=cards,
        host=computer,
        disk=Disk(
            path="", free_bytes=_size(200 * GB, "guessed"), read_gb_per_s=_figure(host.disk_gb_per_s, host.source)
        ),
    )
    return hardware.replace(fingerprint=fingerprint({"known": name, "is": hardware.to_data()}))


def _host(host: KnownHost) -> Host:
    total = int(host.ram_gib * GIB)
    available = total - SYSTEM_BYTES[host.system]
    note = f"what is left beside {host.system} and a desktop"
    return Host(
        system=host.system,
        processor=host.processor,
        cores=host.cores,
        total_bytes=_size(total, host.source),
        available_bytes=_size(available, note),
        pinnable_bytes=pinnable(available, windows=host.system == "Windows"),
        copy_gb_per_s=_figure(host.copy_gb_per_s, host.source),
        matmul_tflops={name: _figure(rate, host.source) for name, rate in host.tflops.items()},
    )


def _accelerator(machine: KnownMachine, host: Host) -> Accelerator:
    total = _size(int(machine.memory_gib * GIB), machine.source)
    unified = machine.kind == DeviceKind.MPS
    if unified:
        free = keeps = total.replace(value=min(total.value, host.available_bytes.value), note="shared with RAM")
    else:
        note = f"{1 - DRIVER_SHARE:.0%} of it are free on an idle card"
        free = _size(int(total.value * (1 - DRIVER_SHARE)), note)
        keeps = usable(free, wddm=host.system == "Windows")
    return Accelerator(
        kind=machine.kind,
        index=0,
        name=machine.product,
        capability=machine.capability,
        total_bytes=total,
        free_bytes=free,
        usable_bytes=keeps,
        unified_memory=unified,
        link=_link(*machine.pcie) if machine.pcie else None,
        matmul_tflops={name: _rate(machine, rate) for name, rate in _all_tflops(machine).items()},
    )


def _all_tflops(machine: KnownMachine) -> dict[str, float]:
    """Cards that multiply in bfloat16 do so as fast in float16."""
    alike = {"float16": machine.tflops["bfloat16"]} if "bfloat16" in machine.tflops else {}
    return alike | machine.tflops


def _rate(machine: KnownMachine, rate: float) -> Figure:
    return _figure(rate * machine.sustained, f"{machine.sustained:.0%} of {rate:g} TFLOP/s; {machine.source}")


def _link(generation: int, width: int) -> Link:
    rate = PINNED_GB_PER_S_BY_LANE[generation] * width
    return Link(pcie_generation=generation, pcie_width=width, transfers=transfers(rate, f"PCIe {generation} x{width}"))


def transfers(pinned_gb_per_s: float, note: str) -> tuple[Transfer, ...]:
    """Copies over a link that brings so much from pinned memory: slower in small pieces, and from pageable memory."""
    pageable = min(PAGEABLE_GB_PER_S, pinned_gb_per_s * PAGEABLE_SHARE)
    return tuple(
        Transfer(block_bytes=size, pinned=pinned, to_device_gb_per_s=figure, to_host_gb_per_s=figure)
        for pinned, peak in ((True, pinned_gb_per_s), (False, pageable))
        for size in COPY_SIZES
        for figure in (_figure(_in_pieces(size, peak), note),)
    )


def _in_pieces(size: int, peak_gb_per_s: float) -> float:
    return size / (COPY_SECONDS + size / (peak_gb_per_s * GB)) / GB


def _figure(value: float, note: str) -> Figure:
    return Figure(value=value, source=Source.ASSUMED, note=note)


def _size(value: int, note: str) -> Size:
    return Size(value=value, source=Source.ASSUMED, note=note)
