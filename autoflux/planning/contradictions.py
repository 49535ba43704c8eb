"""What a plan may not combine. The planner makes no such plan; a file may hold one. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from autoflux.hardware.values import DeviceKind
from autoflux.planning.terms import TRANSFORMER, Placement, TransferUnit
from autoflux.planning.values import ComponentPlan, Plan


def contradictions(plan: Plan) -> Iterator[tuple[str, str]]:
    """What of a plan excludes each other, and what to try."""
    for component in plan.components:
        yield from _of_component(component)
    yield from _of_plan(plan, plan.component(TRANSFORMER))


def _of_component(planned: ComponentPlan) -> Iterator[tuple[str, str]]:
    name, storage = planned.name, planned.storage.value
    if planned.placement == Placement.NATIVE:
        return  # the library says itself what it cannot
    if not planned.is_narrow:
        if planned.native:
            yield f"{name!r} is to multiply in 8 bits weights held as {storage}", "choose an 8-bit format with --quant"
        if planned.storage != planned.arithmetic:
            wide = planned.arithmetic.value
            yield f"{name!r} is to be held as {storage} and computed in {wide}", "choose one --precision"
    elif name != TRANSFORMER:
        yield f"{name!r} is to be held as {storage}, which only the transformer can be", "drop --quant for it"


def _of_plan(plan: Plan, transformer: ComponentPlan) -> Iterator[tuple[str, str]]:
    placement, kind = transformer.placement, plan.device.partition(":")[0]
    if placement == Placement.HOST and kind != DeviceKind.CPU:
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
    if plan.graphs and kind != DeviceKind.CUDA:
        yield f"there are no CUDA graphs on {plan.device!r}", "drop --graphs"
