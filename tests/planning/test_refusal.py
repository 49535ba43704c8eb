"""What is suggested where nothing fits is planned here again, and fits."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from autoflux.api import WhatIf, prepare
from autoflux.errors import DoesNotFit
from autoflux.hardware.changes import Changes, changed
from autoflux.hardware.known import known_machine
from autoflux.planning.candidates import Candidate
from autoflux.planning.planner import make_plan, ways
from autoflux.planning.refusal import Asked
from autoflux.planning.terms import Offload, Quality
from autoflux.planning.values import Plan, Wishes
from autoflux.plugin_manager import load_plugins
from autoflux.units import parse_bytes
from tests.conftest import GB, card, size
from tests.planning.test_planner import PROFILES
from tests.planning.test_streaming import FLUX

TAKES = {"--vram": "vram_bytes", "--ram": "ram_bytes", "--batch": "batch"}
UNWISHED = {
    "--offload": {"offload": None},
    "--keep": {"keep": ()},
    "--vram": {"vram_bytes": None},
    "--ram": {"ram_bytes": None},
    "--quality": {"quality": None},
    "--no-compile": {"compiled": None},
}


def plan(hardware, wishes: Wishes) -> Plan:
    return make_plan(hardware, FLUX, PROFILES, wishes, ("diffusers",))


def refused(hardware, **wishes) -> DoesNotFit:
    with pytest.raises(DoesNotFit) as caught:
        plan(hardware, Wishes(**wishes))
    return caught.value


def followed(hint: str, wishes: Wishes) -> Wishes:
    """The wishes as the hint says."""
    made, _, dropped = hint.partition("without ")
    for option, name in re.findall(r"(--\S+)(?: (?!and|it|would)(\w+))?", dropped):
        unwished = {"keep": tuple(kept for kept in wishes.keep if kept != name)} if name else UNWISHED[option]
        wishes = wishes.replace(**unwished)
    for option, value in re.findall(r"(--\S+) ([\d.x]+(?:[kMGT]?B)?)", made):
        if option == "--size":
            width, height = map(int, value.split("x"))
            wishes = wishes.replace(width=width, height=height)
        else:
            number = int(value) if option == "--batch" else parse_bytes(value)
            wishes = wishes.replace(**{TAKES[option]: number})
    return wishes


CASES = {
    "device memory": ({"vram_bytes": 3 * GB // 2}, r"--vram \S+ would fit"),
    "less than the system takes": ({"vram_bytes": GB // 10}, r"--vram \S+ would fit"),
    "RAM": ({"ram_bytes": 2 * GB, "device": "cuda"}, r"--ram \S+ would fit"),
    "both": ({"vram_bytes": 3 * GB // 2, "ram_bytes": 2 * GB}, r"--ram \S+ and --vram \S+ would fit"),
    "a batch": ({"batch": 64}, r"--batch \d+ would fit"),
    "a strategy": ({"offload": Offload.COMPONENT, "keep": ("text_encoder_2",)}, "without --offload it would fit"),
    "a component": (
        {"keep": ("text_encoder_2",), "vram_bytes": 8 * GB, "quality": Quality.EXACT, "device": "cuda"},
        r"--vram \S+ would fit",
    ),
    "one of two components": (
        {"keep": ("transformer", "text_encoder_2"), "quality": Quality.EXACT},
        "without --keep transformer it would fit",
    ),
    "both ceilings and a batch": (
        {"vram_bytes": GB, "ram_bytes": GB, "batch": 16, "width": 2048, "height": 2048},
        r"--batch \d+ without --ram and --vram would fit",
    ),
    "a strategy and a ceiling": (
        {"offload": Offload.NONE, "vram_bytes": 3 * GB // 2},
        r"--vram \S+ without --offload would fit",
    ),
}


@pytest.mark.parametrize(("wishes", "words"), CASES.values(), ids=CASES)
def test_what_is_suggested_fits(machine, wishes, words):
    hardware = machine(card(12), ram_gb=32)
    hint = refused(hardware, **wishes).hint or ""
    assert re.fullmatch(words, hint)
    plan(hardware, followed(hint, Wishes(**wishes)))


def test_the_batch_that_is_suggested_is_the_largest(machine):
    hardware = machine(card(12), ram_gb=32)
    fits = followed(refused(hardware, batch=64).hint or "", Wishes()).batch
    assert fits < 64
    assert f"--batch {fits} would fit" == refused(hardware, batch=fits + 1).hint


def test_the_ceiling_that_is_suggested_is_hardly_more_than_is_needed(machine):
    hardware = machine(card(12), ram_gb=32)
    fits = followed(refused(hardware, vram_bytes=3 * GB // 2).hint or "", Wishes()).vram_bytes
    refused(hardware, vram_bytes=int(fits * 0.97))


def test_no_ceiling_is_suggested_above_what_the_machine_has(machine):
    for wishes in ({}, {"ram_bytes": 20 * GB}, {"ram_bytes": 40 * GB}):
        hint = refused(machine(ram_gb=25), **wishes).hint or ""
        (lacking,) = re.fullmatch(r"a machine with (\S+ GB) more RAM", hint).groups()
        plan(machine(ram_gb=25 + parse_bytes(lacking) / GB), Wishes())


@pytest.mark.parametrize("ram", ["8GB", "1GB"])
def test_what_another_machine_would_need_is_suggested_beyond_what_it_has(ram):
    asked = WhatIf("cpu-8-core-32gb", Changes(ram_bytes=parse_bytes(ram)))
    with pytest.raises(DoesNotFit) as caught:
        prepare("flux.1-dev", Wishes(), load_plugins(), what_if=asked)
    (suggested,) = re.fullmatch(r"--ram (\S+GB) would fit", caught.value.hint or "").groups()
    enough = parse_bytes(suggested)
    assert enough > parse_bytes("34GB")
    for total in (enough, enough * 97 // 100):
        what_if = WhatIf(asked.on, Changes(ram_bytes=total))
        if total == enough:
            prepare("flux.1-dev", Wishes(), load_plugins(), what_if=what_if)
        else:
            with pytest.raises(DoesNotFit):
                prepare("flux.1-dev", Wishes(), load_plugins(), what_if=what_if)


def test_a_chip_with_the_hosts_memory_lacks_ram():
    m2 = known_machine("m2-pro-32gb")
    hint = refused(m2, device="mps", keep=("transformer",), quality=Quality.EXACT).hint or ""
    (lacking,) = re.fullmatch(r"a machine with (\S+ GB) more RAM", hint).groups()
    enough = m2.host.total_bytes.value + parse_bytes(lacking)
    wishes = Wishes(device="mps", keep=("transformer",), quality=Quality.EXACT)
    plan(changed(m2, Changes(ram_bytes=enough)), wishes)
    with pytest.raises(DoesNotFit):
        plan(changed(m2, Changes(ram_bytes=enough * 97 // 100)), wishes)


def test_few_ways_are_judged_until_a_refusal_is_sure_of_its_hint(machine):
    hardware, wishes = machine(card(12), ram_gb=32), Wishes(vram_bytes=10**6, ram_bytes=10**6)
    judged = []

    def counted(wished: Wishes) -> Iterator[Candidate]:
        for way in ways(hardware, FLUX, PROFILES, wished):
            judged.append(way)
            yield way

    with pytest.raises(DoesNotFit, match="does not fit"):
        make_plan(hardware, FLUX, PROFILES, wishes, ("diffusers",), asked=Asked(wishes, counted, hardware))
    assert 0 < len(judged) <= 90


def test_what_others_have_taken_can_be_freed(machine):
    hardware = machine(ram_gb=64)
    busy = hardware.replace(host=hardware.host.replace(available_bytes=size(25 * GB)))
    assert re.fullmatch(r"free \S+ GB more RAM", refused(busy).hint or "")


def test_a_smaller_picture_is_suggested_where_that_is_enough():
    small = changed(known_machine("rtx-3050-laptop-4gb-windows"), Changes(vram_bytes=3_900_000_000))
    hint = refused(small, device="cuda", width=2048, height=1024).hint or ""
    assert re.fullmatch(r"--size \d+x\d+ would fit", hint)
    made = plan(small, followed(hint, Wishes(device="cuda"))).predicted.picture
    assert made.width == 2 * made.height < 2048


def test_need_and_have_are_told_of_each_kind_of_device(machine):
    said = refused(machine(card(12), card(12, index=1), ram_gb=16), offload=Offload.NONE).message
    assert re.search(r"on cuda:[01] with offload 'none', needs \S+ GB of device memory and may use 11\.7 GB", said)
    assert re.search(r"on cpu with offload 'none', needs \S+ GB of RAM and may use 16\.0 GB", said)
    assert said.count("with offload") == 2
