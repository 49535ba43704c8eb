"""Running out of device memory, told as an error that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from autoflux.errors import OutOfMemory
from autoflux.planning.values import Plan
from autoflux.units import format_bytes


@contextmanager
def translated_memory_errors(plan: Plan) -> Iterator[None]:
    """Turn torch's out-of-memory error into ours, after giving back what the allocator holds."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        release_memory()
        have = format_bytes(plan.vram_limit_bytes or 0)
        raise OutOfMemory(
            f"{plan.device} ran out of memory; the plan counted on {have}",
            hint="close other programs on the device, or lower the ceiling with --vram so that more waits in RAM",
        ) from error


def release_memory() -> None:
    """Hand cached device memory back to the driver."""
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
