"""Wishes that programs make are read as those of commands are."""

from __future__ import annotations

from pathlib import Path

import pytest

import autoflux
from autoflux.api import plan_for
from autoflux.errors import ContradictoryWishes, UsageError
from autoflux.hardware.known import known_machine
from autoflux.planning.terms import Offload, Quality
from autoflux.planning.values import Wishes
from autoflux.planning.wishing import check_alone, checked
from autoflux.plugin_manager import load_plugins
from autoflux.testing import fake_plan
from tests.planning.test_streaming import FLUX


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"quality": "EXACT"}, "$.quality"),
        ({"unit": "bogus"}, "$.unit"),
        ({"precision": "int7"}, "$.precision"),
        ({"vram_bytes": 0}, "$.vram_bytes"),
        ({"ram_bytes": "4GB"}, "$.ram_bytes"),
        ({"batch": -1}, "$.batch"),
        ({"batch": 65}, "$.batch"),
        ({"pictures": 0}, "$.pictures"),
        ({"block_bytes": -1}, "$.block_bytes"),
        ({"graphs": "no"}, "$.graphs"),
        ({"keep": "vae"}, "$.keep"),
        ({"device": Path("cuda")}, "Path"),
    ],
)
def test_what_is_no_wish_is_refused_by_name(wish, words):
    with pytest.raises(UsageError) as refused:
        plan_for(FLUX, Wishes(**wish), load_plugins(), known_machine("rtx-4060-8gb"))
    assert words in refused.value.message


def test_words_stand_for_their_terms():
    said = Wishes(quality="exact", offload="stream", precision="bfloat16", keep=["vae"])
    meant = Wishes(quality=Quality.EXACT, offload=Offload.STREAM, precision=autoflux.Precision.BFLOAT16, keep=("vae",))
    assert checked(said) == meant
    assert checked(meant) == meant


def test_a_plan_leaves_no_room_for_wishes():
    with pytest.raises(ContradictoryWishes, match="holds all choices"):
        autoflux.load("sample", plan=fake_plan(), wishes=Wishes(device="cuda"))
    check_alone(fake_plan(), Wishes())
    check_alone(None, Wishes(device="cuda"))
