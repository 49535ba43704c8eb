"""What the machine is, as frozen values. Every number says how it is known."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from autoflux.values import Value

SCHEMA = 1
"""Version of `Hardware`'s JSON. Raised when a field changes its name, unit or meaning."""


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


class Link(Value, frozen=True, kw_only=True):
    """How the device hangs on the host; None if unknown.

    `pcie_*` is what card and slot can do together, `current_*` what the link ran at while copies were measured.
    """

    pcie_generation: int | None = None
    pcie_width: int | None = None
    current_generation: int | None = None
    current_width: int | None = None
    transfers: tuple[Transfer, ...] = ()

    def to_device_gb_per_s(self, *, pinned: bool) -> Figure | None:
        """The best measured rate to the device, None when nothing was measured."""
        rates = [t.to_device_gb_per_s for t in self.transfers if t.pinned == pinned]
        return max(rates, key=lambda rate: rate.value, default=None)


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
    """Rate of a large matrix product by precision name (`bfloat16`, `float8_e4m3fn`, …), 10^12 operations a second."""

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

    def accelerator(self, kind: DeviceKind, index: int = 0) -> Accelerator | None:
        """The device of that kind and index, or None."""
        found = (a for a in self.accelerators if a.kind == kind and a.index == index)
        return next(found, None)
