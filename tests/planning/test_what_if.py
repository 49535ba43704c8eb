"""FLUX.1-dev on machines that are not here, and the arithmetic that is shown for them."""

from __future__ import annotations

import re

import pytest

from autoflux.errors import DoesNotFit
from autoflux.hardware.changes import Changes, changed
from autoflux.hardware.known import known_machine
from autoflux.planning.planner import make_plan
from autoflux.planning.profiles import for_host
from autoflux.planning.values import Plan, Wishes
from autoflux.plugin_manager import load_plugins
from autoflux.units import format_seconds
from benchmarks import what_if
from tests.planning.test_streaming import FLUX

GB = 10**9
PLUGINS = load_plugins(entry_points=False)


def plan(name: str, changes: Changes | None = None, wishes: Wishes | None = None) -> Plan:
    machine = changed(known_machine(name), changes or Changes())
    profiles = for_host(PLUGINS.profiles, machine.host.total_bytes.value)
    return make_plan(machine, FLUX, profiles, wishes or Wishes(), ("diffusers",))


def test_a_laptop_card_of_4_gb_under_windows_runs_in_what_windows_leaves_of_it():
    made = plan("rtx-3050-laptop-4gb-windows")
    assert made.device == "cuda:0"
    assert made.predicted.peak_vram_bytes.peak <= made.vram_limit_bytes < 2.5 * GB


def test_a_card_with_too_little_left_is_refused_with_need_and_have():
    with pytest.raises(DoesNotFit, match=r"needs .* GB of device memory and may use 1\.\d+ GB") as caught:
        plan("rtx-3050-laptop-4gb-windows", Changes(vram_bytes=3 * GB), Wishes(device="cuda"))
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("name", ["rtx-4060-8gb", "rtx-3060-12gb", "rtx-3060-12gb-low-ram", "rtx-4090-24gb"])
def test_cards_of_8_to_24_gb_run_within_card_and_ram(name):
    made, machine = plan(name), known_machine(name)
    assert made.device == "cuda:0"
    assert made.predicted.peak_vram_bytes.peak <= made.vram_limit_bytes < machine.accelerators[0].total_bytes.value
    assert made.predicted.peak_ram_bytes <= made.ram_limit_bytes < machine.host.total_bytes.value
    # No step is faster than its arithmetic at the data sheet's full rate.
    fastest = max(rate.value for rate in machine.accelerators[0].matmul_tflops.values()) / 0.85
    assert made.predicted.seconds_per_step > 74.4 / fastest


def test_a_low_ram_host_keeps_some_for_others():
    assert (
        plan("rtx-3060-12gb-low-ram").ram_limit_bytes
        == known_machine("rtx-3060-12gb-low-ram").host.available_bytes.value - GB
    )


def test_weights_on_an_apple_chip_count_once():
    made = plan("m3-max-64gb")
    weights = sum(FLUX.component(c.name).bytes_as(c.storage) for c in made.components)
    assert made.device == "mps"
    assert made.predicted.peak_vram_bytes.peak > weights
    assert made.predicted.peak_ram_bytes < weights / 2


def test_a_better_machine_is_never_slower():
    def seconds(**changes: float) -> float:
        return plan("rtx-3060-12gb", Changes(**changes)).predicted.seconds_per_image

    small, more, large = (seconds(vram_bytes=gb * GB) for gb in (8, 10, 40))
    assert small >= more >= large
    assert seconds(ram_bytes=16 * GB) >= seconds(ram_bytes=32 * GB) >= seconds(ram_bytes=128 * GB)
    assert seconds(link_gb_per_s=3.0) >= seconds(link_gb_per_s=27.0) >= seconds(link_gb_per_s=55.0)
    assert seconds(disk_gb_per_s=0.2) >= seconds(disk_gb_per_s=5.0)


def test_the_arithmetic_that_is_shown_is_the_plans():
    lines = "\n".join(what_if.section("rtx-4090-24gb", FLUX, PLUGINS))
    made = plan("rtx-4090-24gb")
    seconds = made.predicted.block_seconds
    step = 19 * seconds["double"] + 38 * seconds["single"]
    assert f"together {step * 1000:.0f} ms" in lines
    assert re.search(r"products at \d+ TFLOP/s in int8", lines)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        (
            "rtx-4060-8gb",
            ["8.42 GB are free (98% of it ", "8.39 GB are usable (less 32.0 MB ", "8.09 GB may be taken ("],
        ),
        ("m3-max-64gb", ["51.5 GB are usable (shared with RAM)", "51.0 GB may be taken (less 500 MB "]),
    ],
)
def test_the_line_of_device_memory_adds_up(name, steps):
    (line,) = [line for line in what_if.section(name, FLUX, PLUGINS) if line.startswith("- device memory: ")]
    told = line.partition(", of which ")[2].split(", ")
    assert [one.startswith(step) for one, step in zip(told, steps, strict=True)] == [True] * len(steps), line


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("rtx-4090-24gb", "cuda:0 in int8, all 57 blocks stay"),
        ("rtx-3060-12gb", "cuda:0 in int8, streamed from pinned RAM, 55 blocks stay"),
    ],
)
def test_a_row_says_that_blocks_are_streamed_only_where_some_are(name, way):
    assert what_if.row(name, FLUX, PLUGINS).startswith(f"| {name} | {way} | ")


def test_what_is_refused_is_shown_with_need_and_have_and_a_size_that_fits(monkeypatch):
    small = changed(known_machine("rtx-3050-laptop-4gb-windows"), Changes(vram_bytes=3_900_000_000))
    monkeypatch.setattr(what_if, "known_machine", lambda _name: small)
    refused = "\n".join(what_if.section("small", FLUX, PLUGINS))
    assert "**Refused**" in refused
    assert re.search(r"needs 2\.\d+ GB of device memory and may use 2\.\d+ GB", refused)
    assert re.search(r"At \d+x\d+ it would run on cuda:0", refused)


@pytest.mark.parametrize(
    ("name", "part", "tail"),
    [
        ("rtx-4060-laptop-8gb-windows", "disk", "over a link of 13.5 GB/s (PCIe 4 x8)"),
        ("rtx-3060-12gb-low-ram", "disk", "over a link of 27 GB/s (PCIe 4 x16)"),
        ("rtx-4060-8gb", "link", "(PCIe 4 x8)"),
    ],
)
def test_copies_are_shown_at_the_rate_of_the_slowest_part_of_their_way(name, part, tail):
    made = plan(name)
    (line,) = [line for line in what_if.section(name, FLUX, PLUGINS) if "streamed a step /" in line]
    told = made.predicted
    seconds = told.streamed_bytes / (told.copy_gb_per_s * GB)
    assert line.startswith(f"- {part}: ")
    assert f" {told.copy_gb_per_s:.3g} GB/s" in line
    assert f"{tail} = {format_seconds(seconds)}; " in line
    # Neither copies nor arithmetic can take longer than the step that waits for both.
    assert seconds <= told.seconds_per_step * 1.001
