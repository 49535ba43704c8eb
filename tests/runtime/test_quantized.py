"""Layers with one byte a weight: how far from the wide ones they may be, and what they leave alone.

Where the bounds come from. Rounding to e4m3fn, with 4 significant bits, moves a number by 2^-4 of itself at most, and
one below the normal range by half the smallest step, 2^-10, times the scale. Rounding to int8 moves it by half a scale.
A scale is the largest of the row over 448 or 127. An output is a sum over `in` such errors, each times what it is
multiplied by; they are independent and as often up as down, so by Hoeffding's inequality the sum exceeds 7 times the
root of the sum of the largest squares once in 2 * 10^10 outputs, and the root mean square of many outputs cannot exceed
once that root. Beside that stands the arithmetic itself: three roundings to the format of the result and, for float32
sums, `in` of 2^-24.
"""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn

from autoflux.models.values import Precision
from autoflux.runtime import quantized
from autoflux.runtime.compiling import compile_blocks
from autoflux.runtime.quantized import QuantizedLinear, quantize_linears, supports_native

NARROW = [Precision.FLOAT8, Precision.INT8]
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}
"""Half a unit in the last of 8, 11 and 24 significant bits."""
HOEFFDING = 7
CPU = torch.device("cpu")


def linear_of(inside=64, outside=48, *, bias=True, dtype=torch.float32, seed=0) -> nn.Linear:
    """Weights like those of a trained layer: Gaussian, and rows of different size."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(inside, outside, bias=bias, dtype=dtype).requires_grad_(requires_grad=False)
    sizes = torch.logspace(-2, 0, outside)[:, None]
    linear.weight.copy_(torch.randn(outside, inside, generator=generator) * sizes)
    if bias:
        linear.bias.copy_(torch.randn(outside, generator=generator))
    return linear


def tokens(*shape: int, dtype=torch.float32, seed=1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def largest_rounding(rows: torch.Tensor, precision: Precision) -> torch.Tensor:
    """The most that narrowing can move each number of (rows, in), in float64."""
    largest = rows.abs().amax(-1, keepdim=True)
    if precision == Precision.INT8:
        return (largest / 127 / 2).expand_as(rows)
    return torch.maximum(rows.abs() * 2**-4, largest / 448 * 2**-10)


def assert_as_close_as_the_format(y, x, linear: nn.Linear, precision: Precision, *, native: bool, sums=2**-24):
    """`sums` is the share of the sum of absolute products that adding `in` of them loses each time."""
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], linear.out_features)
    unit = ROUNDING[x.dtype]
    y, x = (tensor.reshape(-1, tensor.shape[-1]).double().cpu() for tensor in (y, x))
    weight = linear.weight.double().cpu()
    bias = linear.bias.double().cpu() if linear.bias is not None else torch.zeros(1, dtype=torch.float64)
    in_weight = largest_rounding(weight, precision) + unit * weight.abs()
    in_x = largest_rounding(x, precision) if native else torch.zeros_like(x)
    spread = (x**2 @ (in_weight**2).T + in_x**2 @ (weight**2).T + in_x**2 @ (in_weight**2).T).sqrt()
    product = x @ weight.T
    arithmetic = 3 * unit * (product.abs() + spread + (product + bias).abs() + bias.abs())
    arithmetic += sums * x.shape[1] * (x.abs() @ weight.abs().T)
    error = (y - product - bias).abs()
    assert (error <= HOEFFDING * spread + arithmetic).all()
    assert error.norm() <= spread.norm() + arithmetic.norm()


@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (1,), (16,), (17,), (200,), (2, 33), (0,)])
def test_a_layer_is_as_close_to_the_wide_one_as_its_format_allows(precision, native, dtype, bias, shape):
    linear, x = linear_of(bias=bias, dtype=dtype), tokens(*shape, 64, dtype=dtype)
    y = QuantizedLinear.of(linear, precision, native=native)(x)
    is_native = native and x.numel() // 64 >= quantized.LEAST_NATIVE_ROWS
    assert_as_close_as_the_format(y, x, linear, precision, native=is_native)


@pytest.mark.parametrize("precision", NARROW)
def test_weights_are_rounded_once_and_use_the_whole_format(precision):
    linear = linear_of(256, 64)
    layer = QuantizedLinear.of(linear, precision, native=True)
    narrow, scale = layer.weight.double(), layer.scale.double()
    assert narrow.abs().amax(1).tolist() == [quantized.LARGEST[layer.weight.dtype]] * 64
    assert layer.scale.shape == (64, 1)
    wide = linear.weight.double()
    # A little more than the format: the division by the scale is in float32.
    assert ((narrow * scale - wide).abs() <= largest_rounding(wide, precision) * (1 + 2**-18)).all()
    assert [name for name, _ in layer.named_parameters()] == ["weight", "scale", "bias"]
    assert not list(layer.buffers())
    assert layer.bias is linear.bias


@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize("native", [True, False])
def test_what_the_format_holds_exactly_comes_out_exactly(precision, native):
    """Numbers of few bits, the largest of each row a power of two times the format's largest: no error is allowed."""
    largest = {Precision.FLOAT8: 448, Precision.INT8: 127}[precision]
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randint(-8, 9, (32, 64), generator=generator).float() for _ in range(2))
    weight[:, 5], x[:, 9] = largest, -largest
    linear = nn.Linear(64, 32, bias=False)
    linear.weight.data = weight / 1024
    y = QuantizedLinear.of(linear, precision, native=native)(x * 4)
    assert torch.equal(y, x @ weight.T / 256)


@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("native", [True, False])
def test_zeros_stay_zeros(precision, dtype, native):
    linear, x = linear_of(dtype=dtype), tokens(40, 64, dtype=dtype)
    linear.weight[7], x[3] = 0, 0
    y = QuantizedLinear.of(linear, precision, native=native)(x)
    assert torch.equal(y[:, 7], linear.bias[7].expand(40))
    assert torch.equal(y[3], linear.bias)
    assert y.isfinite().all()


@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("factor", [2.0**20, 2.0**-20])
def test_an_outlier_row_costs_the_other_rows_nothing(precision, native, factor):
    """A power of two only moves the exponents of its row, so that every bit can be told beforehand."""
    linear, x = linear_of(bias=False), tokens(40, 64)
    expected = QuantizedLinear.of(linear, precision, native=native)(x)
    linear.weight[7] *= factor
    x[3] *= factor
    expected[:, 7] *= factor
    expected[3] *= factor
    y = QuantizedLinear.of(linear, precision, native=native)(x)
    torch.testing.assert_close(y, expected, rtol=2**-20, atol=0)


@pytest.mark.parametrize("precision", NARROW)
def test_an_outlier_in_a_row_is_held_exactly_and_costs_what_the_format_says(precision):
    linear, x = linear_of(), tokens(40, 64)
    x[:, 11] = 1000.0
    y = QuantizedLinear.of(linear, precision, native=True)(x)
    assert_as_close_as_the_format(y, x, linear, precision, native=True)


def test_weights_in_float16_do_not_overflow():
    linear = linear_of(1024, 16, bias=False, dtype=torch.float16)
    linear.weight.fill_(0.25)
    x = torch.full((1, 1024), 8.0, dtype=torch.float16)
    y = QuantizedLinear.of(linear, Precision.FLOAT8, native=False)(x)
    assert torch.equal(y, torch.full_like(y, 2048.0))


@pytest.mark.parametrize("precision", NARROW)
def test_few_rows_are_not_narrowed(precision):
    native, widened = (QuantizedLinear.of(linear_of(), precision, native=native) for native in (True, False))
    x = tokens(17, 64)
    assert torch.equal(native(x[:16]), widened(x[:16]))
    assert not torch.equal(native(x), widened(x))


@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize("native", [True, False])
def test_rows_in_any_order_in_memory(precision, native):
    layer, x = QuantizedLinear.of(linear_of(), precision, native=native), tokens(40, 64)
    for strided in (x.t().contiguous().t(), torch.cat([x, x], dim=1)[:, :64]):
        assert not strided.is_contiguous()
        torch.testing.assert_close(layer(strided), layer(x))


@pytest.mark.parametrize("has_int8", [True, False])
def test_on_the_cpu_int8_is_the_same_with_and_without_its_instructions(monkeypatch, has_int8):
    monkeypatch.setattr(quantized, "_CPU_MULTIPLIES_INT8", has_int8)
    linear, x = linear_of(512), tokens(64, 512)
    x[:, :2] = 50.0  # large sums
    y = QuantizedLinear.of(linear, Precision.INT8, native=True)(x)
    assert_as_close_as_the_format(y, x, linear, Precision.INT8, native=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_the_cpu_float8_is_the_same_as_torchs_own_product(dtype):
    layer, x = QuantizedLinear.of(linear_of(dtype=dtype), Precision.FLOAT8, native=True), tokens(40, 64, dtype=dtype)
    narrow, x_scale = quantized._narrowed(x, torch.float8_e4m3fn)
    scales = {"scale_a": x_scale, "scale_b": layer.scale.t()}
    try:
        expected = torch._scaled_mm(narrow, layer.weight.t(), **scales, bias=layer.bias, out_dtype=dtype)
    except RuntimeError as error:
        pytest.skip(f"torch {torch.__version__} has none with scales by row: {error}")
    sums = 64 * 2**-24 * (x.abs().float() @ (layer.weight.float() * layer.scale).abs().t()).max().item()
    torch.testing.assert_close(layer(x), expected, rtol=2 * ROUNDING[dtype], atol=sums)


@pytest.mark.parametrize("precision", NARROW)
def test_a_weight_in_pieces_is_quantized_like_a_whole_one(monkeypatch, precision):
    whole = QuantizedLinear.of(linear_of(), precision, native=True)
    monkeypatch.setattr(quantized, "CHUNK_BYTES", 5 * 64 * 4)  # five rows; 48 are no multiple of it
    pieces = QuantizedLinear.of(linear_of(), precision, native=True, device=CPU)
    assert torch.equal(whole.weight.float(), pieces.weight.float())
    assert torch.equal(whole.scale, pieces.scale)


@pytest.fixture
def uncompiled():
    """Dynamo gives up on a function it has compiled eight ways, and all layers have the same `forward`."""
    torch._dynamo.reset()


@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("rows", [1, 40])
def test_it_compiles_as_one_graph(uncompiled, precision, native, rows):
    layer, x = QuantizedLinear.of(linear_of(), precision, native=native), tokens(2, rows, 64)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize("native", [True, False])
def test_weights_may_be_pointed_at_other_storage(precision, native):
    layer, x = QuantizedLinear.of(linear_of(), precision, native=native), tokens(40, 64)
    expected = layer(x)
    kept = [(parameter, parameter.data) for parameter in layer.parameters()]
    for parameter, data in kept:
        parameter.data = data.clone()
        data.copy_(torch.ones_like(data))  # who reads the old storage is found out
    assert torch.equal(layer(x), expected)


class Scaled(nn.Linear):
    """A layer that does more than its parent."""

    def forward(self, x):
        return 2 * super().forward(x)


def small_model() -> nn.Module:
    model = nn.Sequential(linear_of(64, 64), nn.GELU(), nn.Sequential(linear_of(64, 24), linear_of(24, 64)))
    model.append(Scaled(64, 64))
    model.append(linear_of(64, 32))
    return model.requires_grad_(requires_grad=False)


def kinds(model: nn.Module) -> dict[str, type]:
    return {
        name: type(layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear | QuantizedLinear)
    }


def test_linears_are_replaced_but_for_those_kept_of_odd_sizes_and_of_other_classes():
    model = small_model()
    quantize_linears(
        model, Precision.INT8, native=True, keep=lambda name, layer: name == "4" or layer.out_features == 1
    )
    assert kinds(model) == {
        "0": QuantizedLinear,
        "2.0": nn.Linear,
        "2.1": nn.Linear,
        "3": Scaled,
        "4": nn.Linear,
    }


@pytest.mark.parametrize("precision", NARROW)
def test_undoing_puts_the_same_layers_back(precision):
    model, x = small_model(), tokens(40, 64)
    layers, expected = list(model), model(x)
    undo = quantize_linears(model, precision, native=True, keep=lambda *_: False, reversible=True)
    assert not torch.equal(model(x), expected)
    undo()
    assert [layer is original for layer, original in zip(model, layers, strict=True)] == [True] * 5
    assert torch.equal(model(x), expected)


def test_without_reversible_the_originals_are_let_go_one_by_one():
    model = nn.Sequential(*(linear_of(64, 64) for _ in range(3)))
    originals = [weakref.ref(layer.weight) for layer in model]
    alive = []

    class Counting(dict):
        """In place of the container's own table: sees every replacement."""

        def __setitem__(self, name, layer):
            alive.append(sum(original() is not None for original in originals))
            super().__setitem__(name, layer)

    model._modules = Counting(model._modules)
    undo = quantize_linears(model, Precision.INT8, native=False, keep=lambda *_: False)
    assert alive == [3, 2, 1]
    assert not any(original() is not None for original in originals)
    with pytest.raises(RuntimeError, match="reversible=True"):
        undo()


def test_a_layer_under_two_names_is_replaced_under_both():
    shared = linear_of(64, 64)
    model = nn.Sequential(shared, shared)
    undo = quantize_linears(model, Precision.INT8, native=False, keep=lambda *_: False, reversible=True)
    assert [type(layer) for layer in model] == [QuantizedLinear] * 2
    undo()
    assert list(model) == [shared, shared]


def test_formats_that_cannot_be_meant_are_named():
    with pytest.raises(ValueError, match="'float8_e4m3fn' or 'int8'"):
        QuantizedLinear.of(linear_of(), Precision.BFLOAT16, native=False)
    layer = QuantizedLinear.of(linear_of(), Precision.FLOAT8, native=False)
    with pytest.raises(TypeError, match="float8_e4m3fn; keep it wide"):
        layer(tokens(2, 64, dtype=torch.float8_e4m3fn))
    for precision in NARROW:
        layer = QuantizedLinear.of(linear_of(), precision, native=False).to(torch.bfloat16)
        with pytest.raises(TypeError, match=r"\.to\(device\) alone"):
            layer(tokens(2, 64, dtype=torch.bfloat16))


@pytest.mark.parametrize("precision", NARROW)
def test_native_arithmetic_is_on_the_cpu_and_not_where_nobody_tried_it(precision):
    assert supports_native(precision, CPU)
    assert not supports_native(precision, torch.device("mps"))
    assert not supports_native(precision, torch.device("xpu"))


@pytest.fixture(scope="module")
def transformer(tiny_model):
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel.from_pretrained(tiny_model / "transformer").requires_grad_(requires_grad=False)


def drawn(transformer: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """One step of 64 image tokens and 32 text tokens."""
    ids = torch.zeros(64, 3)
    ids[:, 1], ids[:, 2] = torch.arange(64) // 8, torch.arange(64) % 8
    with torch.inference_mode():
        return transformer(
            hidden_states=tokens(1, 64, 64, dtype=dtype),
            encoder_hidden_states=tokens(1, 32, 32, dtype=dtype, seed=2),
            pooled_projections=tokens(1, 32, dtype=dtype, seed=3),
            timestep=torch.tensor([0.5], dtype=dtype),
            guidance=torch.tensor([3.5]),
            img_ids=ids,
            txt_ids=torch.zeros(32, 3),
        ).sample


LAYERS_IN_SEQUENCE = 16
"""Of the tiny transformer: one in, two blocks of four, three blocks of two, one out."""
LAYER_ERROR = {Precision.FLOAT8: (2 / 3) ** 0.5 * 2**-4, Precision.INT8: (2 / 12) ** 0.5 * 5 / 127}
"""Root mean square of a layer's error, as a share of its output: of errors spread evenly up to 2^-4, or over a scale
where the largest of a row is 5 times its root mean square; for weights and activations alike."""


@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_whole_transformer_stays_close(transformer, precision, native, dtype):
    """Independent errors of layers in sequence add up by their squares, if no layer makes those before it larger."""
    model = copy.deepcopy(transformer).to(dtype)
    expected = drawn(model, dtype).float()
    quantize_linears(model, precision, native=native, keep=lambda *_: False)
    assert set(kinds(model).values()) == {QuantizedLinear}
    y = drawn(model, dtype)
    assert y.dtype == dtype
    assert (y.float() - expected).norm() <= LAYERS_IN_SEQUENCE**0.5 * LAYER_ERROR[precision] * expected.norm()


HOPPER_SUMS = 2**-13
"""Fast accumulation on Hopper keeps 14 bits of a sum (DeepSeek-V3 technical report, 3.5.2), cut off, not rounded."""


@pytest.fixture
def card() -> torch.device:
    """One that multiplies both formats; the layers' weights are quantized on it, brought back, and put there."""
    card = torch.device("cuda")
    if not all(supports_native(precision, card) for precision in NARROW):
        pytest.skip("the card does not multiply both formats")
    return card


def layer_on(card: torch.device, linear: nn.Linear, precision: Precision, *, native: bool) -> QuantizedLinear:
    layer = QuantizedLinear.of(linear, precision, native=native, device=card)
    for parameter in layer.parameters():
        assert parameter.device == CPU
        parameter.data = parameter.data.to(card)
    return layer


def assert_as_close_on_a_card(y, x, linear, precision, *, native):
    is_native = native and x[..., 0].numel() >= quantized.LEAST_NATIVE_ROWS
    sums = 2**-24
    if is_native and precision == Precision.FLOAT8:
        x, y = x.bfloat16(), y.bfloat16()  # the format of the product there
        sums = HOPPER_SUMS / 32  # cut off every 32 products
    assert_as_close_as_the_format(y, x, linear, precision, native=is_native, sums=sums)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (1,), (17,), (33,), (2, 401), (0,)])
def test_on_a_card_it_is_as_close_to_the_wide_one(card, precision, native, dtype, bias, shape):
    linear, x = linear_of(256, bias=bias, dtype=dtype), tokens(*shape, 256, dtype=dtype).to(card)
    y = layer_on(card, linear, precision, native=native)(x)
    assert_as_close_on_a_card(y, x, linear, precision, native=native)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", NARROW)
def test_on_a_card_a_row_with_what_is_no_number_comes_out_as_such(card, precision):
    linear, x = linear_of(256, bias=False), tokens(40, 256).to(card)
    x[3, 5] = torch.nan
    y = layer_on(card, linear, precision, native=True)(x)
    assert y[3].isnan().all()
    assert y[[row for row in range(40) if row != 3]].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("width", [256, quantized.WIDE_ROW + 256])
def test_on_a_card_it_compiles_as_one_graph(card, uncompiled, precision, native, width):
    linear, x = linear_of(width, dtype=torch.bfloat16), tokens(2, 401, width, dtype=torch.bfloat16).to(card)
    layer = layer_on(card, linear, precision, native=native)
    compile_blocks([layer])
    with torch.inference_mode():
        assert_as_close_on_a_card(layer(x), x, linear, precision, native=native)
