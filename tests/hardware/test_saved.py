"""Probes of other machines, read from files."""

from __future__ import annotations

import json

import pytest

from autoflux.errors import DamagedFile
from autoflux.hardware.known import known_machine
from autoflux.hardware.saved import read_hardware
from tests.conftest import card


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
