"""What the user wished, what a hardware class prefers, and what was decided, as frozen values."""

from __future__ import annotations

from typing import Annotated

import msgspec

from autoflux.hardware.values import CAPABILITY, BlockKind, DeviceKind
from autoflux.models.values import Precision
from autoflux.planning.ranges import Activations, Bytes, Multiple, Rate, Rows, Seconds, Share
from autoflux.planning.terms import Offload, Origin, Placement, Quality, TransferUnit, Waiting
from autoflux.values import Value

PLAN_SCHEMA = 3
"""Version of `Plan`'s JSON. Raised when a field changes its name, unit or meaning.

2: `waiting` is each component's own; components say whether they multiply narrow numbers; the way blocks are compiled,
attended and transferred.
3: `origin` of choices is that of the figures behind them; `rejected` says what each way takes and why it was not taken.
"""


MOST_PICTURES = 64
"""At once, which is also the most that `--batch` takes."""

Count = Annotated[int, msgspec.Meta(ge=1)]


class Wishes(Value, frozen=True, kw_only=True):
    """What the user said. None means: choose. A wish only constrains and is never overridden."""

    device: str | None = None
    """`cpu`, `cuda`, `cuda:1`, `mps`, `xpu`."""
    backend: str | None = None
    profile: str | None = None
    offload: Offload | None = None
    precision: Precision | None = None
    """Of activations, and of weights that are not in 8 bits."""
    quality: Quality | None = None
    quant: Precision | None = None
    """Of the transformer's weights: an 8-bit format, or a wide one for none."""
    keep: tuple[str, ...] = ()
    """Components whose weights are to stay on the device."""
    cpu: tuple[str, ...] = ()
    """Components that the processor is to compute."""
    unit: TransferUnit | None = None
    block_bytes: Count | None = None
    """Most bytes of one copy of several blocks; a larger block is copied by itself."""
    batch: Annotated[int, msgspec.Meta(ge=1, le=MOST_PICTURES)] | None = None
    """Pictures that must fit at once."""
    compiled: bool | None = None
    graphs: bool | None = None
    """Replay blocks from CUDA graphs."""
    attention: str | None = None
    vram_bytes: Count | None = None
    ram_bytes: Count | None = None
    pictures: Count | None = None
    """How many are to be drawn: time to start is spread over them."""
    width: int | None = None
    height: int | None = None
    steps: int | None = None


Positive = Annotated[float, msgspec.Meta(gt=0)]
Factor = Annotated[float, msgspec.Meta(gt=0.01, lt=100)]
Capability = Annotated[str, msgspec.Meta(pattern=CAPABILITY)]


class Match(Value, frozen=True, kw_only=True):
    """The devices a profile is for. None matches all; capabilities compare as major.minor."""

    kind: DeviceKind
    min_capability: Capability | None = None
    max_capability: Capability | None = None
    name_contains: str | None = None


class Priors(Value, frozen=True, kw_only=True):
    """Stand-ins for what was not measured, and efficiencies that no probe can see. `Profile.sources` says whence."""

    matmul_tflops: Rate
    """Rate assumed when the probe has none, 10^12 operations a second."""
    product_rows: Rows = 1
    """Rows of which a matrix product computes no fewer at once."""
    attention_share: Share = 1.0
    """Rate of attention as a share of the matmul rate, where it was not measured."""
    step_efficiency: Share
    """Share of a step that products and attention take, uncompiled, where no block was timed."""
    compiled_rest: Share = 1.0
    """What compiling leaves of the time that a block takes beside products and attention."""
    compile_seconds: Seconds = 0.0
    """Compiling the blocks, at the first step."""
    widen_gb_per_s: Rate = 100.0
    """Weights in 8 bits that the device widens in a second, 10^9 bytes."""
    vae_efficiency: Share
    block_seconds: Seconds
    """Least time of a block, uncompiled: launching its kernels."""
    pause_seconds: Seconds = 0.0
    """What a step takes beside its blocks: embeddings, the sampler, and launching them."""
    link_gb_per_s: Rate
    disk_gb_per_s: Rate
    start_seconds: Seconds
    """Importing torch and the backend, creating the device context."""
    reserve_bytes: Bytes
    """Device memory left free for others."""
    context_bytes: Bytes
    """Device memory that the driver and libraries take beside tensors; not counted by torch."""
    allocator_bytes: Bytes = 0
    """Device memory that torch keeps beside tensors, in pieces and for libraries, whatever is computed."""
    host_bytes: Bytes
    """RAM of the process without weights."""
    compiler_bytes: Bytes = 0
    """RAM that compiling adds to it."""
    ram_reserve_bytes: Bytes = 0
    """RAM left free for others, beyond what the system says is not available."""
    denoise_activations: Activations
    """Peak activation bytes of a denoise step in units of tokens x hidden size x item bytes."""
    compiled_activations: Share = 1.0
    """What compiling leaves of these bytes."""
    unfused_activations: Multiple = 1.0
    """How many times as many they are without kernels of our own, which need Triton."""
    decode_activations: Activations
    """Peak activation bytes of the VAE decode in units of pixels x widest full-resolution channels x item bytes."""
    float32_decode: Multiple = 1.0
    """How many times as many of these units a decode in float32 takes."""


class Profile(Value, frozen=True, kw_only=True):
    """What is known of a hardware class beforehand: a match rule, preferences and priors."""

    name: str
    description: str
    match: Match
    precision: Annotated[tuple[Precision, ...], msgspec.Meta(min_length=1)]
    """Arithmetic precisions, best first."""
    eight_bit: tuple[Precision, ...] = ()
    """8-bit formats whose arithmetic the hardware has and that pay off there, best first."""
    priors: Priors
    sources: dict[str, str]
    """For each prior, where it was measured or read."""


class HostProfile(Value, frozen=True, kw_only=True):
    """What differs on computers with little RAM, whatever they compute on: laid over the device's profile there."""

    name: str
    description: str
    max_ram_bytes: Annotated[int, msgspec.Meta(gt=0)]
    """For hosts with no more RAM than this, as the system reports it."""
    priors: dict[str, int | float]
    sources: dict[str, str]
    """For each prior given here, where it was measured or read."""


class Instead(Value, frozen=True, kw_only=True):
    """The next best to what was chosen, and what a plan with it would take."""

    value: str
    seconds_per_step: float
    seconds_per_image: float
    seconds_to_start: float
    peak_vram_bytes: int
    peak_ram_bytes: int
    lacks: str = ""
    """Need against have, if it does not fit."""


class Choice(Value, frozen=True, kw_only=True):
    """One decision of the planner, for people: what, which, why, and how what the reason rests on is known."""

    topic: str
    value: str
    reason: str
    origin: Origin
    instead: Instead | None = None
    """Only in plans that were to be explained, and where there is another way."""


class ComponentPlan(Value, frozen=True, kw_only=True):
    """How one component is held and computed."""

    name: str
    storage: Precision
    """Of weights; in 8 bits only the matrices of blocks, and everything else in `arithmetic`."""
    arithmetic: Precision
    """Of activations."""
    native: bool = False
    """Multiply 8-bit weights with activations in 8 bits, instead of widening them at each use."""
    placement: Placement
    waiting: Waiting = Waiting.PINNED
    """Where streamed weights wait."""
    resident: tuple[int, ...] = ()
    """Numbers of the blocks that stay on the device while the others are streamed."""
    packed_bytes: int = 0
    """What is read of its pack; 0 if it is read from the model's own files."""

    @property
    def is_narrow(self) -> bool:
        """Whether its blocks are in 8 bits."""
        return self.storage.item_bytes == 1


class Arrangement(Value, frozen=True, kw_only=True):
    """Where all weights are. What has a default is for streamed ones."""

    components: tuple[ComponentPlan, ...]
    ring_bytes: int = 0
    keep_modulation: bool = False
    tile_decode: bool = False
    park_for_decode: bool = False
    unit: TransferUnit = TransferUnit.BLOCK
    block_bytes: int = 0
    compiled: bool = False
    """Whether blocks are compiled, which leaves less beside the weights."""
    graphs: bool = False
    """Whether blocks are replayed from CUDA graphs, which keep the memory that blocks compute in."""

    def component(self, name: str) -> ComponentPlan:
        """The component of that name; KeyError if there is none."""
        return {c.name: c for c in self.components}[name]

    @property
    def streamed(self) -> tuple[ComponentPlan, ...]:
        """The components that are streamed."""
        return tuple(c for c in self.components if c.placement == Placement.STREAMED)


class PhaseBytes(Value, frozen=True, kw_only=True):
    """Bytes by phase of drawing a picture."""

    encode: int
    denoise: int
    decode: int

    def __add__(self, other: PhaseBytes) -> PhaseBytes:
        return PhaseBytes(
            encode=self.encode + other.encode,
            denoise=self.denoise + other.denoise,
            decode=self.decode + other.decode,
        )

    @property
    def peak(self) -> int:
        return max(self.encode, self.denoise, self.decode)


class Picture(Value, frozen=True, kw_only=True):
    """What the prediction is for: one picture of this size and effort."""

    width: int
    height: int
    steps: int
    text_tokens: int
    batch: int = 1


class Predicted(Value, frozen=True, kw_only=True):
    """What the plan will take. Peaks count everything the process puts on the device, its context included."""

    picture: Picture
    block_seconds: dict[BlockKind, float] = msgspec.field(default_factory=dict)
    """What a double and a single block compute for."""
    copy_gb_per_s: float = 0.0
    """At which streamed weights of the transformer arrive."""
    streamed_bytes: int = 0
    """Weights that are copied to the device in each step."""
    seconds_per_step: float
    seconds_per_image: float
    seconds_to_start: float
    peak_vram_bytes: PhaseBytes
    peak_ram_bytes: int
    pinned_bytes: int = 0


class Correction(Value, frozen=True, kw_only=True):
    """By what runs of this model multiply what measured rates and priors alone say; 1 is as these say."""

    blocks: Factor = 1.0
    """Times of blocks."""
    copies: dict[Waiting, Factor] = msgspec.field(default_factory=dict)
    """Rates at which weights arrive that wait there."""
    around: Factor = 1.0
    """Time of a picture beside its steps."""
    start: Factor = 1.0


class Calibrated(Value, frozen=True, kw_only=True):
    """What a prediction was corrected by, from how many measured steps, and when they were last added to."""

    made_at: str
    steps: int
    correction: Correction


class Alternative(Value, frozen=True, kw_only=True):
    """A way to run, what it would take, and why it was not taken."""

    device: str
    offload: Offload
    precision: Precision
    """Of the transformer's weights."""
    native: bool = False
    compiled: bool = False
    quality: Quality
    """How far it goes, whatever may be gone to."""
    fits: bool
    reason: str
    """Need against have if it does not fit; what it is slower or less exact than if it does."""
    seconds_per_step: float
    seconds_per_image: float
    seconds_to_start: float
    peak_vram_bytes: int
    peak_ram_bytes: int
    pinned_bytes: int = 0


class Plan(Value, frozen=True, kw_only=True):
    """How a model will run on a machine. Saved, printed, compared, and run again with `--plan`."""

    schema: int = PLAN_SCHEMA
    model: str
    model_path: str
    model_revision: str
    fingerprint: str
    """Of the hardware it was made for."""
    profile: str
    priors: Priors
    """What the profile assumed, so that the plan can judge other picture sizes later."""
    backend: str
    device: str
    unified_memory: bool = False
    offload: Offload
    components: tuple[ComponentPlan, ...]
    ring_bytes: int = 0
    """Device memory that streamed weights pass through, or that the backend's own offload may fill with weights."""
    hoist_modulation: bool = False
    """Compute the modulation of all steps before the first, so that its weights are not needed in the loop."""
    keep_modulation: bool = False
    """With it, keep the weights of the modulation on the device, instead of copying them for each picture."""
    tile_decode: bool = False
    """Decode large pictures in parts, because whole they would not fit."""
    park_for_decode: bool = False
    """Take the blocks that stay off the device while a picture is decoded, to make room, and bring them back."""
    unit: TransferUnit = TransferUnit.BLOCK
    """The least that one copy moves; `block_bytes` may make it several blocks."""
    block_bytes: int = 0
    compiled: bool = False
    """Compile the transformer's blocks, which takes its time at the first step."""
    graphs: bool = False
    """Replay the transformer's blocks from CUDA graphs, so that the device need not wait for the host's launches."""
    attention: str = "default"
    """What computes attention: `default`, torch's own choice, or `cudnn`."""
    quality: Quality = Quality.BALANCED
    max_batch: int
    vram_limit_bytes: int | None
    """Ceiling of device memory, None on the CPU."""
    ram_limit_bytes: int
    predicted: Predicted
    calibrated: Calibrated | None = None
    """What runs on this machine have changed in the prediction; None if there were none."""
    machine: str | None = None
    """What the other machine that it was made for was called (`plan --on`); None for the machine it was made on."""
    choices: tuple[Choice, ...] = ()
    rejected: tuple[Alternative, ...] = ()
    """What else was looked at; in plans that were to be compared the best of every device, strategy, precision and
    quality."""
    warnings: tuple[str, ...] = ()

    @property
    def arrangement(self) -> Arrangement:
        """Where all weights are."""
        return Arrangement(
            components=self.components,
            ring_bytes=self.ring_bytes,
            keep_modulation=self.keep_modulation,
            tile_decode=self.tile_decode,
            park_for_decode=self.park_for_decode,
            unit=self.unit,
            block_bytes=self.block_bytes,
            compiled=self.compiled,
            graphs=self.graphs,
        )

    @property
    def waiting(self) -> Waiting:
        """Where streamed weights of the transformer wait."""
        return self.component("transformer").waiting

    def component(self, name: str) -> ComponentPlan:
        """The plan of the component of that name; KeyError if there is none."""
        return {c.name: c for c in self.components}[name]
