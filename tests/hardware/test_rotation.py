"""Rotary positions: the bits of the libraries, and a kernel that is interpreted here, where there is no card.

Triton's interpreter rounds to bfloat16 towards zero, which cards do not.
"""

from __future__ import annotations

from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch

from autoflux.hardware import kernels as hardware_kernels
from autoflux.hardware.rotation import rotate, rotates
from tests.triton_scripts import run

WIDE = (torch.bfloat16, torch.float16, torch.float32)

COMPARE = """
import torch
from autoflux.hardware.rotation_kernel import rotate_pairs
from tests.hardware.test_rotation import rotated

generator = torch.Generator().manual_seed(0)
for shape in ((2, 5, 3, 16), (1, 3, 24, 128), (2, 2, 40, 128), (1, 1, 1, 2)):
    angles = torch.rand(shape[1], shape[3], generator=generator) * 7
    cosine, sine = angles.cos()[:, ::2], angles[:, : shape[3] // 2].sin()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.randn(shape, generator=generator).to(dtype)
        padded = torch.cat([x, x], dim=2)[:, :, : shape[2]]
        for laid_out in (x, x.transpose(1, 2).contiguous().transpose(1, 2), padded):
            found = rotate_pairs(laid_out, cosine, sine)
            expected = rotated(laid_out.float(), cosine, sine)
            if dtype == torch.bfloat16:
                expected = (expected.view(torch.int32) & -65536).view(torch.float32)
            assert found.dtype == dtype and torch.equal(found, expected.to(dtype)), (shape, dtype, laid_out.stride())
"""

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from autoflux.hardware import rotation_kernel

kernel = rotation_kernel._rotate_token
types = ["*bf16", "*bf16", "*fp32", "*fp32", *["i32"] * 11, "constexpr", "constexpr"]
signature = dict(zip(kernel.arg_names, types, strict=True))
source = ASTSource(fn=kernel, signature=signature, constexprs={"HALF": 64, "BLOCK": 2048})
options = {"num_warps": 4, "enable_fp_fusion": False}
made = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options).asm["ptx"]
assert "fma.rn.f32" not in made, "a rounding is left out"
assert ".f64" not in made, "float64 is slow everywhere"
assert ".local" not in made, "it does not fit the registers"
"""


needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="there is no Triton for this system")


@needs_triton
def test_the_kernel_turns_pairs_as_torch_does(tmp_path):
    run(COMPARE, folder=tmp_path, interpreted=True)


@needs_triton
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_it_compiles_for_every_card_and_leaves_out_no_rounding(tmp_path, capability):
    run(COMPILE, str(capability), folder=tmp_path, interpreted=False)


def rotated(x, cosine, sine):
    """As diffusers computes it."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    pairs = even * cosine[:, None] - odd * sine[:, None], odd * cosine[:, None] + even * sine[:, None]
    return torch.stack(pairs, dim=-1).flatten(-2).to(x.dtype)


@pytest.mark.parametrize("dtype", WIDE)
def test_what_the_kernel_is_held_to_has_the_bits_of_diffusers(dtype):
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 37, 3, 16, generator=generator).to(dtype)
    angles = torch.rand(37, 8, generator=generator).repeat_interleave(2, dim=1) * 7
    cosine, sine = angles.cos(), angles.sin()
    wanted = embeddings.apply_rotary_emb(x, (cosine, sine), sequence_dim=1)
    assert torch.equal(rotated(x, cosine[:, ::2], sine[:, ::2]), wanted)


def test_a_processor_has_no_kernel():
    assert not rotates(torch.ones(1, 2, 3, 4))


class FailingTrial:
    @staticmethod
    def write_one(_to):
        raise RuntimeError("Failed to find C compiler")


def test_where_no_kernel_runs_torch_does_without_and_says_so_once(monkeypatch, caplog):
    device = torch.device("cpu")
    monkeypatch.setattr(hardware_kernels, "_RUNS_KERNELS", {})
    monkeypatch.setattr(hardware_kernels, "kernels", lambda _name: FailingTrial)
    monkeypatch.setattr(hardware_kernels, "launching_on", lambda _device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    assert [hardware_kernels.runs_kernels(device) for _ in range(2)] == [False, False]
    (told,) = caplog.records
    assert "Failed to find C compiler" in told.getMessage()


def test_a_triton_that_cannot_be_imported_is_no_error(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(hardware_kernels, "find_spec", lambda _name: object())
    assert hardware_kernels.kernels("autoflux.hardware.no_such_kernel") is None
    assert "no_such_kernel" in caplog.text


@needs_triton
def test_the_kernel_that_is_tried_runs(tmp_path):
    script = (
        "import torch; from autoflux.hardware.trial_kernel import write_one; write_one(x := torch.zeros(1)); assert x"
    )
    run(script, folder=tmp_path, interpreted=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", WIDE)
def test_on_a_card_bits_are_those_of_torch(dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    angles = torch.rand(4608, 64, generator=generator, device="cuda") * 7
    cosine, sine = angles.cos(), angles.sin()
    for batch, heads in ((1, 24), (4, 24), (2, 3)):
        x = torch.randn(batch, 4608, heads, 128, generator=generator, device="cuda").mul_(3).to(dtype)
        for laid_out in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
            assert rotates(laid_out)
            assert torch.equal(rotate(laid_out, cosine, sine), rotated(laid_out, cosine, sine))
