"""Running out of device memory, told as an error that says what to do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from autoflux.errors import OutOfMemory
from autoflux.planning.values import Plan
from autoflux.units import format_bytes


@contextmanager
def translated_memory_errors(plan: Plan) -> Iterator[None]:
    """Turn torch's out-of-memory error into ours, after giving back what the allocator holds."""
    try:
        yield
    except Exception as error:
        # Looked up, not imported: a pipeline without torch can raise no error of torch's.
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(error, torch.OutOfMemoryError):
            raise
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        raise OutOfMemory(
            f"{plan.device} ran out of memory; the plan counted on {format_bytes(plan.vram_limit_bytes or 0)}",
            hint="close other programs on the device, or lower the ceiling with --vram so that more waits in RAM",
        ) from error
