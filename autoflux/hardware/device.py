"""A device as the measuring child handles it, and what becomes of measurements that fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from autoflux.hardware.values import DeviceKind, Figure, Source

T = TypeVar("T")


@dataclass
class Findings:
    """Runs measurements that may fail; what a driver throws becomes a line of text."""

    errors: list[str] = field(default_factory=list)

    def attempt(self, what: str, action: Callable[[], T]) -> T | None:
        try:
            return action()
        except Exception as error:  # noqa: BLE001 — drivers and torch throw whatever they like
            self.errors.append(f"{what}: {first_line(error)}")
            return None


@dataclass(frozen=True)
class Device:
    """A device by torch's name, and the torch module that synchronizes it."""

    torch: Any
    kind: DeviceKind
    index: int = 0

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.index}" if self.kind in (DeviceKind.CUDA, DeviceKind.XPU) else str(self.kind)

    @property
    def module(self) -> Any:
        return getattr(self.torch, self.kind)

    @property
    def is_nvidia(self) -> bool:
        """AMD's cards pose as CUDA too."""
        return self.kind == DeviceKind.CUDA and not self.torch.version.hip

    def synchronize(self) -> None:
        if self.kind in (DeviceKind.CUDA, DeviceKind.XPU):
            self.module.synchronize(self.index)
        elif self.kind == DeviceKind.MPS:
            self.module.synchronize()

    def release(self) -> None:
        """Give back what torch keeps of memory that is not used any more."""
        if self.kind != DeviceKind.CPU:
            self.module.empty_cache()


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def measured(value: float, note: str = "") -> Figure:
    return Figure(value=value, source=Source.MEASURED, note=note)
