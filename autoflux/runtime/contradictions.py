"""What a plan may not combine, said before anything is loaded. The planner makes no such plan; a file may hold one."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from autoflux.errors import ContradictoryWishes
from autoflux.planning.terms import TRANSFORMER, Placement, TransferUnit, Waiting
from autoflux.planning.values import ComponentPlan, Plan
from autoflux.runtime.attention import check_attention
from autoflux.runtime.quantized import supports_native


def check_plan(plan: Plan) -> None:
    """Whether this engine can do what the plan says, all together.

    Raises:
        ContradictoryWishes: two of its choices exclude each other, or the device cannot do one.
        UnknownName: nothing computes attention by that name.
    """
    device = torch.device(plan.device)
    for component in plan.components:
        for reason, hint in _of_component(component, device):
            raise ContradictoryWishes(reason, hint=hint)
    for reason, hint in _of_plan(plan, plan.component(TRANSFORMER)):
        raise ContradictoryWishes(reason, hint=hint)
    check_attention(plan.attention, device, plan.component(TRANSFORMER).arithmetic)


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


def _of_component(planned: ComponentPlan, device: torch.device) -> Iterator[tuple[str, str]]:
    """What is wrong with it by itself, and what to try."""
    name, storage = planned.name, planned.storage.value
    if planned.placement == Placement.NATIVE:
        return  # the library says itself what it cannot
    if not planned.is_narrow:
        if planned.native:
            yield f"{name!r} is to multiply in 8 bits weights held as {storage}", "choose an 8-bit format with --quant"
        if planned.storage != planned.arithmetic:
            wide = planned.arithmetic.value
            yield f"{name!r} is to be held as {storage} and computed in {wide}", "choose one --precision"
        return
    if name != TRANSFORMER:
        yield f"{name!r} is to be held as {storage}, which only the transformer can be", "drop --quant for it"
    if planned.native and not supports_native(planned.storage, device):
        yield f"{str(device)!r} does not multiply in {storage}", "choose another format with --quant"


def _of_plan(plan: Plan, transformer: ComponentPlan) -> Iterator[tuple[str, str]]:
    """What is wrong between the transformer and how it is computed, and what to try."""
    placement = transformer.placement
    if placement == Placement.HOST and torch.device(plan.device).type != "cpu":
        yield f"the processor is to compute the transformer of a plan for {plan.device!r}", "use --device cpu"
    if plan.compiled and placement == Placement.NATIVE:
        yield "blocks are to be compiled whose weights the backend's own offload brings", "drop --offload or --compile"
    if placement != Placement.STREAMED:
        if plan.hoist_modulation:
            yield "modulation is to be hoisted out of a transformer that is not streamed", "plan again"
        if plan.graphs:
            yield "blocks are to be replayed from CUDA graphs that are not streamed", "plan again"
        return
    # What brings a layer would have to run inside of the compiled block, or of the graph.
    if plan.compiled and plan.unit == TransferUnit.LAYER:
        yield "blocks are to be compiled whose layers are brought one by one", "bring whole blocks, or drop --compile"
    if plan.graphs and plan.unit == TransferUnit.LAYER:
        yield (
            "blocks are to be replayed from CUDA graphs whose layers are brought one by one",
            "bring whole blocks, or drop --graphs",
        )
    if plan.graphs and torch.device(plan.device).type != "cuda":
        yield f"there are no CUDA graphs on {plan.device!r}", "drop --graphs"
