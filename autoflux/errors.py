"""Every error autoflux raises on purpose.

AutofluxError                 exit 1
├── UsageError                exit 2   what the user asked for cannot be read or is out of range
│   ├── InvalidRequest                 one field of a picture request; `param` names it
│   ├── UnknownName                    no model, backend, frontend or profile of that name
│   ├── NotKept                        a job or picture that never was, or is not kept any more
│   ├── PlanUnusable                   a saved plan is of another machine, model or version
│   └── ContradictoryWishes            two wishes exclude each other
├── DoesNotFit                exit 3   the model cannot run on this machine under these wishes
├── DeviceUnavailable                  the device asked for is not there or cannot be used
├── ModelNotFound                      no model at that path
├── UnsupportedModel                   a model of another family or layout
├── UnsafeCheckpoint                   weights in a format that can run code (pickle)
├── DamagedCheckpoint                  weights or configuration that cannot be right
├── DamagedFile                        a saved plan, probe, profile or cache that cannot be read
│   └── DamagedPack                    packed weights that are not what was written
│       └── UnreadablePack             packed weights that may be whole, and cannot be read now
├── MissingExtra                       an optional package is needed; the hint is the pip command
├── PluginConflict                     two plugins registered the same name
├── PluginFailure                      a plugin broke a promise of its interface
├── OutputUnwritable                   the result cannot be saved where the user asked
├── DiskFull                           no room for a download or a file
├── HubUnavailable                     a hub cannot be reached, or the user works offline
├── AccessDenied                       a hub wants a token, or its terms accepted first
├── DamagedDownload                    what a hub sends cannot be right; nothing of it is kept
├── ServiceUnavailable                 the port is taken, the worker is gone
│   └── QueueFull                      too many jobs wait
├── TuningFailed                       none of the plans that were to be run could be
└── OutOfMemory                        the device ran out of memory during a run

A message says what happened and what was needed, in lower case, with values in repr; the hint is one thing to try.
`describe` is the only place that turns an exception into what a user reads.
"""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable
from typing import ClassVar

import msgspec


class ErrorReport(msgspec.Struct, frozen=True, kw_only=True):
    """An error as data: the `error` member of every JSON envelope and of every failed job."""

    code: str
    message: str
    hint: str | None = None
    param: str | None = None


class AutofluxError(Exception):
    """Base of every deliberate error: a message for people, a stable code for programs, an exit code for shells."""

    code: ClassVar[str] = "failed"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.param = param

    def report(self) -> ErrorReport:
        return ErrorReport(code=self.code, message=self.message, hint=self.hint, param=self.param)


class UsageError(AutofluxError):
    code = "usage"
    exit_code = 2


class InvalidRequest(UsageError):
    code = "invalid_request"


class UnknownName(UsageError):
    code = "unknown_name"

    def __init__(
        self, kind: str, name: str, known: Iterable[str], *, hint: str | None = None, like: Iterable[str] = ()
    ) -> None:
        """`like` are names to guess from instead of the known ones, where more can be made of these."""
        choices = sorted(str(choice) for choice in known)
        close = difflib.get_close_matches(name.lower(), sorted(like) or choices, n=1, cutoff=0.7)
        listed = ", ".join(choices) or "none"
        guess = f"did you mean {close[0]!r}?" if close else None
        super().__init__(f"no {kind} named {name!r}; known: {listed}", hint=guess or hint)


class NotKept(UsageError):
    code = "not_kept"


class PlanUnusable(UsageError):
    code = "plan_unusable"


class ContradictoryWishes(UsageError):
    code = "contradictory_wishes"


class DoesNotFit(AutofluxError):
    code = "does_not_fit"
    exit_code = 3


class DeviceUnavailable(AutofluxError):
    code = "device_unavailable"


class ModelNotFound(AutofluxError):
    code = "model_not_found"


class UnsupportedModel(AutofluxError):
    code = "unsupported_model"


class UnsafeCheckpoint(AutofluxError):
    code = "unsafe_checkpoint"


class DamagedCheckpoint(AutofluxError):
    code = "damaged_checkpoint"


class DamagedFile(AutofluxError):
    code = "damaged_file"


class DamagedPack(DamagedFile):
    code = "damaged_pack"


class UnreadablePack(DamagedPack):
    code = "unreadable_pack"


class MissingExtra(AutofluxError):
    code = "missing_extra"

    def __init__(self, feature: str, command: str) -> None:
        super().__init__(f"{feature} needs packages that are not installed", hint=command)


class PluginConflict(AutofluxError):
    code = "plugin_conflict"


class PluginFailure(AutofluxError):
    code = "plugin_failure"


class OutputUnwritable(AutofluxError):
    code = "output_unwritable"


class DiskFull(AutofluxError):
    code = "disk_full"


class HubUnavailable(AutofluxError):
    code = "hub_unavailable"


class AccessDenied(AutofluxError):
    code = "access_denied"


class DamagedDownload(AutofluxError):
    code = "damaged_download"


class ServiceUnavailable(AutofluxError):
    code = "service_unavailable"


class QueueFull(ServiceUnavailable):
    code = "queue_full"


class TuningFailed(AutofluxError):
    code = "tuning_failed"


class OutOfMemory(AutofluxError):
    code = "out_of_memory"


_SURROUNDINGS = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.ELOOP,
    errno.ENAMETOOLONG,
}
"""What the system refuses because of a file and its disk, and not because of a mistake in the program."""


def describe(error: BaseException) -> ErrorReport:
    """Turn any exception into a report; one that nobody foresaw gets the code `internal`."""
    if isinstance(error, AutofluxError):
        return error.report()
    if isinstance(error, OSError) and error.errno in _SURROUNDINGS and error.filename is not None:
        return ErrorReport(
            code="system",
            message=f"cannot use {os.fsdecode(error.filename)!r}: {error.strerror}",
            hint="check its name, who may read and write it, and the disk that it is on",
        )
    text = str(error).strip() or "no message"
    return ErrorReport(
        code="internal",
        message=f"unexpected {type(error).__name__}: {text}",
        hint="run again with AUTOFLUX_DEBUG=1 for the full traceback, and please report it",
    )
