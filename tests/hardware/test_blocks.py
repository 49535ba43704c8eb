"""Blocks of FLUX's shape compute what diffusers' blocks do, and are timed."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn

from autoflux.hardware import blocks
from autoflux.hardware.blocks import DoubleBlock, SingleBlock, Tokens
from autoflux.hardware.device import Device, Findings
from autoflux.hardware.values import DeviceKind, block_operations

HIDDEN = 256
IMAGE, TEXT = 12, 5
CPU = Device(torch, DeviceKind.CPU)

HEADS = {"query": "to_q", "key": "to_k", "value": "to_v", "query_norm": "norm_q", "key_norm": "norm_k"}
TEXT_HEADS = {
    "query": "add_q_proj",
    "key": "add_k_proj",
    "value": "add_v_proj",
    "query_norm": "norm_added_q",
    "key_norm": "norm_added_k",
}
DOUBLE = {
    **{f"image.heads.{ours}": f"attn.{theirs}" for ours, theirs in HEADS.items()},
    **{f"text.heads.{ours}": f"attn.{theirs}" for ours, theirs in TEXT_HEADS.items()},
    "image.out": "attn.to_out.0",
    "text.out": "attn.to_add_out",
    "image.widen": "ff.net.0.proj",
    "image.narrow": "ff.net.2",
    "text.widen": "ff_context.net.0.proj",
    "text.narrow": "ff_context.net.2",
}
SINGLE = {
    **{f"heads.{ours}": f"attn.{theirs}" for ours, theirs in HEADS.items()},
    "widen": "proj_mlp",
    "out": "proj_out",
}


def take_weights(ours: nn.Module, theirs: nn.Module, names: dict[str, str]) -> None:
    ours.load_state_dict(
        {
            f"{our}.{key}": value
            for our, their in names.items()
            for key, value in theirs.get_submodule(their).state_dict().items()
        }
    )


def given() -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    angles = torch.rand(TEXT + IMAGE, 64).repeat_interleave(2, dim=1) * 6
    image, text = torch.randn(1, IMAGE, HIDDEN), torch.randn(1, TEXT, HIDDEN)
    return image, text, torch.randn(1, HIDDEN), (angles.cos(), angles.sin())


def modulation(norm: nn.Module, condition: Tensor, count: int) -> list[Tensor]:
    return list(norm.linear(norm.silu(condition))[:, None].chunk(count, dim=-1))


@torch.inference_mode()
def test_a_double_block_is_diffusers():
    image, text, condition, rotation = given()
    theirs = FluxTransformerBlock(HIDDEN, HIDDEN // 128, 128)
    ours = DoubleBlock(HIDDEN)
    take_weights(ours, theirs, DOUBLE)
    text_expected, image_expected = theirs(image, text, condition, rotation)
    modulations = [modulation(norm, condition, 6) for norm in (theirs.norm1, theirs.norm1_context)]
    image_found, text_found = ours(image, text, modulations, rotation)
    assert torch.equal(image_found, image_expected)
    assert torch.equal(text_found, text_expected)


@torch.inference_mode()
def test_a_single_block_is_diffusers():
    image, text, condition, rotation = given()
    theirs = FluxSingleTransformerBlock(HIDDEN, HIDDEN // 128, 128)
    ours = SingleBlock(HIDDEN)
    take_weights(ours, theirs, SINGLE)
    text_expected, image_expected = theirs(image, text, condition, rotation)
    image_found, text_found = ours(image, text, [modulation(theirs.norm, condition, 3)], rotation)
    assert torch.equal(image_found, image_expected)
    assert torch.equal(text_found, text_expected)


@pytest.mark.parametrize(("block", "weights"), [(DoubleBlock, 24), (SingleBlock, 12)])
def test_at_full_size_they_have_flux_weights(block: type[nn.Module], weights: int):
    with torch.device("meta"):
        made = block(3072)
    matrices = sum(parameter.numel() for parameter in made.parameters() if parameter.ndim == 2)
    assert matrices == weights * 3072**2
    # A token meets 12 h² of them, in a double block only its own side's.
    assert block_operations(3072, 4608) == 2 * 12 * 3072**2 * 4608 + 4 * 3072 * 4608**2


def test_both_kinds_are_timed():
    findings = Findings()
    sizes = (Tokens(8, 4, HIDDEN), Tokens(16, 8, HIDDEN))
    found = blocks.timings(CPU, "float32", sizes, findings)
    assert findings.errors == []
    assert set(found) == {"double", "single"}
    for timing in found.values():
        assert timing.seconds.value > 0
        assert (timing.image_tokens, timing.text_tokens, timing.hidden_size) == (16, 8, HIDDEN)


def test_a_block_that_cannot_be_made_is_said():
    findings = Findings()
    assert blocks.timings(CPU, "float32", (Tokens(8, 4, -128),), findings) == {}
    assert [error.partition(":")[0] for error in findings.errors] == ["a double block", "a single block"]
