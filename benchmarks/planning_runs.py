"""Plans made for a setting and run for real: the part of `benchmarks.planning` that needs torch."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import msgspec
import torch

import autoflux
from autoflux import api
from autoflux.errors import AutofluxError, ContradictoryWishes, DeviceUnavailable, DoesNotFit
from autoflux.hardware.known import known_machine
from autoflux.hardware.values import Hardware
from autoflux.models.request import Request
from autoflux.models.values import Model, Precision
from autoflux.planning.findings import NO_FINDINGS, Findings
from autoflux.planning.terms import Offload, Quality, TransferUnit
from autoflux.planning.values import Plan, Wishes
from autoflux.plugin_manager import load_plugins
from autoflux.runtime.lanes import Mark, lane_for
from autoflux.runtime.pinned import offered
from autoflux.runtime.session import Drawing, Session
from benchmarks.card import Card, HighWater, IdleRam, Peaks, resident_bytes
from benchmarks.host_weights import HostWeights
from benchmarks.kept_buffers import KeptBuffers
from benchmarks.planning_report import Figures, Row, Setting

GB = 10**9
TIMED_SECONDS = 0.3
"""For how long steps are timed in each of two pictures, if it has so many. Of plans that compile all are in the second
picture: the first compiles, and what that leaves running disturbs its steps."""

WARM_STEPS = 2
"""That are not timed: the first compiles and fills caches, graphs are recorded in the second, anew for each picture
where they do not stay over a decode."""

TINY_MACHINE = "rtx-3060-12gb"
"""The made-up card that a miniature is planned for."""


class Loaded(msgspec.Struct, kw_only=True):
    """A plan's weights, where it wants them."""

    key: str
    session: Session
    ram_bytes: int
    seconds: float


class Drawn(msgspec.Struct, kw_only=True):
    """What drawing a batch took."""

    seconds: dict[str, float] = msgspec.field(default_factory=dict)
    """Of encoding, of the first steps, and of decoding."""
    steps: list[float] = msgspec.field(default_factory=list)
    """Seconds of each that was timed."""
    peaks: dict[str, Peaks] = msgspec.field(default_factory=dict)
    """By phase."""
    given_back: int = 0
    """How often torch gave all pieces back in the steps that are timed."""


class Bench:
    """A machine, a model and its weights; runs one plan after the other."""

    def __init__(self, *, tiny: bool, steps: int, direct: bool = False) -> None:
        self._tiny, self._steps, self._direct = tiny, steps, direct
        self._plugins = load_plugins()
        self._hardware = _made_up() if tiny else autoflux.probe()
        if not tiny and not (self._hardware.accelerators and torch.cuda.is_available()):
            raise DeviceUnavailable("the full size is measured on a CUDA card, and there is none", hint="--tiny")
        self._card = Card(there=not tiny)
        self._lane = lane_for(torch.device("cpu" if tiny else "cuda"))
        self._folder = tempfile.TemporaryDirectory()
        self._weights = HostWeights(tiny=tiny)
        self._buffers = KeptBuffers(torch.device("cpu" if tiny else "cuda"))
        self._model: Model = self._weights.model(Path(self._folder.name))
        self._findings = Findings(packs=self._weights.packs()) if direct else NO_FINDINGS
        self._weight_bytes: int | None = None
        self._loaded: Loaded | None = None
        self._plans: dict[tuple[Setting, str], Plan] = {}
        self._pictures = 0
        self._idle = IdleRam()
        self._drawn_bytes: int | None = None
        """What drawing for the first time added to the process: libraries behind kernels, and their memory."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._unload()
        self._folder.cleanup()

    @property
    def machine(self) -> dict[str, Any]:
        """What rows of one file have in common."""
        device = "the processor" if self._tiny else self._hardware.accelerators[0].name
        return {
            "device": device,
            "model": self._model.name,
            "tiny": self._tiny,
            "direct": self._direct,
            "torch": version("torch"),
        }

    @property
    def highest_gb(self) -> float:
        """The highest cap there can be."""
        return self._hardware.accelerators[0].total_bytes.value / GB

    def alternatives(self, setting: Setting, count: int) -> list[str]:
        """What else could have been wished, so many of the fastest by prediction, as options of `autoflux plan`.

        Wishes that cannot be kept, or lead to what another has led to, are left out.
        """
        seen = {_key(self._planned(setting, ""))}
        found: list[tuple[float, str]] = []
        for options, wishes in _variations(_wishes(setting)):
            try:
                plan = self._plan(wishes)
            except (DoesNotFit, ContradictoryWishes):
                continue
            if _key(plan) not in seen and self._can(plan):
                seen.add(_key(plan))
                self._plans[setting, options] = plan
                found.append((plan.predicted.seconds_per_image, options))
        return [options for _, options in sorted(found)[:count]]

    def _can(self, plan: Plan) -> bool:
        """Whether this machine compiles, and attends so."""
        attentions = ("default", *self._hardware.accelerators[0].attention_tflops)
        return plan.attention in attentions and (not plan.compiled or "triton" in self._hardware.versions)

    def row(self, setting: Setting, alternative: str) -> Row:
        """Plan and run; what goes wrong is in the row."""
        began = time.perf_counter()
        try:
            plan = self._planned(setting, alternative)
        except DoesNotFit as error:
            return Row(setting=setting, alternative=alternative, error=error.message, refused=True)
        row = Row(
            setting=setting,
            alternative=alternative,
            way=_way(plan),
            predicted=_predicted(plan),
            predicted_phase_bytes=msgspec.to_builtins(plan.predicted.peak_vram_bytes),
        )
        try:
            row = self._run(row, plan)
        except (AutofluxError, torch.OutOfMemoryError, RuntimeError) as error:
            self._unload()
            row = msgspec.structs.replace(row, error=f"{type(error).__name__}: {error}")
        return msgspec.structs.replace(row, seconds=time.perf_counter() - began)

    def _planned(self, setting: Setting, alternative: str) -> Plan:
        if (setting, alternative) not in self._plans:
            self._plans[setting, alternative] = self._plan(_wishes(setting))
        return self._plans[setting, alternative]

    def _plan(self, wishes: Wishes) -> Plan:
        plan = api.plan_for(self._model, wishes, self._plugins, self._hardware, self._findings)
        return plan.replace(device="cpu", graphs=False) if self._tiny else plan

    def _run(self, row: Row, plan: Plan) -> Row:
        weight_bytes = self._prepare(plan)
        loaded, setup_seconds = self._load(plan, int(row.setting.cap_gb * GB))
        session = Session(loaded.session.pipeline, plan, self._model, keeps_to_plan=not self._tiny)
        with HighWater(self._resident_bytes) as ram:
            began, planned = self._resident_bytes(), max(plan.predicted.picture.steps, WARM_STEPS + 1 + self._steps)
            timed = max(self._steps, math.ceil(TIMED_SECONDS / plan.predicted.seconds_per_step))
            warm = self._draw(session, row.setting, of=planned, timed=0 if plan.compiled else timed)
            if self._drawn_bytes is None:
                self._drawn_bytes = max(0, self._resident_bytes() - began)
            drawn = self._draw(session, row.setting, of=planned, timed=2 * timed if plan.compiled else timed)
        taken = max(ram.nbytes, loaded.ram_bytes) - weight_bytes - self._idle.left_bytes(compiled=plan.compiled)
        batch, steps = row.setting.batch, plan.predicted.picture.steps
        step = statistics.median([*warm.steps, *drawn.steps])
        whole = drawn.seconds["encode"] + drawn.seconds["begin"] + (steps - WARM_STEPS) * step + drawn.seconds["decode"]
        return msgspec.structs.replace(
            row,
            measured=Figures(
                seconds_per_step=step,
                seconds_per_image=whole / batch,
                peak_vram_bytes=self._card.peak_bytes(),
                peak_ram_bytes=taken,
            ),
            allocated_bytes={phase: peak.allocated for phase, peak in drawn.peaks.items()},
            reserved_bytes={phase: peak.reserved for phase, peak in drawn.peaks.items()},
            context_bytes=self._card.context_bytes,
            exceeded=session.exceeded_plan,
            given_back=warm.given_back + drawn.given_back,
            setup_seconds=setup_seconds,
        )

    def _prepare(self, plan: Plan) -> int:
        """Have the weights that plans are loaded from; returns what they take of RAM."""
        self._weight_bytes = self._weight_bytes or self._weights.draw()
        if self._direct and not self._weights.are_there(plan):
            self._unload()  # making them takes some of the card
            made = self._weights.narrow(plan)
            self._weight_bytes += made
            self._idle.grow(made)
        return self._weight_bytes

    def _load(self, plan: Plan, cap_bytes: int) -> tuple[Loaded, float]:
        """The plan's weights where it wants them, and how long that took: no time if they are there already."""
        if self._loaded is not None and self._loaded.key == _key(plan):
            self._card.release()  # what torch keeps of the row before is not this one's
            self._card.restart()
            self._card.cap(cap_bytes, plan.priors.context_bytes)
            return self._loaded, 0.0
        self._unload()
        self._card.restart()
        self._card.cap(cap_bytes, plan.priors.context_bytes)
        began = time.perf_counter()
        with HighWater(self._resident_bytes) as ram, offered(self._buffers):
            session = self._weights.session(plan, self._model, direct=self._direct)
        seconds = time.perf_counter() - began
        taken = ram.nbytes - (self._drawn_bytes or 0)
        self._loaded = Loaded(key=_key(plan), session=session, ram_bytes=taken, seconds=seconds)
        return self._loaded, seconds

    def _unload(self) -> None:
        was, self._loaded = self._loaded, None
        if was is not None:
            was.session.close()
        self._card.release()
        self._card.uncap()
        self._buffers.take_back()
        if was is not None and self._pictures:
            self._idle.note(self._resident_bytes(), compiled=was.session.plan.compiled)

    def _resident_bytes(self) -> int:
        """RAM of the process, without what no plan asked for."""
        return resident_bytes() - self._buffers.idle_bytes

    def _draw(self, session: Session, setting: Setting, *, of: int, timed: int) -> Drawn:
        """Draw a batch: the first steps, then so many that are timed, and only these of the many that it is begun for,
        whose modulation is computed beforehand."""
        drawn = Drawn()
        with self._timed(drawn.seconds, "encode"):
            drawings = [session.begin(self._request(setting, of)) for _ in range(setting.batch)]
        drawn.peaks["encode"] = self._card.peaks()
        with self._timed(drawn.seconds, "begin"):
            for _ in range(WARM_STEPS):
                session.advance(drawings)
        before = self._card.given_back()
        drawn.steps += self._step_seconds(session, drawings, min(timed, of - WARM_STEPS - 1))
        drawn.given_back = self._card.given_back() - before
        drawn.peaks["denoise"] = self._card.peaks()
        with self._timed(drawn.seconds, "decode"):
            session.finish(drawings)
        drawn.peaks["decode"] = self._card.peaks()
        return drawn

    def _step_seconds(self, session: Session, drawings: list[Drawing], steps: int) -> list[float]:
        """Of so many that follow another, as in a picture: were the card waited for between them, it would be given the
        next one late."""
        marks = []
        for _ in range(1 + steps if steps else 0):
            session.advance(drawings)
            marks.append(self._mark())
        self._card.synchronize()
        return [began.elapsed_time(ended) / 1000 for began, ended in pairwise(marks)]

    def _mark(self) -> Mark:
        mark = self._lane.mark(timing=True)
        self._lane.set_computed(mark)
        return mark

    def _request(self, setting: Setting, steps: int) -> Request:
        """Another prompt each time, so that the text encoders run."""
        self._pictures += 1
        return Request(
            prompt=f"picture number {self._pictures}",
            seed=self._pictures,
            steps=steps,
            guidance=3.5,
            width=setting.width,
            height=setting.height,
        )

    @contextmanager
    def _timed(self, taken: dict[str, float], name: str) -> Iterator[None]:
        self._card.synchronize()
        began = time.perf_counter()
        yield
        self._card.synchronize()
        taken[name] = time.perf_counter() - began


def _made_up() -> Hardware:
    """A card that a miniature is planned for and that the processor stands in for: it multiplies bfloat16 only."""
    machine = known_machine(TINY_MACHINE)
    (card,) = machine.accelerators
    plain = card.replace(matmul_tflops={"bfloat16": card.matmul_tflops["bfloat16"]})
    return machine.replace(accelerators=(plain,), versions={})


def _wishes(setting: Setting) -> Wishes:
    return Wishes(
        device="cuda",
        vram_bytes=int(setting.cap_gb * GB),
        quality=setting.quality,
        width=setting.width,
        height=setting.height,
        batch=setting.batch,
    )


def _variations(wishes: Wishes) -> Iterator[tuple[str, Wishes]]:
    """What a user could wish beside, as options and as wishes."""
    for offload in (Offload.NONE, Offload.COMPONENT, Offload.STREAM):
        yield f"--offload {offload}", wishes.replace(offload=offload)
    for component in ("vae", "text_encoder", "text_encoder_2"):
        yield f"--keep {component}", wishes.replace(keep=(component,))
    yield "--cpu text_encoder_2", wishes.replace(cpu=("text_encoder_2",))
    yield "--block-size layer", wishes.replace(unit=TransferUnit.LAYER)
    for megabytes in (500, 1000, 2000):
        yield f"--block-size {megabytes}MB", wishes.replace(block_bytes=megabytes * GB // 1000)
    for graphs in (True, False):
        yield "--graphs" if graphs else "--no-graphs", wishes.replace(graphs=graphs)
    for percent in (95, 90, 85, 80, 70, 60, 50, 40, 35, 25, 15):
        share = (wishes.vram_bytes or 0) * percent // 100
        yield f"--vram {share / GB:g}GB", wishes.replace(vram_bytes=share)
    if wishes.quality != Quality.EXACT:
        yield from _inexact(wishes)


def _inexact(wishes: Wishes) -> Iterator[tuple[str, Wishes]]:
    """What changes bits."""
    for attention in ("default", "cudnn"):
        yield f"--attention {attention}", wishes.replace(attention=attention)
    formats = {"none": Precision.BFLOAT16, "fp8": Precision.FLOAT8, "int8": Precision.INT8}
    for name, quant in formats.items():
        for compiled in (True, False):
            option = "--compile" if compiled else "--no-compile"
            yield f"--quant {name} {option}", wishes.replace(quant=quant, compiled=compiled)


def _key(plan: Plan) -> str:
    """The same for plans that what is loaded for one of them serves."""
    # What was compiled for one size is compiled again for any size when another comes, and is slower then.
    picture = plan.predicted.picture if plan.compiled else None
    ways = [plan.arrangement, plan.hoist_modulation, plan.compiled, plan.attention, picture]
    return msgspec.json.encode(ways).decode()


def _way(plan: Plan) -> dict[str, Any]:
    transformer = plan.component("transformer")
    return {
        "offload": plan.offload,
        "storage": transformer.storage,
        "native": transformer.native,
        "compiled": plan.compiled,
        "graphs": plan.graphs,
        "attention": plan.attention,
        "resident_blocks": len(transformer.resident),
        "ring_bytes": plan.ring_bytes,
        "unit": plan.unit,
        "block_bytes": plan.block_bytes,
        "tiled": plan.tile_decode,
        "parked": plan.park_for_decode,
        "keeps_modulation": plan.keep_modulation,
        "placement": {part.name: part.placement for part in plan.components},
        "waiting": {part.name: part.waiting for part in plan.arrangement.streamed},
        "pinned_bytes": plan.predicted.pinned_bytes,
    }


def _predicted(plan: Plan) -> Figures:
    told = plan.predicted
    return Figures(
        seconds_per_step=told.seconds_per_step,
        seconds_per_image=told.seconds_per_image,
        peak_vram_bytes=told.peak_vram_bytes.peak,
        peak_ram_bytes=told.peak_ram_bytes,
    )
