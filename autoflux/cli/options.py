"""Options that several commands share, and how their text becomes values."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import click

from autoflux.errors import UsageError
from autoflux.models.pack_shelf import NO_PACK
from autoflux.models.request import Order
from autoflux.units import MB, format_bytes, parse_bytes, parse_rate

F = TypeVar("F", bound=Callable[..., Any])

_SIZE = re.compile(r"(\d+)(?:x(\d+))?", re.IGNORECASE)


class ByteSize(click.ParamType[int]):
    """A size with a unit, such as 8GB."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            size = parse_bytes(str(value))
        except UsageError as error:
            self.fail(error.message + (f"; {error.hint}" if error.hint else ""), param, ctx)
        if size < MB:
            self.fail(f"{value!r} is only {format_bytes(size)}; write a unit, such as 8GB or 7.5GiB", param, ctx)
        return size


class Rate(click.ParamType[float]):
    """A rate with a unit, such as 6.8GB/s; arrives in units of 10^9 bytes a second."""

    name = "rate"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            return parse_rate(str(value))
        except UsageError as error:
            self.fail(error.message + (f"; {error.hint}" if error.hint else ""), param, ctx)


class PictureSize(click.ParamType[tuple[int, int]]):
    """`1024` or `1344x768`, in pixels."""

    name = "WxH"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = _SIZE.fullmatch(str(value).strip())
        if not match:
            self.fail(f"{value!r} is not a size; write it like 1024 or 1344x768", param, ctx)
        return int(match[1]), int(match[2] or match[1])


def model_option(command: F) -> F:
    """Add `--model` and `--base`, passed as `model` and `base`."""
    return with_options(command, _MODEL)  # type: ignore[return-value]


def base_option(command: F) -> F:
    """Add `--base`. What the environment names is for models that need one, and is looked up where they are found."""
    return click.option(
        "--base",
        help="For a file that lacks them: the name or folder of a model with text encoders, VAE and tokenizers.  "
        "[env var: AUTOFLUX_BASE]",
    )(command)


_MODEL = (
    click.option(
        "--model",
        default="sample",
        show_default=True,
        envvar="AUTOFLUX_MODEL",
        show_envvar=True,
        help="A name from `autoflux models list`, a diffusers folder, or a safetensors or GGUF file.",
    ),
    base_option,
)


def no_pack_option(command: F) -> F:
    """Add `--no-pack`, which holds for this process and those it starts until the command ends."""
    return click.option(
        "--no-pack",
        is_flag=True,
        expose_value=False,
        callback=_without_packs,
        help="Read the model's own files, not packed weights.",
    )(command)


def _without_packs(ctx: click.Context, _param: click.Parameter, value: bool) -> None:  # noqa: FBT001 — click's signature
    if not value:
        return
    before = os.environ.get(NO_PACK)
    os.environ[NO_PACK] = "1"
    ctx.call_on_close(lambda: os.environ.update({NO_PACK: before or "0"}))


_ORDER = (
    click.argument("prompt"),
    click.option("--seed", type=int, help="The same seed gives the same picture; by chance if not given."),
    click.option("--steps", type=int, help="Denoise steps."),
    click.option("--size", type=PictureSize(), help="Size in pixels, such as 1024 or 1344x768."),
    click.option("--guidance", type=float, help="How strictly the prompt is followed."),
    click.option("-n", "--count", type=int, default=1, show_default=True, help="Number of pictures, seed by seed."),
)


def order_options(command: F) -> F:
    """Add the prompt and what a picture order consists of; they arrive together as `order`."""

    @wraps(command)
    def with_order(*positional: Any, **arguments: Any) -> Any:
        given = {name: arguments.pop(name) for name in ("prompt", "seed", "steps", "guidance", "count")}
        width, height = arguments.pop("size") or (None, None)
        return command(*positional, order=Order(width=width, height=height, **given), **arguments)

    return with_options(with_order, _ORDER)  # type: ignore[return-value]


def with_options(command: Callable[..., Any], options: tuple[Callable[[Any], Any], ...]) -> Callable[..., Any]:
    for option in reversed(options):
        command = option(command)
    return command
