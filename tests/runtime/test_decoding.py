"""Decoding in less of a card's memory."""

import copy

import pytest
import torch
from diffusers.models.autoencoders.vae import Decoder
from torch import nn

from autoflux.runtime import decoding
from autoflux.units import MIB


@pytest.fixture
def decoder() -> Decoder:
    torch.manual_seed(0)
    up = ("UpDecoderBlock2D",) * 3
    return Decoder(4, 3, up, block_out_channels=(32, 32, 64), layers_per_block=1, norm_num_groups=8).eval()


@pytest.fixture
def everywhere(monkeypatch):
    """As if every tensor lay on a card."""
    monkeypatch.setattr(decoding, "_is_spared", lambda _: True)


def layouts(decoder: nn.Module, x: torch.Tensor) -> list[bool]:
    """Of each convolution in turn, whether its input has its channels side by side."""
    seen: list[bool] = []

    def look(_: nn.Module, inputs: tuple[torch.Tensor], __: torch.Tensor) -> None:
        seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))

    for module in decoder.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(look)
    with torch.inference_mode():
        decoder(x)
    return seen


@pytest.mark.usefixtures("everywhere")
def test_convolutions_are_given_channels_side_by_side(decoder):
    decoding.spare_memory(decoder)
    seen = layouts(decoder, torch.randn(1, 4, 8, 8))
    assert len(seen) > 10
    assert all(seen)


@pytest.mark.usefixtures("everywhere")
def test_the_picture_is_the_same(decoder):
    spared, x = copy.deepcopy(decoder), torch.randn(1, 4, 8, 8)
    decoding.spare_memory(spared)
    with torch.inference_mode():
        torch.testing.assert_close(spared(x), decoder(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_processor_decodes_as_before(decoder, dtype):
    decoding.spare_memory(decoder)
    assert not all(layouts(decoder.to(dtype), torch.randn(1, 4, 8, 8, dtype=dtype)))


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(("side", "levels"), [(16, 1), (32, 2), (4, 0)])
def test_memory_is_given_back_before_each_large_level(decoder, monkeypatch, side, levels):
    given: list[int] = []
    monkeypatch.setattr(decoding, "give_back_unused", lambda: given.append(1))
    # The last level is (4 x side)^2 of 32 channels in float32, the one before (2 x side)^2 of 64, half as much.
    monkeypatch.setattr(decoding, "LARGE_BYTES", (4 * 16) ** 2 * 32 * 4 - 1)
    decoding.spare_memory(decoder)
    with torch.inference_mode():
        for picture in range(1, 3):
            decoder(torch.randn(1, 4, side, side))
            assert len(given) == picture * levels


@pytest.mark.gpu
def test_on_a_card_it_takes_less_memory_for_the_same_bits():
    torch.manual_seed(0)
    up = ("UpDecoderBlock2D",) * 3
    decoder = Decoder(16, 3, up, block_out_channels=(128, 256, 256), layers_per_block=2).to("cuda", torch.bfloat16)
    latents = torch.randn(1, 16, 256, 256, device="cuda", dtype=torch.bfloat16)
    pictures, taken = [], []
    for spared in (False, True):
        if spared:
            decoding.spare_memory(decoder)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with torch.inference_mode():
            pictures.append(decoder(latents))
        taken.append(torch.cuda.max_memory_reserved())
    assert torch.equal(*pictures)
    assert taken[1] < taken[0] - 512 * MIB
