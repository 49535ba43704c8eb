from __future__ import annotations

import torch

from autoflux.hardware import copies
from autoflux.hardware.device import Device, Findings
from autoflux.hardware.values import DeviceKind, Source

MIB = 2**20
CPU = Device(torch, DeviceKind.CPU)


def test_both_directions_are_timed_for_every_size_there_is_room_for():
    findings = Findings()
    found = copies.transfers(CPU, 4 * MIB, 1024 * MIB, findings)
    pageable = [transfer for transfer in found if not transfer.pinned]
    assert [transfer.block_bytes for transfer in pageable] == [MIB // 4, MIB]
    assert all(transfer.is_positive for transfer in found)
    # Without a device torch has nothing to pin for, and says so.
    assert len(found) == 4 or findings.errors[0].startswith("pinned copies")


def test_measuring_takes_no_more_than_a_share_of_the_ram():
    assert {t.block_bytes for t in copies.transfers(CPU, 1024 * MIB, 8 * MIB, Findings())} == {MIB // 4, MIB}


def test_without_room_nothing_is_timed():
    assert copies.transfers(CPU, 0, 1024 * MIB, Findings()) == []


def test_pinning_is_timed_with_what_registers_memory():
    calls: list[tuple[str, int]] = []

    def register(address: int, nbytes: int) -> None:
        calls.append(("register", address))
        assert nbytes == MIB

    def unregister(address: int) -> None:
        calls.append(("unregister", address))

    found = copies.pinning_seconds_per_gb(torch, MIB, register, unregister)
    assert found.value > 0
    assert found.source == Source.MEASURED
    assert [what for what, _ in calls] == ["register", "unregister"] * copies.PIN_ROUNDS
    assert all(one == other for (_, one), (_, other) in zip(calls[::2], calls[1::2], strict=True))


def test_a_driver_that_refuses_is_not_asked_to_take_it_back():
    def refuse(_address: int, _nbytes: int) -> None:
        raise RuntimeError("cudaHostRegister refused")

    def unregister(_address: int) -> None:
        raise AssertionError("was never registered")

    findings = Findings()
    timed = findings.attempt("pinning", lambda: copies.pinning_seconds_per_gb(torch, MIB, refuse, unregister))
    assert timed is None
    assert findings.errors == ["pinning: cudaHostRegister refused"]


def test_only_cuda_has_memory_registered():
    assert copies.pin_seconds_per_gb(CPU, 64 * MIB) is None


def test_copying_in_ram():
    assert copies.host_copy_rate(torch, 16 * MIB).value > 0


def test_on_a_slow_link_the_largest_copies_are_left_out():
    found = copies.transfers(CPU, 64 * MIB, 1024 * MIB, Findings(), largest_seconds=0.0)
    (only,) = [transfer for transfer in found if not transfer.pinned]
    assert only.block_bytes == MIB // 4
