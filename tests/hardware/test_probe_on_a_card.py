"""The real measuring child on a real CUDA card: are the figures such as a card can have?"""

from __future__ import annotations

import pytest
import torch

from autoflux.hardware.probe import Surroundings, probe
from autoflux.hardware.values import Accelerator, Hardware, Link, Source

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

MIB = 2**20
SIZES = (MIB // 4, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Hardware:
    folder = tmp_path_factory.mktemp("models")
    return probe(models_path=folder, surroundings=Surroundings(cache=folder / "cache", sample_bytes=16 * MIB))


@pytest.fixture(scope="module")
def card(machine: Hardware) -> Accelerator:
    found = machine.accelerators[0]
    if found.free_bytes.value < 4 * 10**9:
        pytest.skip("others hold the card's memory")
    return found


@pytest.fixture(scope="module")
def link(card: Accelerator) -> Link:
    if card.link is None:
        pytest.skip("a chip with the host's memory")
    return card.link


def test_nothing_failed(machine: Hardware, card: Accelerator):
    assert [problem for problem in machine.problems if problem.subject != "nvml"] == []
    assert Hardware.from_json(machine.to_json()) == machine


def test_every_size_was_copied_both_ways(link: Link):
    for pinned in (True, False):
        assert tuple(t.block_bytes for t in link.transfers if t.pinned == pinned) == SIZES
    for size in SIZES:
        for to_device in (True, False):
            pinned = link.gb_per_s(size, to_device=to_device)
            pageable = link.gb_per_s(size, pinned=False, to_device=to_device)
            assert pinned is not None
            assert pageable is not None
            assert 0.1 < pageable.value <= 1.1 * pinned.value < 1000


def test_large_copies_are_the_faster_ones(link: Link):
    rates = [figure.value for size in SIZES if (figure := link.gb_per_s(size))]
    assert rates[0] < rates[-1]
    assert rates[-1] > 0.8 * max(rates)


def test_pinning_costs_less_than_a_copy_on_the_slowest_link(link: Link):
    assert link.pin_seconds_per_gb is not None
    assert 0.001 < link.pin_seconds_per_gb.value < 5


def test_narrower_formats_are_not_slower(card: Accelerator):
    rates = {name: figure.value for name, figure in card.matmul_tflops.items()}
    capability = tuple(int(part) for part in (card.capability or "0.0").split("."))
    assert rates["float16"] > rates["float32"]
    if capability >= (8, 0):
        assert rates["bfloat16"] == pytest.approx(rates["float16"], rel=0.3)
    if capability >= (9, 0):
        assert 1.2 < rates["float8_e4m3fn"] / rates["bfloat16"] < 2.2
    assert ("int8" in rates) == (capability >= (7, 5))
    assert all(1 < rate < 10_000 for rate in rates.values())


def test_attention_is_no_faster_than_products(card: Accelerator):
    assert card.attention_tflops.keys() >= {"default"}
    fastest = max(card.matmul_tflops[name].value for name in ("bfloat16", "float16"))
    for rate in card.attention_tflops.values():
        assert 0.02 * fastest < rate.value < 1.1 * fastest


def test_blocks_take_what_their_parts_do_and_something_beside(card: Accelerator):
    attention = max(rate.value for rate in card.attention_tflops.values())
    for kind in ("double", "single"):
        timing = card.blocks[kind]
        seconds = card.block_seconds(kind, image_tokens=timing.image_tokens, text_tokens=timing.text_tokens)
        assert seconds is not None
        assert seconds.source == Source.MEASURED
        tokens = timing.image_tokens + timing.text_tokens
        products = 24 * 3072**2 * tokens / card.matmul_tflops[timing.precision].value
        least = (products + 4 * 3072 * tokens**2 / attention) / 1e12
        assert 0.8 * least < seconds.value < 6 * least


def test_measuring_leaves_the_cards_memory(card: Accelerator):
    free, _ = torch.cuda.mem_get_info(0)
    assert free > 0.8 * card.free_bytes.value
