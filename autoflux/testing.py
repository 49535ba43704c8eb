"""Fakes to test plugins with: everything behaves as in a real service, but nothing is loaded and no torch is needed.

As a plugin (`AUTOFLUX_PLUGINS=autoflux.testing`) this module offers the backend `fake`, which draws a flat scene from
the prompt and the seed. `FakeDesk` is a whole service in one process::

    with FakeDesk() as desk:
        job = desk.submit(Order(prompt="a red circle"))
        png = desk.picture(desk.wait(job.id).id, 0)
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from autoflux.errors import DamagedCheckpoint
from autoflux.hardware.values import Disk, Hardware, Host, Size, Source
from autoflux.hookspecs import hookimpl
from autoflux.models.request import Request
from autoflux.models.values import Architecture, Block, Component, Defaults, Limits, Model, ParameterCount, Precision
from autoflux.planning.terms import Offload, Placement
from autoflux.planning.values import ComponentPlan, PhaseBytes, Picture, Plan, Predicted, Priors
from autoflux.runtime.pipeline import Backend, LoadProgress, Pipeline
from autoflux.serving.fakes import (
    BEHAVIOUR_VARIABLE,
    BUG,
    CRASH,
    FAIL,
    HANG,
    Behaviour,
    FakeWorker,
    draw,
    fail_if_asked,
)
from autoflux.serving.jobs import Job
from autoflux.serving.service import Service

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

__all__ = [
    "BEHAVIOUR_VARIABLE",
    "BUG",
    "CRASH",
    "FAIL",
    "HANG",
    "Behaviour",
    "FakeBackend",
    "FakeDesk",
    "FakePipeline",
    "FakePrepared",
    "FakeWorker",
    "draw",
    "fake_hardware",
    "fake_model",
    "fake_plan",
    "fake_prepare",
]


@dataclass
class FakeConditioning:
    prompt: str
    dropped_text: str = ""


@dataclass
class FakeState:
    request: Request
    step: int = 0


@dataclass
class FakePipeline(Pipeline):
    """Draws with `draw`. Words in the prompt make it misbehave, see `CRASH` and its neighbours."""

    behaviour: Behaviour = field(default_factory=Behaviour)

    def encode(self, prompts: Sequence[str]) -> list[FakeConditioning]:  # type: ignore[override]
        return [FakeConditioning(prompt) for prompt in prompts]

    def pack(self, _conditioning: FakeConditioning) -> dict[str, Tensor]:  # type: ignore[override]
        return {}  # encoding costs nothing, and tensors would need torch

    def unpack(self, _tensors: dict[str, Tensor], prompt: str) -> FakeConditioning:
        return FakeConditioning(prompt)

    def start(self, request: Request, _conditioning: FakeConditioning) -> FakeState:  # type: ignore[override]
        return FakeState(request)

    def denoise(self, states: Sequence[FakeState]) -> None:  # type: ignore[override]
        time.sleep(self.behaviour.step_seconds)
        for state in states:
            _misbehave(state.request.prompt)
            state.step += 1

    def decode(self, states: Sequence[FakeState]) -> list[Image]:  # type: ignore[override]
        return [draw(state.request) for state in states]

    def block_lists(self) -> dict[str, object]:  # type: ignore[override]
        return {}

    def close(self) -> None:
        pass


def _misbehave(prompt: str) -> None:
    if CRASH in prompt:
        sys.stderr.write("crashing, as the prompt asks\n")
        sys.stderr.flush()
        os._exit(9)
    if HANG in prompt:
        threading.Event().wait()
    fail_if_asked(prompt)


class FakeBackend(Backend):
    """Builds a FakePipeline; it acts as the environment variable `AUTOFLUX_FAKE` says."""

    name = "fake"

    def missing(self) -> str | None:
        return None

    def build(self, plan: Plan, model: Model, progress: LoadProgress) -> Pipeline:  # noqa: ARG002
        behaviour = Behaviour.from_environment()
        for tenth in range(10):
            progress("loading the fake", tenth / 10)
            time.sleep(behaviour.load_seconds / 10)
        if behaviour.broken:
            raise DamagedCheckpoint("the fake weights are damaged", hint="fetch them again")
        return FakePipeline(behaviour)


@hookimpl
def register_backends(register: Callable[[Backend], None]) -> None:
    register(FakeBackend())


def fake_model() -> Model:
    """A model of a few parameters whose default picture has 128x128 pixels and 4 steps."""
    weights = Block(parameters=ParameterCount(matmul=1000), disk_bytes=2000)
    parts = (("text_encoder", "CLIP"), ("text_encoder_2", "T5"), ("transformer", "Flux"), ("vae", "VAE"))
    components = tuple(
        Component(name=name, class_name=kind, disk_precision=Precision.BFLOAT16, rest=weights) for name, kind in parts
    )
    return Model(
        name="fake",
        path="/nowhere",
        revision="fake",
        architecture=Architecture(
            hidden_size=64,
            head_count=2,
            double_blocks=1,
            single_blocks=1,
            patch_pixels=16,
            guidance=True,
            text_hidden_size=64,
            text_layers=1,
            text_parameters=1000,
            vae_channels=(8, 8),
            vae_layers=1,
            latent_channels=4,
        ),
        components=components,
        defaults=Defaults(steps=4, guidance=3.5, width=128, height=128, text_tokens=64),
        limits=Limits(max_side=1024, max_pixels=1024 * 1024, max_steps=1000, max_prompt_characters=1000),
    )


def fake_hardware() -> Hardware:
    """A computer with 8 GB of RAM and no accelerator."""
    size = Size(value=8_000_000_000, source=Source.REPORTED)
    host = Host(system="fake", processor="fake", cores=2, total_bytes=size, available_bytes=size, pinnable_bytes=size)
    return Hardware(
        fingerprint="fake",
        probed_at="2026-01-01T00:00:00Z",
        versions={},
        host=host,
        disk=Disk(path="/", free_bytes=size),
    )


def fake_plan(model: Model | None = None) -> Plan:
    """Run the model with the backend `fake` on the CPU, at most 4 pictures at once."""
    model = model or fake_model()
    nothing = PhaseBytes(encode=0, denoise=0, decode=0)
    picture = Picture(width=128, height=128, steps=4, text_tokens=64)
    return Plan(
        model=model.name,
        model_path=model.path,
        model_revision=model.revision,
        fingerprint="fake",
        profile="fake",
        backend=FakeBackend.name,
        device="cpu",
        offload=Offload.NONE,
        components=tuple(_component_plan(component) for component in model.components),
        priors=_priors(),
        max_batch=4,
        vram_limit_bytes=None,
        ram_limit_bytes=8_000_000_000,
        predicted=Predicted(
            picture=picture,
            seconds_per_step=0.001,
            seconds_per_image=0.005,
            seconds_to_start=0.1,
            peak_vram_bytes=nothing,
            peak_ram_bytes=1_000_000,
        ),
    )


def _component_plan(component: Component) -> ComponentPlan:
    return ComponentPlan(
        name=component.name, storage=Precision.FLOAT32, arithmetic=Precision.FLOAT32, placement=Placement.DEVICE
    )


def _priors() -> Priors:
    return Priors(
        matmul_tflops=0.1,
        step_efficiency=0.5,
        vae_efficiency=0.5,
        block_seconds=0.0,
        link_gb_per_s=1.0,
        disk_gb_per_s=1.0,
        start_seconds=0.0,
        reserve_bytes=0,
        context_bytes=0,
        host_bytes=0,
        denoise_activations=1.0,
        decode_activations=1.0,
    )


@dataclass(frozen=True)
class FakePrepared:
    """What a preparation of the fakes gives."""

    hardware: Hardware
    model: Model
    plan: Plan


def fake_prepare(on_stage: Callable[[str], None]) -> FakePrepared:
    """A preparation that is done at once."""
    on_stage("preparing")
    model = fake_model()
    return FakePrepared(fake_hardware(), model, fake_plan(model))


class FakeDesk(Service):
    """A service in one process that draws with `draw`: what a test gives to a frontend's `build`."""

    def __init__(self, behaviour: Behaviour | None = None, *, max_queued: int = 1000) -> None:
        super().__init__(fake_model(), FakeWorker(behaviour), max_queued=max_queued)
        self.start(fake_prepare)

    def wait(self, job_id: str, seconds: float = 30.0) -> Job:
        """The job when it is finished. Raises TimeoutError."""
        end = time.monotonic() + seconds
        while not (job := self.job(job_id)).state.finished:
            if time.monotonic() > end:
                raise TimeoutError(f"job {job_id} is still {job.state} after {seconds:g} s")
            time.sleep(0.01)
        return job

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()
