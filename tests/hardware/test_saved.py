"""Probes of other machines, read from files."""

from __future__ import annotations

import json

import pytest

from autoflux.errors import DamagedFile
from autoflux.hardware.known import known_machine, known_names
from autoflux.hardware.saved import impossible, read_hardware
from autoflux.planning.planner import make_plan
from autoflux.planning.values import Wishes
from tests.conftest import card
from tests.planning.test_planner import FLUX, PROFILES


def test_a_probe_is_read_with_its_envelope_and_without(machine):
    hardware = machine(card(24))
    envelope = {"schema": 1, "ok": True, "data": hardware.to_data(), "error": None}
    assert read_hardware(hardware.to_json(), "x") == read_hardware(json.dumps(envelope), "x") == hardware


def test_no_memory_left_is_a_figure_like_any_other():
    hardware = known_machine("rtx-3060-12gb")
    full = hardware.accelerators[0].usable_bytes.replace(value=0)
    busy = hardware.replace(accelerators=(hardware.accelerators[0].replace(usable_bytes=full),))
    assert read_hardware(busy.to_json(), "x") == busy


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("host", "total_bytes"), -1, "host.total_bytes is -1"),
        (("host", "total_bytes"), 10**30, r"host.total_bytes is 1e\+30"),
        (("host", "available_bytes"), 35 * 10**9, "host.available_bytes is 35.0 GB of 34.4 GB"),
        (("accelerators", 0, "usable_bytes"), 13 * 10**9, r"accelerators\[0\].usable_bytes is 13.0 GB of 12.9 GB"),
        (("disk", "read_gb_per_s"), 1e-300, "disk.read_gb_per_s is 1e-300"),
        (("disk", "read_gb_per_s"), 0.0, "disk.read_gb_per_s is 0"),
        (("accelerators", 0, "matmul_tflops", "bfloat16"), -3.0, r"accelerators\[0\].matmul_tflops.bfloat16 is -3"),
        (
            ("accelerators", 0, "link", "transfers", 1, "to_device_gb_per_s"),
            0,
            r"transfers\[1\].to_device_gb_per_s is 0",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_key(path, value, words):
    data = known_machine("rtx-3060-12gb").to_data()
    figure = data
    for key in path:
        figure = figure[key]
    figure["value"] = value
    with pytest.raises(DamagedFile, match=words):
        read_hardware(json.dumps(data), "'box.json'")


@pytest.mark.parametrize("cores", [0, -4])
def test_a_machine_without_processors_cannot_be(cores):
    was = known_machine("rtx-3060-12gb")
    with pytest.raises(DamagedFile, match=f"host.cores is {cores}"):
        read_hardware(was.replace(host=was.host.replace(cores=cores)).to_json(), "'box.json'")


@pytest.mark.parametrize("capability", ["8.9a", "8", "", "8.9.0", "٨.٩"])
def test_a_capability_that_cannot_be_compared_is_refused_by_key(capability):
    was = known_machine("rtx-3060-12gb")
    odd = was.replace(accelerators=(was.accelerators[0].replace(capability=capability),))
    with pytest.raises(DamagedFile, match=rf"accelerators\[0\].capability is '{capability}'; allowed: .*'8.9'"):
        read_hardware(odd.to_json(), "'box.json'")


@pytest.mark.parametrize("text", ["{}", "[]", '{"fingerprint": "x"}'])
def test_what_lacks_figures_is_not_to_be_deleted(text):
    with pytest.raises(DamagedFile, match=r"^'box\.json' cannot be read as Hardware") as caught:
        read_hardware(text, "'box.json'")
    assert caught.value.hint.startswith("give what `autoflux probe --json` wrote")


def test_no_known_machine_is_taken_for_impossible():
    for name in known_names():
        assert not impossible(known_machine(name)), name


def test_a_plan_is_no_machine_of_another_version(machine):
    made = make_plan(machine(card(48)), FLUX, PROFILES, Wishes(), ("diffusers",))
    with pytest.raises(
        DamagedFile, match=r"cannot be read as Hardware: it is something else, with .*backend"
    ) as caught:
        read_hardware(made.to_json(), "'plan.json'")
    assert caught.value.hint == "give what `autoflux probe --json` wrote"
