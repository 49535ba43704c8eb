"""Machines that are known without being measured."""

from __future__ import annotations

import pytest

from autoflux.errors import UnknownName
from autoflux.hardware.known import LOW_RAM_GIB, is_known, known_machine, known_names
from autoflux.hardware.values import DeviceKind, Hardware, Source
from autoflux.units import GB, GIB

NAMES = known_names()
CARDS = [name for name in NAMES if known_machine(name).accelerators]


def test_there_are_many():
    assert len(NAMES) >= 25
    assert {known_machine(name).accelerators[0].kind for name in CARDS} == {"cuda", "xpu", "mps"}
    assert len({known_machine(name).fingerprint for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_is_assumed_and_says_whence(name):
    machine = known_machine(name)
    figures = list(machine.host.matmul_tflops.values())
    figures += [machine.host.total_bytes, machine.host.copy_gb_per_s, machine.disk.read_gb_per_s]
    for card in machine.accelerators:
        figures += [card.total_bytes, card.free_bytes, card.usable_bytes, *card.matmul_tflops.values()]
        figures += [t.to_device_gb_per_s for t in (card.link.transfers if card.link else ())]
    assert all(figure.source == Source.ASSUMED and figure.note and figure.value > 0 for figure in figures)
    assert Hardware.from_json(machine.to_json()) == machine


@pytest.mark.parametrize("name", CARDS)
def test_a_name_tells_the_memory_and_figures_are_in_order(name):
    (card,) = known_machine(name).accelerators
    host = known_machine(name).host
    told = int(name.rpartition("-")[2].removesuffix("gb"))
    memory = host.total_bytes if card.unified_memory else card.total_bytes
    assert memory.value / GIB == pytest.approx(told, rel=0.07)
    assert card.usable_bytes.value <= card.free_bytes.value <= card.total_bytes.value
    rates = {precision: rate.value for precision, rate in card.matmul_tflops.items()}
    assert rates.get("int8", 10**9) > rates.get("bfloat16", rates.get("float16"))
    if "GeForce RTX" in card.name and "float8_e4m3fn" in rates:
        # Accumulating in float32 halves bfloat16 and float8 there, so int8 is the fastest.
        assert rates["int8"] == pytest.approx(2 * rates["float8_e4m3fn"], rel=0.01)
        assert rates["int8"] == pytest.approx(4 * rates["bfloat16"], rel=0.01)


def test_the_link_is_what_generation_and_lanes_allow():
    def rate(name: str) -> float:
        link = known_machine(name).accelerators[0].link
        return link.to_device_gb_per_s(pinned=True).value

    assert rate("rtx-3060-12gb") == pytest.approx(27, rel=0.01)
    assert rate("rtx-4060-8gb") == pytest.approx(rate("rtx-3060-12gb") / 2, rel=0.01)
    assert rate("rtx-5090-32gb") == pytest.approx(55, rel=0.01)
    curve = [t for t in known_machine("rtx-5090-32gb").accelerators[0].link.transfers if t.pinned]
    rates = [t.to_device_gb_per_s.value for t in curve]
    assert rates == sorted(rates)
    assert 40 < rates[0] < 50  # 1 MiB: 47 on one H200


@pytest.mark.parametrize("name", ["rtx-4090-24gb", "arc-b580-12gb"])
def test_cards_multiply_as_fast_in_either_format_of_16_bits(name):
    rates = known_machine(name).accelerators[0].matmul_tflops
    assert rates["float16"] == rates["bfloat16"]


def test_windows_keeps_memory():
    linux, windows = known_machine("rtx-3050-laptop-4gb"), known_machine("RTX-3050-laptop-4gb-windows")
    kept = linux.accelerators[0].usable_bytes.value - windows.accelerators[0].usable_bytes.value
    assert kept == pytest.approx(1.47 * GB, rel=0.01)
    assert windows.host.pinnable_bytes.value < 0.7 * linux.host.pinnable_bytes.value
    assert windows.fingerprint != linux.fingerprint


def test_low_ram_in_any_order_with_windows():
    small = known_machine("rtx-3060-12gb-low-ram")
    assert small.host.total_bytes.value == LOW_RAM_GIB * GIB
    assert known_machine("rtx-3060-12gb-low-ram-windows") == known_machine("RTX-3060-12gb-windows-low-ram")


def test_unified_memory_is_the_hosts():
    machine = known_machine("m3-max-64gb")
    (chip,) = machine.accelerators
    assert (chip.kind, chip.unified_memory, chip.link) == (DeviceKind.MPS, True, None)
    assert chip.usable_bytes.value <= machine.host.available_bytes.value


@pytest.mark.parametrize("name", [name for name in CARDS if known_machine(name).accelerators[0].unified_memory])
def test_an_apple_chip_with_low_ram_is_lent_the_same_share_of_it(name):
    def share(machine: Hardware) -> float:
        return machine.accelerators[0].total_bytes.value / machine.host.total_bytes.value

    small = known_machine(f"{name}-low-ram")
    assert share(small) == pytest.approx(share(known_machine(name)))
    assert small.accelerators[0].usable_bytes.value <= small.accelerators[0].total_bytes.value < LOW_RAM_GIB * GIB
    assert known_machine("rtx-3060-12gb-low-ram").accelerators == known_machine("rtx-3060-12gb").accelerators


def test_what_is_not_known_is_named_with_the_nearest():
    with pytest.raises(UnknownName) as caught:
        known_machine("rtx-3060-12bg")
    assert caught.value.hint == "did you mean 'rtx-3060-12gb'?"
    for name in ("", "m1-16gb-windows", "rtx-3060-12gb-windows-windows"):
        assert not is_known(name)


@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("rtx-4090-24gb-windows-windows", "rtx-4090-24gb-windows"),
        ("rtx-3060-12bg-low-ram-windows", "rtx-3060-12gb-low-ram-windows"),
        ("m1-16gb-windows", None),
    ],
)
def test_what_is_not_known_is_named_as_it_was_given_and_with_its_endings(name, guess):
    with pytest.raises(UnknownName, match=f"no machine named '{name}';") as caught:
        known_machine(name)
    assert caught.value.hint == (f"did you mean {guess!r}?" if guess else "autoflux machines")
    assert guess is None or is_known(guess)
