"""A picture request: completed from the model's defaults and checked against its limits."""

from __future__ import annotations

import math
import random

import msgspec

from autoflux.errors import InvalidRequest
from autoflux.models.values import Limits, Model
from autoflux.values import Value

MAX_SEED = 2**32 - 1
"""Seeds stay below 2^32 so that every tool that reads our metadata accepts them."""

MAX_COUNT = 64
"""Pictures in one order."""


class Request(Value, frozen=True, kw_only=True):
    """One picture to draw. Sizes in pixels; the same request on the same machine gives the same picture."""

    prompt: str
    seed: int
    steps: int
    guidance: float
    width: int
    height: int

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height


class Order(Value, frozen=True, kw_only=True):
    """What a user asked for: None means the model's default, a missing seed is drawn by chance.

    `count` pictures differ in the seed only: seed, seed + 1, …
    """

    prompt: str
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    count: int = 1


def make_order(prompt: str, **fields: object) -> Order:
    """An order of fields that a program gave, which nothing has looked at.

    Raises:
        InvalidRequest: there is no such field, or it is of another type; the message names it.
    """
    try:
        return msgspec.convert({"prompt": prompt, **fields}, Order)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"this cannot be ordered: {error}", hint="see the fields of autoflux.Order") from error


def make_requests(model: Model, order: Order) -> tuple[Request, ...]:
    """The order completed from the model's defaults, one request a picture.

    Raises:
        InvalidRequest: a field is out of the model's limits; its `param` names the field.
    """
    if not 1 <= order.count <= MAX_COUNT:
        raise InvalidRequest(f"the number of pictures must be 1 to {MAX_COUNT}, got {order.count}", param="count")
    defaults = model.defaults
    first = Request(
        prompt=order.prompt,
        seed=random.SystemRandom().randrange(MAX_SEED - order.count) if order.seed is None else order.seed,
        steps=defaults.steps if order.steps is None else order.steps,
        guidance=defaults.guidance if order.guidance is None else order.guidance,
        width=defaults.width if order.width is None else order.width,
        height=defaults.height if order.height is None else order.height,
    )
    check(first, model.limits)
    if first.seed + order.count - 1 > MAX_SEED:
        raise InvalidRequest(f"seed {first.seed} leaves no room for {order.count} pictures", param="seed")
    return tuple(first.replace(seed=first.seed + i) for i in range(order.count))


def check(request: Request, limits: Limits) -> None:
    """Raise InvalidRequest, naming the field, for the first thing `limits` does not allow."""
    _check_prompt(request.prompt, limits)
    if not 0 <= request.seed <= MAX_SEED:
        raise InvalidRequest(f"the seed must be 0 to {MAX_SEED}, got {request.seed}", param="seed")
    if not 1 <= request.steps <= limits.max_steps:
        raise InvalidRequest(f"steps must be 1 to {limits.max_steps}, got {request.steps}", param="steps")
    if not (math.isfinite(request.guidance) and 0 <= request.guidance <= limits.max_guidance):
        raise InvalidRequest(
            f"guidance must be a number from 0 to {limits.max_guidance:g}, got {request.guidance!r}", param="guidance"
        )
    _check_size(request, limits)


def _check_prompt(prompt: str, limits: Limits) -> None:
    if not prompt.isascii() and any("\ud800" <= character <= "\udfff" for character in prompt):
        raise InvalidRequest("the prompt is not valid text", hint="write it in UTF-8", param="prompt")
    if not prompt.strip():
        raise InvalidRequest("the prompt is empty", hint="say what to draw", param="prompt")
    if len(prompt) > limits.max_prompt_characters:
        raise InvalidRequest(
            f"the prompt has {len(prompt):,} characters, at most {limits.max_prompt_characters:,} are allowed",
            hint="the model reads a few hundred words at most; shorten the prompt",
            param="prompt",
        )


def _check_size(request: Request, limits: Limits) -> None:
    for param, side in (("width", request.width), ("height", request.height)):
        if not limits.min_side <= side <= limits.max_side:
            raise InvalidRequest(
                f"{param} must be {limits.min_side} to {limits.max_side} pixels, got {side}", param=param
            )
        if side % limits.size_multiple:
            below = side // limits.size_multiple * limits.size_multiple
            raise InvalidRequest(
                f"{param} must be a multiple of {limits.size_multiple} pixels, got {side}",
                hint=f"try {below} or {below + limits.size_multiple}",
                param=param,
            )
    if request.width * request.height > limits.max_pixels:
        raise InvalidRequest(
            f"{request.width}x{request.height} is {request.width * request.height:,} pixels, "
            f"at most {limits.max_pixels:,} are allowed",
            param="width",
        )
