"""The options that constrain a plan. What is not given is chosen; what is given is never overridden."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import click

from autoflux.cli.options import ByteSize, with_options
from autoflux.models.values import Precision
from autoflux.planning.terms import ATTENTIONS, Offload, Quality, TransferUnit
from autoflux.planning.values import Wishes

F = TypeVar("F", bound=Callable[..., Any])

WIDE = (Precision.FLOAT32, Precision.BFLOAT16, Precision.FLOAT16)
NARROW = {"none": None, "fp8": Precision.FLOAT8, "int8": Precision.INT8}


class BlockSize(click.ParamType[TransferUnit | int]):
    """`layer`, `block`, or a size such as 1GB for several blocks at once."""

    name = "layer|block|SIZE"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> TransferUnit | int:
        if isinstance(value, (TransferUnit, int)):
            return value
        text = str(value).strip()
        if text.lower() in set(TransferUnit):
            return TransferUnit(text.lower())
        return ByteSize().convert(text, param, ctx)


def _option(*names: str, **settings: Any) -> Callable[[Any], Any]:
    """An option that can also be given in the environment, as AUTOFLUX_ and its name."""
    variable = "AUTOFLUX_" + names[0].removeprefix("--").partition("/")[0].replace("-", "_").upper()
    return click.option(*names, envvar=variable, show_envvar=True, **settings)


_WISHES = (
    _option("--device", help="cpu, cuda, cuda:1, mps or xpu."),
    _option("--backend", help="The library that builds the pipeline."),
    _option("--profile", help="A hardware profile, by name or TOML file."),
    _option(
        "--quality",
        type=click.Choice([q.value for q in Quality]),
        help="exact: weights as they are, the same picture to the bit; balanced: 8 bits where that is faster.",
    ),
    _option(
        "--offload",
        type=click.Choice([o.value for o in Offload]),
        help="Where weights wait: on the device, or in RAM to come a component at a time, block by block, or in the "
        "backend's own way.",
    ),
    _option("--precision", type=click.Choice([p.value for p in WIDE]), help="Number format of arithmetic."),
    _option("--quant", type=click.Choice(list(NARROW)), help="8-bit format of the transformer's weights."),
    _option(
        "--block-size",
        type=BlockSize(),
        help="What one copy to the device moves: a layer, a block, or several blocks of that size together. With a "
        "layer or a size no block stays on the device.",
    ),
    _option("--keep", multiple=True, metavar="COMPONENT", help="Keep a component on the device, such as vae. Repeat."),
    _option("--cpu", multiple=True, metavar="COMPONENT", help="Leave a component to the processor. Repeat."),
    _option("--batch", type=click.IntRange(1, 64), help="Pictures that must fit at once."),
    _option("--compile/--no-compile", "compiled", default=None, help="Compile the transformer's blocks."),
    _option(
        "--graphs/--no-graphs",
        "graphs",
        default=None,
        help="Replay the transformer's blocks from CUDA graphs instead of launching each operation.",
    ),
    _option("--attention", type=click.Choice(ATTENTIONS), help="What computes attention."),
    _option("--vram", "vram_bytes", type=ByteSize(), help="Ceiling of device memory."),
    _option("--ram", "ram_bytes", type=ByteSize(), help="Ceiling of host memory."),
)

NAMES = (
    "device", "backend", "profile", "quality", "offload", "precision", "quant", "block_size", "keep", "cpu", "batch",
    "compiled", "graphs", "attention", "vram_bytes", "ram_bytes",
)  # fmt: skip
"""Parameters of the options, in the order of the help page."""


def wishes_options(command: F) -> F:
    """Add the options that constrain the plan; they arrive together as `wishes`."""

    @wraps(command)
    def with_wishes(*positional: Any, **arguments: Any) -> Any:
        given = {name: arguments.pop(name) for name in NAMES}
        return command(*positional, wishes=_wishes(given), **arguments)

    return with_options(with_wishes, _WISHES)  # type: ignore[return-value]


def _wishes(given: dict[str, Any]) -> Wishes:
    size, quant, precision = given.pop("block_size"), given.pop("quant"), given.pop("precision")
    offload, quality = given.pop("offload"), given.pop("quality")
    return Wishes(
        **given,
        quality=Quality(quality) if quality else None,
        offload=Offload(offload) if offload else None,
        precision=Precision(precision) if precision else None,
        quant=None if quant is None else NARROW[quant] or Precision.BFLOAT16,
        unit=size if isinstance(size, TransferUnit) else None,
        block_bytes=None if isinstance(size, TransferUnit) else size,
    )
