"""How long a step of an existing plan takes, for other pictures and with other rates than it was made for. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from autoflux.hardware.values import block_operations
from autoflux.models.flops import image_tokens
from autoflux.models.values import Model
from autoflux.planning.layers import LayerPass, layer_seconds, layers_of
from autoflux.planning.schedule import Unit, contended_seconds
from autoflux.planning.speed import GRAPH_HANDOFF
from autoflux.planning.streaming import block_bytes_of, block_kinds, joined, text_share
from autoflux.planning.terms import Offload, TransferUnit
from autoflux.planning.values import Picture, Plan


def step_seconds(
    plan: Plan, model: Model, picture: Picture | None = None, *, blocks: float = 1.0, copies: float = 1.0
) -> float:
    """A step of all pictures of a batch; `picture` is None for the one that the plan is for.

    Blocks take `blocks` times as long as the plan says and copies run `copies` times as fast; what a step takes beside
    its blocks stays as it is. For another picture
    the time of blocks is scaled by their operations, as if attention ran at the rate of products: at half or twice the
    tokens of FLUX.1 at 1024x1024 that is wrong by less than 5 %.
    """
    scale = blocks * (_operations(plan, model, picture) / _operations(plan, model, None) if picture else 1.0)
    predicted, pause = plan.predicted, plan.priors.pause_seconds
    if not predicted.streamed_bytes or plan.offload == Offload.NATIVE:
        # What the library copies in a native plan is not known apart from what it computes.
        return pause + (predicted.seconds_per_step - pause) * scale
    planned = plan.component("transformer")
    kinds = block_kinds(model.component("transformer"))
    seconds = {kind: time * scale for kind, time in predicted.block_seconds.items()}
    rate = predicted.copy_gb_per_s * 1e9 * copies
    if plan.unit == TransferUnit.LAYER:
        layers = layers_of(model, planned, seconds, text_share(model, picture or predicted.picture))
        return layer_seconds(LayerPass(layers, rate, pause), plan.ring_bytes)
    sizes = block_bytes_of(model, planned)
    loads = [Unit(nbytes, seconds[kind]) for nbytes, kind in zip(sizes, kinds, strict=True)]
    units, handoff = joined(loads, plan.block_bytes), GRAPH_HANDOFF * plan.graphs
    return contended_seconds(units, planned.resident, plan.ring_bytes, rate, pause=pause, handoff=handoff)


def image_seconds(plan: Plan, step: float) -> float:
    """A picture of the plan, if a step of its batch took so long and everything else were as predicted."""
    picture = plan.predicted.picture
    return plan.predicted.seconds_per_image + picture.steps * (step - plan.predicted.seconds_per_step) / picture.batch


def tokens(plan: Plan, model: Model, picture: Picture | None = None) -> int:
    """Of one picture and its prompt."""
    of = picture or plan.predicted.picture
    return plan.predicted.picture.text_tokens + image_tokens(model.architecture, of.width, of.height)


def _operations(plan: Plan, model: Model, picture: Picture | None) -> float:
    batch = (picture or plan.predicted.picture).batch
    return batch * block_operations(model.architecture.hidden_size, tokens(plan, model, picture))


def weighted_mean(values: Sequence[tuple[float, int]]) -> float:
    """The geometric mean of positive numbers that count so often: ratios have no other fair one."""
    total = sum(count for _, count in values)
    product = 1.0
    for value, count in values:
        product *= value ** (count / total)
    return product
