"""What the machine is, as frozen values. Every number says how it is known."""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import StrEnum
from typing import Literal, Self

import msgspec

from autoflux.errors import DamagedFile
from autoflux.values import Value

SCHEMA = 2
"""Version of `Hardware`'s JSON. Raised when a field changes its name, unit or meaning.

2: `matmul_tflops` of accelerators is at the sizes of FLUX's layers (in 1 at squares), `float8_e4m3fn` scaled by row.
"""

NEVER = "never"
"""When a machine was probed that is only known by name."""

FLUX_IMAGE_TOKENS = 4096
"""A picture of 1024 x 1024: a token is 16 pixels wide and high."""

FLUX_TEXT_TOKENS = 512
"""The longest prompt of FLUX.1-dev."""

LEAST_KERNEL_CAPABILITY = (8, 0)
"""Compute capability of the oldest cards that kernels of our own run on: those that Triton supports, by its README."""

LEAST_CUDNN = (8, 0)
"""Compute capability from which cuDNN has fused attention: `check_cudnn_hardware_support` in torch's sdp_utils.cpp."""

CAPABILITY = r"^[0-9]{1,3}\.[0-9]{1,3}$"
"""What a compute capability looks like: major and minor."""

BlockKind = Literal["double", "single"]


class Source(StrEnum):
    """How a figure is known. A measured one beats a reported one beats an assumed one."""

    MEASURED = "measured"
    REPORTED = "reported"
    ASSUMED = "assumed"


class DeviceKind(StrEnum):
    """torch's device types that autoflux runs on."""

    CUDA = "cuda"
    MPS = "mps"
    XPU = "xpu"
    CPU = "cpu"


class Figure(Value, frozen=True, kw_only=True):
    """A number and how it is known. The field that holds it names the unit; `note` says how, or what went wrong."""

    value: float
    source: Source
    note: str = ""


class Size(Value, frozen=True, kw_only=True):
    """A whole number of bytes and how it is known."""

    value: int
    source: Source
    note: str = ""


class Transfer(Value, frozen=True, kw_only=True):
    """The rate of copies of `block_bytes` between host and device, in units of 10^9 bytes a second."""

    block_bytes: int
    pinned: bool
    to_device_gb_per_s: Figure
    to_host_gb_per_s: Figure

    @property
    def is_positive(self) -> bool:
        """Whether both rates are numbers that a copy can have."""
        rates = (self.to_device_gb_per_s.value, self.to_host_gb_per_s.value)
        return all(math.isfinite(rate) and rate > 0 for rate in rates)


class Link(Value, frozen=True, kw_only=True):
    """How the device hangs on the host; None if unknown.

    `pcie_*` is what card and slot can do together, `current_*` what the link ran at while copies were measured.
    `pin_seconds_per_gb` is how long 10^9 bytes of RAM take to be pinned for this device.
    """

    pcie_generation: int | None = None
    pcie_width: int | None = None
    current_generation: int | None = None
    current_width: int | None = None
    transfers: tuple[Transfer, ...] = ()
    pin_seconds_per_gb: Figure | None = None

    def to_device_gb_per_s(self, *, pinned: bool) -> Figure | None:
        """The best measured rate to the device, None when nothing was measured."""
        rates = [t.to_device_gb_per_s for t in self.transfers if t.pinned == pinned]
        return max(rates, key=lambda rate: rate.value, default=None)

    def gb_per_s(self, block_bytes: int, *, pinned: bool = True, to_device: bool = True) -> Figure | None:
        """The rate of copies of `block_bytes`, None when no copies of that sort were measured.

        Between two measured sizes it lies on a straight line through both on double logarithmic paper. So it is never
        beyond either of them, and a larger copy never takes less time unless it was measured to. Below the smallest
        and above the largest measured size it is theirs.
        """
        rates = {t.block_bytes: t.to_device_gb_per_s if to_device else t.to_host_gb_per_s for t in self._of(pinned)}
        below = max((size for size in rates if size <= block_bytes), default=None)
        above = min((size for size in rates if size >= block_bytes), default=below)
        below = above if below is None else below
        if below is None or above is None:
            return None
        if below == above:
            return rates[below]
        share = math.log(block_bytes / below) / math.log(above / below)
        return _between(rates[below], rates[above], share).replace(note=f"between {below} and {above} bytes")

    def _of(self, pinned: bool) -> Iterable[Transfer]:  # noqa: FBT001 — read as a filter
        """Those that can be reckoned with: a file may hold anything."""
        return (t for t in self.transfers if t.pinned == pinned and t.block_bytes > 0 and t.is_positive)


def _between(low: Figure, high: Figure, share: float) -> Figure:
    """The geometric mean of both, weighted; no better known than the worse known of them."""
    value = low.value ** (1 - share) * high.value**share
    floor, ceiling = sorted((low.value, high.value))
    worse = max(low.source, high.source, key=list(Source).index)
    return Figure(value=min(max(value, floor), ceiling), source=worse)  # rounding must not lead beyond them


class BlockTiming(Value, frozen=True, kw_only=True):
    """How long a block of FLUX's shape computes for, uncompiled, with `precision` weights and no modulation layers."""

    seconds: Figure
    launch_seconds: Figure | None = None
    """What the host takes to tell the device to do it: no block takes less, however few its tokens. None if it was not
    measured."""
    precision: str
    hidden_size: int
    image_tokens: int
    text_tokens: int

    @property
    def operations(self) -> float:
        """Multiplications and additions; a double and a single block take the same."""
        return block_operations(self.hidden_size, self.image_tokens + self.text_tokens)


def block_operations(hidden_size: int, tokens: int) -> float:
    """A token meets 12 h² weights, each a multiplication and an addition; attention comes on top."""
    return 24 * hidden_size**2 * tokens + attention_operations(hidden_size, tokens)


def attention_operations(hidden_size: int, tokens: int) -> float:
    """Queries times keys and weights times values: twice 2 h a pair of tokens."""
    return 4 * hidden_size * tokens**2


class Accelerator(Value, frozen=True, kw_only=True):
    """One device that computes: a card, or the unified chip of a laptop.

    `usable_bytes` is what one process can have: free memory less what the driver keeps (under Windows WDDM about
    1.5 GB); on a unified chip it is a share of the host's RAM and must not be counted again there.
    """

    kind: DeviceKind
    index: int
    name: str
    uuid: str | None = None
    capability: str | None = None
    driver: str | None = None
    total_bytes: Size
    free_bytes: Size
    usable_bytes: Size
    unified_memory: bool = False
    link: Link | None = None
    matmul_tflops: dict[str, Figure] = msgspec.field(default_factory=dict)
    """Sustained rate of a large matrix product by precision name (`bfloat16`, `float8_e4m3fn`, …), 10^12 operations a
    second. In one byte it is that of the product alone, without making the numbers narrow."""
    attention_tflops: dict[str, Figure] = msgspec.field(default_factory=dict)
    """Sustained rate of attention, 4 h N² operations, by what computes it: `default` is torch's choice, or `cudnn`."""
    blocks: dict[BlockKind, BlockTiming] = msgspec.field(default_factory=dict)

    def is_at_least(self, capability: tuple[int, int]) -> bool:
        """Whether it has that compute capability; taken to be so where that is not known."""
        return self.capability is None or tuple(map(int, self.capability.split("."))) >= capability

    def block_seconds(
        self, kind: BlockKind, *, image_tokens: int = FLUX_IMAGE_TOKENS, text_tokens: int = FLUX_TEXT_TOKENS
    ) -> Figure | None:
        """How long a block of FLUX.1 (3072 wide) computes for with so many tokens; None if it was not timed.

        For another number of tokens than was timed it is scaled by operations, and then assumed.
        """
        timing = self.blocks.get(kind)
        if timing is None:
            return None
        if (timing.image_tokens, timing.text_tokens) == (image_tokens, text_tokens):
            return timing.seconds
        factor = block_operations(timing.hidden_size, image_tokens + text_tokens) / timing.operations
        note = f"scaled from {timing.image_tokens} + {timing.text_tokens} tokens"
        return Figure(value=timing.seconds.value * factor, source=Source.ASSUMED, note=note)

    @property
    def device(self) -> str:
        """The name torch uses: `cuda:0`."""
        return f"{self.kind}:{self.index}" if self.kind in (DeviceKind.CUDA, DeviceKind.XPU) else str(self.kind)


class Host(Value, frozen=True, kw_only=True):
    """The computer around the accelerators. All memory figures respect the container's limit (cgroup)."""

    system: str
    processor: str
    cores: int
    total_bytes: Size
    available_bytes: Size
    container_limit_bytes: int | None = None
    pinnable_bytes: Size
    copy_gb_per_s: Figure | None = None
    matmul_tflops: dict[str, Figure] = msgspec.field(default_factory=dict)


class Disk(Value, frozen=True, kw_only=True):
    """The file system that the models lie on."""

    path: str
    free_bytes: Size
    read_gb_per_s: Figure | None = None


class Problem(Value, frozen=True, kw_only=True):
    """Something that could not be found out, and why; a probe reports it instead of failing."""

    subject: str
    message: str
    hint: str | None = None


class Hardware(Value, frozen=True, kw_only=True):
    """Everything the planner knows of a machine. Saved by `autoflux probe --json`, kept in the cache by fingerprint."""

    schema: int = SCHEMA
    fingerprint: str
    probed_at: str
    versions: dict[str, str]
    accelerators: tuple[Accelerator, ...] = ()
    host: Host
    disk: Disk
    problems: tuple[Problem, ...] = ()
    disturbed: int = 0
    """How many times in a row other programs computed while this machine was measured; 0 if the last time was quiet."""

    def accelerator(self, kind: DeviceKind, index: int = 0) -> Accelerator | None:
        """The device of that kind and index, or None."""
        found = (a for a in self.accelerators if a.kind == kind and a.index == index)
        return next(found, None)

    @classmethod
    def from_json(cls, text: str | bytes, *, origin: str = "the text") -> Self:
        """Read what `to_json` wrote.

        Raises:
            DamagedFile: it is of another version, or not JSON, or has an unknown or missing key or a wrong type.
        """
        _check_schema(text, origin)
        return super().from_json(text, origin=origin)


class _Versioned(msgspec.Struct):
    schema: int = SCHEMA


def _check_schema(text: str | bytes, origin: str) -> None:
    """Before the fields are looked at, because those of another version may have other names."""
    try:
        found = msgspec.json.decode(text, type=_Versioned).schema
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return  # what is wrong with it is said by whoever reads the fields
    if found != SCHEMA:
        raise DamagedFile(
            f"{origin} was written by another version of autoflux: its schema is {found}, {SCHEMA} is read here",
            hint="measure that machine again with this version: autoflux probe --refresh",
        )
