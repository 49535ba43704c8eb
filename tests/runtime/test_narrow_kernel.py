"""The kernel that narrows rows: interpreted here, where there is no card, and compiled for cards that are not here.

Triton's interpreter rounds to e4m3fn in a way of its own, so what the kernel divides is looked at in float32, and torch
rounds it.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.triton_scripts import run

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="there is no Triton for this system")

COMPARE = """
import torch
from autoflux.runtime.narrow_kernel import LARGEST_ROW, narrow_rows
from autoflux.runtime.quantized import LARGEST, SMALLEST_SCALE, _narrowed

generator = torch.Generator().manual_seed(0)
shapes = [(5, 64), (3, 100), (7, 1), (4, 3072), (2, 15360), (1, LARGEST_ROW)]
for rows, columns in shapes:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        apart = torch.randn(rows, columns + 16, generator=generator).to(dtype)[:, :columns]
        apart[0], apart[-1, 0] = 0, 1000
        for narrow in LARGEST:
            expected, scale = _narrowed(apart, narrow)
            kept = narrow if narrow == torch.int8 else torch.float32
            found, found_scale = narrow_rows(apart, kept, LARGEST[narrow], SMALLEST_SCALE)
            assert found.shape == apart.shape and found.dtype == kept
            assert torch.equal(found_scale, scale), (apart.shape, dtype, narrow)
            found, expected = found.to(narrow).float(), expected.float()
            other = found != expected
            # Only numbers halfway between two may go to the other side, by the last bit of the quotient.
            quotient = apart.float() / scale
            halfway = (quotient - (found + expected) / 2).abs() <= 2**-21 * quotient.abs()
            assert (~other | halfway).all(), (apart.shape, dtype, narrow)
            assert other.float().mean() < 0.05
lost = torch.ones(2, 64)
lost[0, 3] = float("nan")
for narrow in LARGEST:
    _, scale = narrow_rows(lost, narrow, LARGEST[narrow], SMALLEST_SCALE)
    assert scale[0].isnan() and scale[1] == 1 / LARGEST[narrow]
"""

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from autoflux.runtime import narrow_kernel

kernel = narrow_kernel._narrow_row
types = ["*bf16", sys.argv[2], "*fp32", "i32", "i32", "constexpr", "constexpr", "constexpr"]
constants = {"LARGEST": 448.0, "SMALLEST_SCALE": 2.0**-126, "BLOCK": 16384}
source = ASTSource(fn=kernel, signature=dict(zip(kernel.arg_names, types, strict=True)), constexprs=constants)
made = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_warps": 16}).asm["ptx"]
assert ".f64" not in made, "float64 is slow everywhere"
assert ".local" not in made, "a row does not fit the registers"
"""


def test_rows_are_what_torch_makes_of_them(tmp_path):
    run(COMPARE, folder=tmp_path, interpreted=True)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_it_compiles_for_every_card_that_multiplies_the_format(tmp_path, capability):
    for narrow in ("*i8", "*fp8e4nv") if capability >= 89 else ("*i8",):
        run(COMPILE, str(capability), narrow, folder=tmp_path, interpreted=False)
