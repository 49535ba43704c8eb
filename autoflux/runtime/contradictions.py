"""What this engine or the device cannot do of a plan, said before anything is loaded."""

from __future__ import annotations

import torch

from autoflux.errors import ContradictoryWishes
from autoflux.planning.contradictions import contradictions
from autoflux.planning.terms import TRANSFORMER, Placement, Waiting
from autoflux.planning.values import ComponentPlan, Plan
from autoflux.runtime.attention import check_attention
from autoflux.runtime.quantized import supports_native


def check_plan(plan: Plan) -> None:
    """Whether this engine can do what the plan says, all together.

    Raises:
        ContradictoryWishes: two of its choices exclude each other, or the device cannot do one.
        UnknownName: nothing computes attention by that name.
    """
    device, transformer = torch.device(plan.device), plan.component(TRANSFORMER)
    for reason, hint in contradictions(plan):
        raise ContradictoryWishes(reason, hint=hint)
    native = transformer.native and transformer.placement != Placement.NATIVE
    if native and not supports_native(transformer.storage, device):
        raise ContradictoryWishes(
            f"{plan.device!r} does not multiply in {transformer.storage.value}",
            hint="choose another format with --quant",
        )
    check_attention(plan.attention, device, transformer.arithmetic)


def check_resident(planned: ComponentPlan, block_count: int) -> None:
    """Whether the blocks that are to stay are there.

    Raises:
        ContradictoryWishes: a number is too large.
    """
    beyond = [number for number in planned.resident if not 0 <= number < block_count]
    if beyond:
        raise ContradictoryWishes(
            f"block {beyond[0]} of {planned.name!r} is to stay on the device, and it has {block_count}",
            hint="plan again",
        )


def check_narrow_on_disk(planned: ComponentPlan) -> None:
    """Whether weights that are not packed may be held as planned: what is narrowed when it is read has to stay in RAM.

    Raises:
        ContradictoryWishes: they are to wait on the disk.
    """
    if planned.placement == Placement.STREAMED and planned.waiting == Waiting.DISK:
        raise ContradictoryWishes(
            f"the weights of {planned.name!r} are to wait on the disk and to be held as {planned.storage.value}",
            hint="pack them with `autoflux models pack`, choose a wide --precision, or leave more RAM with --ram",
        )
