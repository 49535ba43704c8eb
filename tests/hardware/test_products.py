from __future__ import annotations

import pytest
import torch

from autoflux.hardware import products
from autoflux.hardware.device import Device, Findings
from autoflux.hardware.products import ATTENTIONS, DEVICE_PRODUCTS, Attention, Product
from autoflux.hardware.values import DeviceKind

CPU = Device(torch, DeviceKind.CPU)
SMALL = (Product(32, 16, 64), Product(64, 32, 128))


def test_the_largest_sizes_are_those_of_flux_at_1024():
    widest = DEVICE_PRODUCTS[-1]
    assert (widest.rows, widest.inner, widest.columns) == (4608, 3072, 12288)
    assert ATTENTIONS[-1].operations == 4 * 3072 * 4608**2
    sizes = [size for product in DEVICE_PRODUCTS for size in (product.rows, product.inner, product.columns)]
    assert all(size % 16 == 0 for size in sizes)  # what `torch._scaled_mm` asks for


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_products(precision: str):
    findings = Findings()
    rates = products.matmul_rates(CPU, [precision], SMALL, findings)
    assert findings.errors == []
    assert rates[precision].value > 0
    assert rates[precision].note == "64 x 32 -> 128"


def test_a_product_that_the_device_has_not_leaves_the_others():
    findings = Findings()
    rates = products.matmul_rates(CPU, ["float32", "no_such", "bfloat16"], SMALL, findings)
    assert set(rates) == {"float32", "bfloat16"}
    (error,) = findings.errors
    assert error.startswith("arithmetic in no_such: ")


def test_products_in_one_byte_multiply_what_they_are_given():
    product = Product(32, 16, 64)
    call = products._product_int8(torch, "cpu", product)
    assert call().shape == (32, 64)
    left, right = products._random(torch, "cpu", product, torch.float8_e4m3fn)
    assert left.dtype == right.dtype == torch.float8_e4m3fn
    assert left.float().std() > 0.5


def test_attention():
    findings = Findings()
    rates = products.attention_rates(CPU, "float32", (Attention(8, 2), Attention(16, 2)), findings, cudnn=False)
    assert findings.errors == []
    assert set(rates) == {"default"}
    assert rates["default"].value > 0
    assert rates["default"].note == "2 heads x 128, 16 tokens, float32"


def test_one_way_of_attention_that_is_not_there_leaves_the_other():
    findings = Findings()
    rates = products.attention_rates(CPU, "bfloat16", (Attention(8, 2),), findings, cudnn=True)
    assert "default" in rates
    # The processor has no cuDNN, and torch confined to it may refuse or warn and compute otherwise.
    assert len(rates) + len(findings.errors) == 2


def test_nothing_is_asked_of_a_device_without_room():
    findings = Findings()
    assert products.matmul_rates(CPU, ["float32"], (), findings) == {}
    assert products.attention_rates(CPU, "float32", (), findings, cudnn=True) == {}
    assert findings.errors == []
