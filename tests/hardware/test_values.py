from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoflux.errors import DamagedFile
from autoflux.hardware.saved import read_hardware
from autoflux.hardware.values import (
    SCHEMA,
    BlockTiming,
    Hardware,
    Link,
    Source,
    Transfer,
    block_operations,
)
from tests.conftest import card, figure

MIB = 2**20

CURVE = {MIB // 4: 12.6, MIB: 47.2, 4 * MIB: 49.5, 16 * MIB: 50.3, 64 * MIB: 53.6, 256 * MIB: 54.9}
"""One H200, pinned, to the device."""


def link(rates: dict[int, float], *, pinned: bool = True, source: Source = Source.MEASURED) -> Link:
    return Link(
        transfers=tuple(
            Transfer(
                block_bytes=size,
                pinned=pinned,
                to_device_gb_per_s=figure(rate, source),
                to_host_gb_per_s=figure(rate / 2, source),
            )
            for size, rate in rates.items()
        )
    )


sizes = st.integers(1, 2**40)
curves = st.dictionaries(sizes, st.floats(1e-3, 1e3), min_size=1, max_size=8)


@given(curves)
def test_at_a_measured_size_it_is_what_was_measured(rates: dict[int, float]):
    for size, rate in rates.items():
        assert link(rates).gb_per_s(size) == figure(rate)
        assert link(rates).gb_per_s(size, to_device=False) == figure(rate / 2)


@given(curves, sizes)
def test_it_is_never_beyond_its_neighbours(rates: dict[int, float], size: int):
    found = link(rates).gb_per_s(size)
    assert found is not None
    below = [s for s in rates if s <= size]
    above = [s for s in rates if s >= size]
    neighbours = [rates[s] for s in ((max(below),) if below else ()) + ((min(above),) if above else ())]
    assert min(neighbours) <= found.value <= max(neighbours)


@given(curves, sizes, sizes)
def test_where_larger_copies_were_faster_they_are_in_between(rates: dict[int, float], one: int, other: int):
    rising = dict(zip(sorted(rates), sorted(rates.values()), strict=True))
    low, high = (link(rising).gb_per_s(size) for size in sorted((one, other)))
    assert low is not None
    assert high is not None
    assert low.value <= high.value * (1 + 1e-9)


@given(st.dictionaries(sizes, st.floats(1e-9, 1e3), min_size=1, max_size=8), sizes, sizes)
def test_a_larger_copy_never_takes_less_time_unless_it_was_measured_to(seconds: dict[int, float], one: int, other: int):
    longer = dict(zip(sorted(seconds), sorted(seconds.values()), strict=True))
    curve = link({size: size / taken for size, taken in longer.items()})
    low, high = (size / rate.value for size in sorted((one, other)) if (rate := curve.gb_per_s(size)))
    assert low <= high * (1 + 1e-9)


@given(curves, sizes, st.floats(1.0, 4.0))
def test_a_faster_link_is_faster_at_every_size(rates: dict[int, float], size: int, factor: float):
    slow = link(rates).gb_per_s(size)
    fast = link({size: rate * factor for size, rate in rates.items()}).gb_per_s(size)
    assert slow is not None
    assert fast is not None
    assert fast.value >= slow.value * (1 - 1e-9)


def test_beyond_the_ends_it_is_theirs():
    curve = link(CURVE)
    assert curve.gb_per_s(1) == curve.gb_per_s(0) == figure(12.6)
    assert curve.gb_per_s(2**40) == figure(54.9)


def test_in_between_it_is_said_to_be():
    found = link(CURVE).gb_per_s(2 * MIB)
    assert found is not None
    assert found.value == pytest.approx(math.sqrt(47.2 * 49.5))
    assert "between" in found.note


def test_it_is_no_better_known_than_the_worse_of_both():
    assumed = link({4 * MIB: 10.0}, source=Source.ASSUMED).transfers
    mixed = Link(transfers=(*link({MIB: 5.0}).transfers, *assumed))
    found = mixed.gb_per_s(2 * MIB)
    assert found is not None
    assert found.source == Source.ASSUMED


def test_what_was_not_measured_is_none():
    assert Link().gb_per_s(MIB) is None
    assert link(CURVE, pinned=False).gb_per_s(MIB, pinned=True) is None
    assert link(CURVE, pinned=False).gb_per_s(MIB, pinned=False) == figure(47.2)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan])
def test_impossible_rates_in_a_file_are_not_reckoned_with(rate: float):
    assert link({MIB: rate}).gb_per_s(MIB) is None
    assert link({MIB: rate, 4 * MIB: 8.0}).gb_per_s(MIB) == figure(8.0)


TIMING = BlockTiming(seconds=figure(0.003), precision="bfloat16", hidden_size=3072, image_tokens=4096, text_tokens=512)


def test_a_block_at_the_size_it_was_timed_at():
    accelerator = card().replace(blocks={"double": TIMING})
    assert accelerator.block_seconds("double") == figure(0.003)
    assert accelerator.block_seconds("single") is None


@given(st.integers(1, 20_000), st.integers(0, 2000))
def test_a_block_at_another_size_is_scaled_by_operations(image: int, text: int):
    found = card().replace(blocks={"double": TIMING}).block_seconds("double", image_tokens=image, text_tokens=text)
    assert found is not None
    assert found.value == pytest.approx(0.003 * block_operations(3072, image + text) / TIMING.operations)
    assert (found.source == Source.MEASURED) == ((image, text) == (4096, 512))


def full(machine) -> Hardware:
    accelerator = card().replace(
        link=link(CURVE).replace(pin_seconds_per_gb=figure(0.2)),
        attention_tflops={"default": figure(400), "cudnn": figure(500)},
        blocks={"double": TIMING, "single": TIMING.replace(seconds=figure(0.0031))},
    )
    return machine(accelerator)


def envelope(**fields: object) -> str:
    return json.dumps({"schema": 1, "ok": True, "data": None, "error": None} | fields)


def test_the_new_figures_survive_json(machine):
    hardware = full(machine)
    assert Hardware.from_json(hardware.to_json()) == hardware
    assert read_hardware(hardware.to_json(), "x") == hardware
    assert read_hardware(envelope(data=hardware.to_data()), "x") == hardware


def test_figures_that_are_not_there_are_not_needed(machine):
    data = full(machine).to_data()
    (accelerator,) = data["accelerators"]
    for name in ("attention_tflops", "blocks"):
        del accelerator[name]
    del accelerator["link"]["pin_seconds_per_gb"]
    (found,) = Hardware.from_json(json.dumps(data)).accelerators
    assert found.attention_tflops == found.blocks == {}
    assert found.link is not None
    assert found.link.pin_seconds_per_gb is None


@pytest.mark.parametrize("schema", [SCHEMA - 1, SCHEMA + 1])
def test_a_probe_of_another_version_is_refused_before_its_fields(machine, schema: int):
    data = full(machine).to_data() | {"schema": schema, "new_field": 1}
    for text in (json.dumps(data), envelope(data=data)):
        with pytest.raises(
            DamagedFile, match=f"old.json is of version {schema} and .* reads version {SCHEMA}"
        ) as caught:
            read_hardware(text, "old.json")
        assert "make it anew" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not JSON"),
        ("[]", "cannot be read"),
        ("{}", "cannot be read"),
        (b"\xff\xfe", "is not JSON"),
        (envelope(), "cannot be read"),
        (envelope(data=7), "cannot be read"),
        (envelope(ok=False), "holds an error"),
        (json.dumps({"schema": "two"}), "cannot be read"),
    ],
)
def test_what_is_no_probe_is_refused(text: str | bytes, words: str):
    with pytest.raises(DamagedFile, match=words):
        read_hardware(text, "old.json")
