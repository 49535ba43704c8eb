"""A plan as a picture: which blocks stay, memory phase by phase, and both streams over one step. Pure.

`draw` works out what there is to see; `drawing_svg` and `drawing_text` put it on paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from itertools import pairwise

from autoflux.hardware.values import BlockKind
from autoflux.models.values import Model
from autoflux.planning.activations import working_bytes
from autoflux.planning.footprint import PHASE_OF
from autoflux.planning.schedule import Passage, PassTrace, Span, Unit, trace_pass
from autoflux.planning.speed import KINDS
from autoflux.planning.streaming import staying_bytes
from autoflux.planning.terms import Placement, TransferUnit
from autoflux.planning.values import ComponentPlan, Plan
from autoflux.planning.weights import component_bytes, unit_bytes
from autoflux.units import format_bytes, format_seconds
from autoflux.values import Value

PHASES = ("encode", "denoise", "decode")


class Part(StrEnum):
    """What takes memory, in the order it is drawn."""

    CONTEXT = "context"
    """The driver and libraries; on the CPU the program itself."""
    STAYS = "stays"
    """Weights that are always there."""
    STREAMED = "streamed"
    """Weights that pass through the ring, and the ring."""
    VISITS = "visits"
    """Weights that are there for their phase only."""
    ACTIVATIONS = "activations"


PART_OF = {Placement.DEVICE: Part.STAYS, Placement.VISITING: Part.VISITS, Placement.STREAMED: Part.STREAMED}


class DrawnBlock(Value, frozen=True, kw_only=True):
    """A block of the transformer: `number` counts within its list, `kind` is `double` or `single`."""

    kind: BlockKind
    number: int
    nbytes: int
    part: Part

    @property
    def name(self) -> str:
        return f"{self.kind} block {self.number}"


class DrawnPhase(Value, frozen=True, kw_only=True):
    """Memory at the worst moment of a phase."""

    name: str
    parts: dict[Part, int]

    @property
    def nbytes(self) -> int:
        return sum(self.parts.values())


class Stretch(Value, frozen=True, kw_only=True):
    """Time in which a stream works on a block, by its place in `Drawing.blocks`, or on none: it waits, or the device
    computes what a step takes beside its blocks. Seconds."""

    begin: float
    end: float
    block: int | None

    @property
    def seconds(self) -> float:
        return self.end - self.begin


class Lane(Value, frozen=True, kw_only=True):
    """What one stream, `copy` or `compute`, does during a step, without gaps."""

    name: str
    stretches: tuple[Stretch, ...]

    @property
    def waiting_seconds(self) -> float:
        return sum((s.seconds for s in self.stretches if s.block is None), 0.0)


class Drawing(Value, frozen=True, kw_only=True):
    """What there is to see of a plan. `blocks` and `lanes` are empty for a model that is not made of blocks."""

    title: str
    blocks: tuple[DrawnBlock, ...]
    phases: tuple[DrawnPhase, ...]
    memory: str
    """`device memory`, or `RAM` on the CPU."""
    ceiling_bytes: int
    seconds_per_step: float
    lanes: tuple[Lane, ...]
    blocks_caption: str
    memory_caption: str
    step_caption: str

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that occur, in order."""
        seen = {part for phase in self.phases for part, nbytes in phase.parts.items() if nbytes}
        seen.update(block.part for block in self.blocks)
        return tuple(part for part in Part if part in seen)

    def label(self, part: Part) -> str:
        """What a legend calls it."""
        return {
            Part.CONTEXT: "the program itself" if self.memory == "RAM" else "driver and libraries",
            Part.STAYS: "weights that stay",
            Part.STREAMED: "streamed weights and their ring",
            Part.VISITS: "weights there for their phase",
            Part.ACTIVATIONS: "what is computed",
        }[part]


def draw(plan: Plan, model: Model) -> Drawing:
    """What there is to see of a plan for `model`."""
    blocks = _blocks(plan, model)
    trace, pause = _trace(plan, blocks)
    picture = plan.predicted.picture
    precision = plan.component("transformer").storage.value
    on_cpu = plan.vram_limit_bytes is None
    lanes = _lanes(trace) if blocks else ()
    return Drawing(
        title=f"{plan.model} on {plan.device} in {precision}, {picture.width}x{picture.height}",
        blocks=blocks,
        phases=_phases(plan, model),
        memory="RAM" if on_cpu else "device memory",
        ceiling_bytes=plan.ram_limit_bytes if plan.vram_limit_bytes is None else plan.vram_limit_bytes,
        seconds_per_step=trace.seconds,
        lanes=lanes,
        blocks_caption=_blocks_caption(plan, blocks),
        memory_caption=_memory_caption(plan),
        step_caption=_step_caption(trace.seconds, pause, lanes),
    )


def _blocks(plan: Plan, model: Model) -> tuple[DrawnBlock, ...]:
    planned = plan.component("transformer")
    transformer = model.component("transformer")
    places = [
        (kind, number, block)
        for kind, blocks in zip(KINDS, transformer.block_lists, strict=False)
        for number, block in enumerate(blocks.blocks)
    ]
    return tuple(
        DrawnBlock(
            kind=kind,
            number=number,
            nbytes=unit_bytes(block, planned),
            part=Part.STAYS if i in planned.resident else PART_OF[planned.placement],
        )
        for i, (kind, number, block) in enumerate(places)
    )


def _trace(plan: Plan, blocks: Sequence[DrawnBlock]) -> tuple[PassTrace, float]:
    """One step of the plan, and what of it is beside the blocks.

    What streams is simulated as the planner did, with what copies take from arithmetic spread over all of it; otherwise
    blocks share the step evenly.
    """
    planned = plan.component("transformer")
    pause = plan.priors.pause_seconds
    if planned.placement != Placement.STREAMED:
        each = (plan.predicted.seconds_per_step - pause) / max(1, len(blocks))
        ends = [pause + each * (i + 1) for i in range(len(blocks))]
        passages = tuple(Passage(None, Span(end - each, end)) for end in ends)
        return PassTrace(plan.predicted.seconds_per_step, passages), pause
    predicted = plan.predicted
    if plan.unit == TransferUnit.LAYER:
        return _layered(plan, blocks, pause), pause
    units = [Unit(block.nbytes, predicted.block_seconds[block.kind]) for block in blocks]
    trace = trace_pass(units, planned.resident, plan.ring_bytes, predicted.copy_gb_per_s * 1e9, pause=pause)
    times = predicted.seconds_per_step / trace.seconds
    return trace.stretched(times), pause * times


def _layered(plan: Plan, blocks: Sequence[DrawnBlock], pause: float) -> PassTrace:
    """Layer after layer is copied and computes, so that a block's copies and arithmetic share its time."""
    predicted = plan.predicted
    turns = [(block.nbytes / (predicted.copy_gb_per_s * 1e9), predicted.block_seconds[block.kind]) for block in blocks]
    times = (predicted.seconds_per_step - pause) / sum(max(turn) for turn in turns)
    at, passages = pause, []
    for copying, computing in turns:
        end = at + times * max(copying, computing)
        copy = Span(at, at + min(1.0, times) * copying)
        passages.append(Passage(copy, Span(end - min(1.0, times) * computing, end)))
        at = end
    return PassTrace(predicted.seconds_per_step, tuple(passages))


def _lanes(trace: PassTrace) -> tuple[Lane, ...]:
    computes = [(passage.compute, i) for i, passage in enumerate(trace.passages)]
    copies = [
        (piece, i)
        for i, passage in enumerate(trace.passages)
        if passage.copy
        for piece in _wrapped(passage.copy, trace.seconds)
    ]
    lanes = [Lane(name="compute", stretches=tuple(_with_waits(computes, trace.seconds)))]
    if copies:
        lanes.insert(0, Lane(name="copy", stretches=tuple(_with_waits(sorted(copies), trace.seconds))))
    return tuple(lanes)


def _wrapped(span: Span, seconds: float) -> Iterator[Span]:
    """A copy that begins before the step is, in the next step, the end of this one."""
    if span.begin < 0:
        yield Span(span.begin + seconds, min(span.end, 0.0) + seconds)
    if span.end > 0:
        yield Span(max(span.begin, 0.0), span.end)


def _with_waits(work: Sequence[tuple[Span, int]], seconds: float) -> Iterator[Stretch]:
    stops = [Span(0.0, 0.0), *(span for span, _ in work), Span(seconds, seconds)]
    numbers = [number for _, number in work]
    for place, (before, after) in enumerate(pairwise(stops)):
        if after.begin - before.end > seconds * 1e-6:
            yield Stretch(begin=before.end, end=after.begin, block=None)
        if place < len(numbers):
            yield Stretch(begin=after.begin, end=after.end, block=numbers[place])


def _phases(plan: Plan, model: Model) -> tuple[DrawnPhase, ...]:
    arrangement, picture = plan.arrangement, plan.predicted.picture
    working = working_bytes(model, arrangement, plan.priors, picture)
    on_cpu = plan.vram_limit_bytes is None
    always = sum(_weights(model, c) for c in plan.components if c.placement == Placement.DEVICE)
    fixed = {
        Part.CONTEXT: plan.priors.host_bytes if on_cpu else plan.priors.context_bytes,
        Part.STREAMED: plan.ring_bytes if arrangement.streamed else 0,
    }
    staying = staying_bytes(model, arrangement)
    needs = {"encode": working.encode, "denoise": working.denoise, "decode": working.decode}
    return tuple(
        DrawnPhase(
            name=phase,
            parts=_ordered(
                {
                    **fixed,
                    Part.STAYS: always + (0 if plan.park_for_decode and phase == "decode" else staying),
                    Part.VISITS: _visiting(plan, model, phase),
                    Part.ACTIVATIONS: needs[phase],
                }
            ),
        )
        for phase in PHASES
    )


def _ordered(parts: Mapping[Part, int]) -> dict[Part, int]:
    return {part: parts[part] for part in Part if parts.get(part)}


def _visiting(plan: Plan, model: Model, phase: str) -> int:
    components = (c for c in plan.components if c.placement == Placement.VISITING)
    return sum(_weights(model, c) for c in components if PHASE_OF[c.name] == phase)


def _weights(model: Model, planned: ComponentPlan) -> int:
    return component_bytes(model, planned)


def _blocks_caption(plan: Plan, blocks: Sequence[DrawnBlock]) -> str:
    nbytes = format_bytes(sum(block.nbytes for block in blocks))
    placement = plan.component("transformer").placement
    if not blocks:
        return "the transformer is not made of blocks"
    streamed = sum(block.nbytes for block in blocks if block.part == Part.STREAMED)
    if placement == Placement.DEVICE or (placement == Placement.STREAMED and not streamed):
        return f"all blocks stay, {nbytes}"
    if placement == Placement.VISITING:
        return f"all blocks, {nbytes}, come to {plan.device} once a picture and stay there for its steps"
    through = f"pass through a ring of {format_bytes(plan.ring_bytes)} in every step"
    if all(block.part == Part.STREAMED for block in blocks):
        return f"no block stays; all, {nbytes}, {through}"
    stay = ", ".join(_share(blocks, kind) for kind in dict.fromkeys(block.kind for block in blocks))
    return f"{stay} blocks stay; the others, {format_bytes(streamed)} of {nbytes}, {through}"


def _share(blocks: Sequence[DrawnBlock], kind: str) -> str:
    own = [block for block in blocks if block.kind == kind]
    return f"{sum(block.part == Part.STAYS for block in own)} of {len(own)} {kind}"


def _memory_caption(plan: Plan) -> str:
    predicted = plan.predicted
    pinned = f", {format_bytes(predicted.pinned_bytes)} of it pinned" if predicted.pinned_bytes else ""
    ram = f"{format_bytes(predicted.peak_ram_bytes)} of {format_bytes(plan.ram_limit_bytes)}{pinned}"
    if plan.vram_limit_bytes is None:
        return f"at most {ram}"
    parked = "; what stays leaves the device while the picture is decoded" if plan.park_for_decode else ""
    peak = format_bytes(predicted.peak_vram_bytes.peak)
    return f"at most {peak} of {format_bytes(plan.vram_limit_bytes)}{parked}; RAM {ram}"


def _step_caption(seconds: float, pause: float, lanes: Sequence[Lane]) -> str:
    waits = {lane.name: lane.waiting_seconds for lane in lanes}
    beside = f", {format_seconds(pause)} of it beside the blocks" if pause else ""
    step = f"{format_seconds(seconds)} a step{beside}"
    if "copy" not in waits:
        return f"{step}; no weights are copied meanwhile"
    arithmetic = _wait("arithmetic", max(0.0, waits["compute"] - pause), seconds)
    copies = _wait("copies", waits["copy"], seconds, plural=True)
    return f"{step}; {arithmetic} for copies, {copies} for room in the ring"


def _wait(who: str, part: float, seconds: float, *, plural: bool = False) -> str:
    verb = "wait" if plural else "waits"
    if part <= seconds * 1e-6:
        return f"{who} never {verb}"
    return f"{who} {verb} {format_seconds(part)} ({part / seconds:.0%})"
