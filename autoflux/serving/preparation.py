"""What happens between opening the port and starting the worker: measuring the machine and planning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from autoflux.errors import AutofluxError, ErrorReport
from autoflux.hardware.values import Hardware
from autoflux.models.values import Model
from autoflux.planning.values import Plan


class Prepared(Protocol):
    """Everything a worker needs to know."""

    @property
    def hardware(self) -> Hardware: ...
    @property
    def model(self) -> Model: ...
    @property
    def plan(self) -> Plan: ...


Prepare = Callable[[Callable[[str], None]], Prepared]
"""Called in a thread with a function to tell what is being done."""


def revive(report: ErrorReport) -> AutofluxError:
    """The exception that a report was made from, as far as its code tells; for the exit code of the program."""
    kinds = [AutofluxError]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    matching = next((kind for kind in kinds if kind.code == report.code), AutofluxError)
    error = matching.__new__(matching)
    AutofluxError.__init__(error, report.message, hint=report.hint, param=report.param)
    return error
