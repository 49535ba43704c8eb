"""A machine as it would be with other memory, link or disk. Pure: hardware goes in, hardware comes out."""

from __future__ import annotations

from autoflux.errors import ContradictoryWishes
from autoflux.hardware.cache import fingerprint
from autoflux.hardware.known import transfers
from autoflux.hardware.values import Accelerator, Figure, Hardware, Size, Source
from autoflux.units import format_bytes
from autoflux.values import Value


class Changes(Value, frozen=True, kw_only=True):
    """What is to be assumed instead of what is known. None leaves it as it is; rates in 10^9 bytes a second."""

    vram_bytes: int | None = None
    """Memory of every card."""
    ram_bytes: int | None = None
    link_gb_per_s: float | None = None
    """To the card from pinned memory, in large pieces."""
    disk_gb_per_s: float | None = None

    @property
    def memory(self) -> bool:
        """Whether it would be another machine, not only other rates of the same."""
        return self.vram_bytes is not None or self.ram_bytes is not None


def changed(hardware: Hardware, changes: Changes) -> Hardware:
    """`hardware` with the `changes`; other memory makes it another machine, with a fingerprint of its own.

    Raises:
        ContradictoryWishes: a card's memory or link is to be other than it is, and there is no card that has one.
    """
    if changes == Changes():
        return hardware
    _check(hardware, changes)
    new = hardware if changes.ram_bytes is None else _with_ram(hardware, changes.ram_bytes)
    new = new.replace(accelerators=tuple(_with_card(a, changes) for a in new.accelerators))
    if changes.disk_gb_per_s is not None:
        new = new.replace(disk=new.disk.replace(read_gb_per_s=_wished_rate(changes.disk_gb_per_s, "--disk")))
    if not changes.memory:
        return new
    return new.replace(fingerprint=fingerprint({"was": hardware.fingerprint, "changes": changes.to_data()}))


def _check(hardware: Hardware, changes: Changes) -> None:
    separate = [a for a in hardware.accelerators if not a.unified_memory]
    for option, wish, what, instead in (
        ("--vram", changes.vram_bytes, "memory", "--ram changes the memory that a CPU or a unified chip computes in"),
        ("--link", changes.link_gb_per_s, "link", "weights lie where a CPU or a unified chip computes"),
    ):
        if wish is not None and not separate:
            raise ContradictoryWishes(
                f"{option} is for a card, and that machine has none with a {what} of its own",
                hint=f"drop {option}; {instead}",
            )


def _with_ram(hardware: Hardware, total: int) -> Hardware:
    host = hardware.host
    taken = host.total_bytes.value - host.available_bytes.value
    available = max(0, total - taken)
    share = host.pinnable_bytes.value / max(1, host.available_bytes.value)
    new = host.replace(
        total_bytes=_wished(total, "--ram"),
        available_bytes=_wished(available, f"--ram less {format_bytes(taken)} that the system takes"),
        pinnable_bytes=_wished(int(available * share), f"{share:.0%} of what is available"),
    )
    shared = tuple(
        _unified(a, total / max(1, host.total_bytes.value), available) if a.unified_memory else a
        for a in hardware.accelerators
    )
    return hardware.replace(host=new, accelerators=shared)


def _unified(accelerator: Accelerator, share: float, available: int) -> Accelerator:
    total = _wished(int(accelerator.total_bytes.value * share), "its share of --ram")
    usable = total.replace(value=min(total.value, available))
    return accelerator.replace(total_bytes=total, free_bytes=usable, usable_bytes=usable)


def _with_card(accelerator: Accelerator, changes: Changes) -> Accelerator:
    if accelerator.unified_memory:
        return accelerator
    if changes.vram_bytes is not None:
        accelerator = _with_vram(accelerator, changes.vram_bytes)
    if changes.link_gb_per_s is not None and accelerator.link is not None:
        pieces = transfers(changes.link_gb_per_s, "--link")
        accelerator = accelerator.replace(link=accelerator.link.replace(transfers=pieces))
    return accelerator


def _with_vram(accelerator: Accelerator, total: int) -> Accelerator:
    # What firmware and driver keep does not shrink with the card.
    def less(taken: int) -> Size:
        return _wished(max(0, total - taken), f"--vram less {format_bytes(taken)} that the driver keeps")

    had = accelerator.total_bytes.value
    return accelerator.replace(
        total_bytes=_wished(total, "--vram"),
        free_bytes=less(had - accelerator.free_bytes.value),
        usable_bytes=less(had - accelerator.usable_bytes.value),
    )


def _wished(value: int, note: str) -> Size:
    return Size(value=value, source=Source.ASSUMED, note=note)


def _wished_rate(value: float, note: str) -> Figure:
    return Figure(value=value, source=Source.ASSUMED, note=note)
