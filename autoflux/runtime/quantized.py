"""Linear layers whose weights take one byte a number, multiplied as they are or widened on the device.

A row of weights, and in the native arithmetic a row of activations (a token), is divided by a scale of its own, so
that its largest number becomes the largest of the format. Rows that differ a thousandfold thus lose nothing to each
other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoflux.hardware.kernels import kernels, launching_on, runs_kernels
from autoflux.hardware.measure import LEAST_CAPABILITY
from autoflux.models.values import Precision
from autoflux.units import MIB

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""What the largest number of a row becomes: the largest of e4m3fn (1.75 x 2^8, OCP 8-bit specification, table 2), and
127, not 128, so that int8 is symmetric."""

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""2^-126, the scale of a row of zeros. The smallest normal float32, because devices may take smaller ones for zero and
then divide by it. Only rows whose largest number is below 6e-36 lose exactness to it."""

LEAST_NATIVE_ROWS = 17
"""`torch._int_mm` refuses fewer on CUDA. So few tokens wait for the weights to be read and gain nothing from faster
arithmetic; in FLUX they are the modulations, which every token then feels, so exact activations suit them anyway."""

SIZE_MULTIPLE = 16
"""`torch._scaled_mm` refuses other sizes of a weight; `torch._int_mm` asks for multiples of 8."""

FEW_RESULTS = 2**18
"""Fewer are multiplied in float8 without their bias: two and a half times as many as the most that failed with it."""

CHUNK_BYTES = 64 * MIB
"""Weights are quantized in pieces of this size in float32, so that a large layer needs little beside itself."""

WIDE_ROW = 8192
"""Numbers of a row from which on a compiled layer, too, has them made narrow by a kernel of its own. Inductor computes
what comes before a row twice if the row is too long to be held: once for the largest number and once to divide. One
H200, of a single block of FLUX.1-dev at 1024x1024: 140 + 117 us."""

_WIDE = (torch.bfloat16, torch.float16, torch.float32)

_KERNEL = kernels("autoflux.runtime.narrow_kernel")

_CPU_MULTIPLIES_INT8: bool = torch.cpu._is_vnni_supported()  # noqa: SLF001 — torch asks the same; no public name in 2.11


class QuantizedLinear(nn.Module):
    """Stands in for an `nn.Linear`: `weight` (out, in) in one byte a number, `scale` (out, 1) float32, `bias` or None.

    The layer's weights are `weight * scale`. All three are parameters that may be pointed at other storage at any
    time. Move the module with `.to(device)`; `.to(dtype)` would cast weights or scales, and the next call says so.

    `native` multiplies narrow numbers by narrow numbers (see `supports_native`), provided there are 17 rows or more.
    Otherwise the weights are widened on the device at each call, to a copy in x's format that lives as long as the
    call.
    """

    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, scale: Tensor, bias: nn.Parameter | None, *, native: bool) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.native = native
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.register_parameter("bias", bias)

    @classmethod
    def of(
        cls, linear: nn.Linear, precision: Precision, *, native: bool, device: torch.device | None = None
    ) -> QuantizedLinear:
        """Quantize a linear layer; its bias is taken over as it is, its weight is left alone.

        The result lies where the layer's weight lies. `device` is where to compute, if not there.

        Raises:
            ValueError: `precision` is none of one byte.
        """
        weight, scale = quantize(linear.weight.detach(), precision, device=device)
        return cls(weight, scale, linear.bias, native=native)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in x's format: bfloat16, float16 or float32.

        Raises:
            TypeError: x or the weights are in a format that cannot be meant.
        """
        # The host prepares 400 of these a step, and a device may wait for it: nothing is asked for twice.
        weight, scale = self.weight, self.scale
        bias: Tensor | None = self.bias
        _check_formats(x, weight, scale)
        rows = x.reshape(-1, x.shape[-1])
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        multiply = _native_product if self.native and rows.shape[0] >= LEAST_NATIVE_ROWS else _widened_product
        return multiply(rows, weight, scale, bias).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, weight={self.weight.dtype}, native={self.native}"


def quantize(weight: Tensor, precision: Precision, *, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """(out, in) to narrow numbers (out, in) and float32 scales (out, 1), which lie where the weight lies.

    `device` is where to compute, if not there. Rows are independent of each other: joining or cutting weights first
    gives the same numbers.

    Raises:
        ValueError: `precision` is none of one byte.
    """
    return _quantized(weight, _narrow_dtype(precision), device or weight.device)


def supports_native(precision: Precision, device: torch.device) -> bool:
    """Whether the device multiplies numbers of this format, through the products of torch that are used here.

    False on ROCm, XPU and MPS, untried, and for FLOAT8 on Windows, where torch is built without the kernel ("Rowwise
    scaling is not currently supported on your device", pytorch/pytorch#194606). The CPU always can, see `_is_emulated`.

    That it can does not make it fast: on one H200, compiled, 4608 tokens through 3072 x 12288 take 0.44 ms in bfloat16,
    0.25 in FLOAT8 and 0.59 in INT8, whose sums leave `torch._int_mm` as four bytes each; widened, both take 0.47.
    """
    if _narrow_dtype(precision) == torch.float8_e4m3fn and sys.platform == "win32" and device.type == "cuda":
        return False
    if device.type == "cuda" and torch.version.hip is None:
        return torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY[precision]
    return device.type == "cpu"


def quantize_linears(
    module: nn.Module,
    precision: Precision,
    *,
    native: bool,
    keep: Callable[[str, nn.Linear], bool],
    reversible: bool = False,
    device: torch.device | None = None,
) -> Callable[[], None]:
    """Replace every `nn.Linear` inside `module`, except those that `keep(qualified name, linear)` wants.

    Left alone are also sizes that are not multiples of 16, and subclasses of `nn.Linear`, whose own ways would be
    lost. Hooks on a replaced layer are lost too: place them afterwards. Each weight is quantized on `device` if it is
    given (for weights in RAM), and otherwise where it lies; the result lies where the weight lay.

    Returns what undoes it. That keeps the original layers alive, so it is only to be had with `reversible`; without,
    they are let go one by one, so that memory peaks at the model and one narrow layer, and undoing raises
    RuntimeError.

    Raises:
        ValueError: `precision` is none of one byte.
    """
    names = [
        name
        for name, linear in module.named_modules(remove_duplicate=False)
        if name and _is_replaceable(linear) and not keep(name, linear)
    ]
    originals: dict[str, nn.Module] = {}
    for name in names:
        original = module.get_submodule(name)
        assert isinstance(original, nn.Linear)  # noqa: S101 — chosen above
        module.set_submodule(name, QuantizedLinear.of(original, precision, native=native, device=device))
        if reversible:
            originals[name] = original

    def undo() -> None:
        if not reversible:
            raise RuntimeError("the original layers were let go; quantize with reversible=True to undo it")
        for name, original in originals.items():
            module.set_submodule(name, original)

    return undo


def has_narrow_layers(module: nn.Module) -> bool:
    """Whether something inside is quantized already."""
    return any(isinstance(inside, QuantizedLinear) for inside in module.modules())


def _check_formats(x: Tensor, weight: Tensor, scale: Tensor) -> None:
    if weight.dtype not in LARGEST or scale.dtype != torch.float32:
        formats = f"{weight.dtype} with scales in {scale.dtype}"
        raise TypeError(f"quantized weights were cast to {formats}; move them with .to(device) alone")
    if x.dtype not in _WIDE:
        # A module that casts its input to the format of a weight below it: T5's `wo` in transformers.
        raise TypeError(f"a quantized layer got {x.dtype}; keep it wide if its caller casts to its weight's format")


def _is_replaceable(linear: nn.Module) -> bool:
    return (
        type(linear) is nn.Linear
        and linear.in_features % SIZE_MULTIPLE == 0
        and linear.out_features % SIZE_MULTIPLE == 0
    )


def _narrow_dtype(precision: Precision) -> torch.dtype:
    if precision == Precision.FLOAT8:
        return torch.float8_e4m3fn
    if precision == Precision.INT8:
        return torch.int8
    raise ValueError(f"quantized layers are {Precision.FLOAT8.value!r} or {Precision.INT8.value!r}, not {precision!r}")


def _quantized(weight: Tensor, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """(out, in) to narrow numbers (out, in) and scales (out, 1), both where the weight lies, computed on `device`."""
    narrow = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    scale = torch.empty((len(weight), 1), dtype=torch.float32, device=weight.device)
    count = max(1, CHUNK_BYTES // (4 * weight.shape[1]))
    for start in range(0, len(weight), count):
        rows = slice(start, start + count)
        numbers, factors = _narrowed(weight[rows].to(device), dtype)
        narrow[rows].copy_(numbers)
        scale[rows].copy_(factors)
    return narrow, scale


def _narrowed(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(rows, in) to narrow numbers (rows, in) and float32 scales (rows, 1), by the largest absolute value of a row.

    A reduction and then element by element over the same numbers, without a view of other shape between, is what
    inductor makes one kernel of: 24 us on one H200 for 4608 x 3072, against 125 us uncompiled. The largest value is
    exact in any format; the division is in float32, because the scale is.
    """
    largest = rows.abs().amax(dim=-1, keepdim=True).float()
    scale = (largest / LARGEST[dtype]).clamp(min=SMALLEST_SCALE)
    scaled = rows / scale
    # No clamp: rounding errors put the largest at 448.0001 at most, and e4m3fn rounds to 448 all below 464.
    narrow = scaled.round().to(dtype) if dtype == torch.int8 else scaled.to(dtype)
    # The products want rows one after the other, which is how numbers nearly always come.
    return narrow.contiguous(), scale


def _narrowed_activations(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `_narrowed`, up to the last bit of a quotient, in one pass over memory where that is faster."""
    # What is compiled is fused with what comes before it, which a kernel of ours cannot be.
    compiling = torch.compiler.is_compiling()
    least = WIDE_ROW if compiling else 1
    if _KERNEL and x.is_cuda and least <= x.shape[1] <= _KERNEL.LARGEST_ROW and runs_kernels(x.device):
        numbers = x if x.stride(1) == 1 else x.contiguous()
        if compiling:  # inductor takes care of the current device itself
            return _by_kernel(numbers, dtype)
        with launching_on(x.device):
            return _by_kernel(numbers, dtype)
    return _narrowed(x, dtype)


def _by_kernel(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    narrow, scale = _KERNEL.narrow_rows(x, dtype, LARGEST[dtype], SMALLEST_SCALE)
    return narrow, scale


def _widened_product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (rows, in) times the weights in x's format.

    The cast is exact: of significant bits e4m3fn has 4 and int8 has 7, bfloat16 has 8; float16 holds their exponents.
    The scale multiplies the smaller of the two, output or weights; the output counts twice, because it spares the
    product the bias. Both are as exact: one rounding more to x's format (2^-8 at most in bfloat16, where 2^-4 or half
    a step of int8 are lost already). In place the scale stays float32 and no third tensor is made.
    """
    wide = weight.to(x.dtype)
    # In float16 always the weights: sums of numbers up to 448 overflow its 65504.
    if x.dtype == torch.float16 or 2 * x.shape[0] > x.shape[1]:
        return functional.linear(x, wide.mul_(scale), bias)
    y = functional.linear(x, wide).mul_(scale.t())
    return y if bias is None else y.add_(bias)


def _native_product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (rows, in), narrowed row by row, times the narrow weights; scales and bias are applied in float32."""
    narrow, x_scale = _narrowed_activations(x, weight.dtype)
    if _is_emulated(weight):
        sums = narrow.float() @ weight.float().t()
    elif weight.dtype == torch.int8:
        sums = torch._int_mm(narrow, weight.t())  # noqa: SLF001 — torch's only int8 product
    else:
        y = _float8_product(narrow, x_scale, weight, scale, bias)
        return y if y.dtype == x.dtype else y.to(x.dtype)
    y = (sums * x_scale).mul_(scale.t())
    return (y if bias is None else y.add_(bias)).to(x.dtype)


def _is_emulated(weight: Tensor) -> bool:
    """Whether the product of narrow numbers is computed in float32: the same result up to rounding.

    On the CPU that is FLOAT8, for torch 2.11 refuses scales by row there (2.15 has them, and computes in float32 too),
    and INT8 without AVX512-VNNI, where torch's is a plain loop, on one EPYC 12 times slower than float32.
    """
    return weight.device.type == "cpu" and not (weight.dtype == torch.int8 and _CPU_MULTIPLIES_INT8)


def _float8_product(x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The product on a card, in bfloat16, or in float32 if a bias of another format is added.

    With scales by row, bfloat16 is the one format of the result that every card has, and the bias must have it too. Who
    computes in another format loses at most 2^-8 of the product to that, beside the 2^-4 of every number multiplied.

    cuBLAS splits sums of more than 5120 products where results are few, cannot add a bias then, and fails (CUDA 13 on
    one H100, up to 100,000 results: 32 rows of 3072). Of few the bias is added apart, which takes no time to speak of.
    """
    few = x.shape[0] * weight.shape[0] < FEW_RESULTS
    fused = bias if bias is not None and bias.dtype == torch.bfloat16 and not few else None
    y = torch._scaled_mm(  # noqa: SLF001 — torch's only product of e4m3fn
        x,
        weight.t(),
        scale_a=x_scale,
        scale_b=scale.t(),
        bias=fused,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return y if bias is None or fused is not None else y.float() + bias
