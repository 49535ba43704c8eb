"""Machines with other memory, link or disk than they have."""

from __future__ import annotations

import pytest

from autoflux.errors import ContradictoryWishes
from autoflux.hardware.changes import Changes, changed
from autoflux.hardware.known import known_machine
from autoflux.hardware.values import DeviceKind, Source
from tests.conftest import GB, card


def test_no_changes_are_no_change(machine):
    hardware = machine(card(24))
    assert changed(hardware, Changes()) is hardware


def test_other_memory_keeps_what_driver_and_system_take():
    was = known_machine("rtx-3060-12gb-windows")
    new = changed(was, Changes(vram_bytes=8 * GB, ram_bytes=16 * GB))
    (old_card,), (new_card,) = was.accelerators, new.accelerators
    assert new_card.total_bytes.value == 8 * GB
    kept = old_card.total_bytes.value - old_card.usable_bytes.value
    assert new_card.usable_bytes.value == 8 * GB - kept
    assert new.host.total_bytes.value == 16 * GB
    assert new.host.available_bytes.value == 16 * GB - (was.host.total_bytes.value - was.host.available_bytes.value)
    assert new.host.pinnable_bytes.value == pytest.approx(new.host.available_bytes.value / 2, rel=1e-6)
    assert new.fingerprint != was.fingerprint


def test_memory_below_what_the_system_takes_is_none_and_not_negative():
    new = changed(known_machine("rtx-3060-12gb"), Changes(vram_bytes=10**6, ram_bytes=10**6))
    assert new.accelerators[0].usable_bytes.value == new.host.available_bytes.value == 0


def test_other_rates_are_of_the_same_machine(machine):
    was = machine(card(24))
    new = changed(was, Changes(link_gb_per_s=6.8, disk_gb_per_s=0.5))
    rate = new.accelerators[0].link.to_device_gb_per_s(pinned=True)
    assert (rate.value, rate.source) == (pytest.approx(6.8, rel=0.01), Source.ASSUMED)
    assert new.disk.read_gb_per_s.value == 0.5
    assert new.fingerprint == was.fingerprint
    assert new.accelerators[0].usable_bytes == was.accelerators[0].usable_bytes


def test_a_unified_chip_grows_with_the_ram():
    was = known_machine("m1-16gb")
    new = changed(was, Changes(ram_bytes=2 * was.host.total_bytes.value))
    assert new.accelerators[0].total_bytes.value == 2 * was.accelerators[0].total_bytes.value
    assert new.accelerators[0].usable_bytes.value <= new.host.available_bytes.value


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        (Changes(vram_bytes=GB), "drop --vram; --ram changes the memory that a CPU"),
        (Changes(link_gb_per_s=5.0), "drop --link; weights lie where"),
    ],
)
def test_a_card_that_is_not_there_cannot_be_changed(machine, changes, hint):
    for hardware in (machine(), machine(card(30, kind=DeviceKind.MPS))):
        with pytest.raises(ContradictoryWishes, match="none with a") as caught:
            changed(hardware, changes)
        assert (caught.value.hint or "").startswith(hint)
