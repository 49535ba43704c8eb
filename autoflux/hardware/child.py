"""Runs the measuring child and listens to it. Whatever it does — crash, hang, print rubbish — ends in a report."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from autoflux.hardware.report import DeviceReport, Done, HostReport, Message, Stage, TorchReport, decode
from autoflux.hardware.values import DeviceKind, Problem

LIMIT_SECONDS = 120.0
"""Measuring is laid out for less than 20 s with one card (`measure.py`), and some 4 s for each further one of its make.
Importing torch from a cold disk takes another 30."""

MODULE = "autoflux.hardware.measure"
TAIL_BYTES = 4000


@dataclass
class Measured:
    """What the child said until it ended. `problem` is set if it did not come to its end."""

    torch: TorchReport | None = None
    devices: dict[tuple[DeviceKind, int], DeviceReport] = field(default_factory=dict)
    host: HostReport = field(default_factory=HostReport)
    problem: Problem | None = None
    done: bool = False

    def take(self, message: Message) -> None:
        if isinstance(message, TorchReport):
            self.torch = message
        elif isinstance(message, DeviceReport):
            self.devices[message.kind, message.index] = message
        elif isinstance(message, HostReport):
            self.host = message
        elif isinstance(message, Done):
            self.done = True


def command(cores: int, host_bytes: int, limit_seconds: float) -> list[str]:
    """The child's command line. It looks for modules in the working directory only if this process does."""
    options = ["--cores", str(cores), "--host-bytes", str(host_bytes), "--limit", str(limit_seconds)]
    return [sys.executable, *([] if _looks_here() else ["-P"]), "-m", MODULE, *options]


def _looks_here() -> bool:
    try:
        return bool({"", str(Path.cwd())} & set(sys.path))
    except OSError:  # the working directory was deleted
        return False


def run(
    arguments: Sequence[str], limit_seconds: float = LIMIT_SECONDS, on_stage: Callable[[str], None] | None = None
) -> Measured:
    """Run the child to its end or to the limit. It is killed when this process is interrupted."""
    measured = Measured()
    with _error_file() as errors:
        try:
            process = _start(arguments, errors)
        except OSError as error:
            measured.problem = _problem(f"the measuring process did not start: {error}", "")
            return measured
        with _ended(process):
            in_time = _listen(process, measured, limit_seconds, on_stage)
            measured.problem = _ending(process, measured, _tail(errors), in_time=in_time)
    return measured


def _error_file() -> IO[bytes]:
    """Takes what the child writes to stderr; nothing where no file can be written at all."""
    try:
        return tempfile.TemporaryFile()
    except OSError:
        return Path(os.devnull).open("w+b")


def _start(arguments: Sequence[str], errors: IO[bytes]) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C in the terminal reaches the parent only, which then ends the child.
    new_group = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
    return subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        start_new_session=True,
        creationflags=new_group,
    )


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Whatever happens inside, afterwards the child and what it started are gone."""
    try:
        yield
    finally:
        _kill(process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            # A process stuck in the driver cannot even be killed; leave it rather than wait for it.
            process.wait(timeout=2)


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.returncode is not None:
        return  # its number may belong to another process by now
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def _listen(
    process: subprocess.Popen[bytes],
    measured: Measured,
    limit_seconds: float,
    on_stage: Callable[[str], None] | None,
) -> bool:
    """Take messages until the child closes its stdout; False if the limit came first."""
    lines: queue.Queue[bytes | None] = queue.Queue()
    threading.Thread(target=_pump, args=(process, lines), daemon=True).start()
    end = time.monotonic() + limit_seconds
    while not measured.done:
        try:
            line = lines.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            return False
        if line is None:
            return True
        message = decode(line)
        if isinstance(message, Stage):
            (on_stage or _ignore)(message.text)
        elif message is not None:
            measured.take(message)
    return True


def _pump(process: subprocess.Popen[bytes], lines: queue.Queue[bytes | None]) -> None:
    with contextlib.suppress(OSError, ValueError):
        for line in process.stdout or ():
            lines.put(line)
    lines.put(None)


def _ending(process: subprocess.Popen[bytes], measured: Measured, tail: str, *, in_time: bool) -> Problem | None:
    if measured.done:
        return None
    if not in_time:
        return _problem("the measuring process did not end in time and was stopped", tail)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)
    if measured.torch and measured.torch.error:
        return None  # said all there is to say
    code = process.returncode
    how = f"was ended by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
    return _problem(f"the measuring process {how} before it was done", tail)


def _problem(message: str, tail: str) -> Problem:
    last = tail.strip().splitlines()[-1:] or [""]
    said = f"; its last words: {last[0].strip()[:200]}" if last[0] else ""
    return Problem(
        subject="measuring",
        message=message + said,
        hint="`autoflux probe --refresh` tries again; until then figures are assumed, not measured",
    )


def _tail(errors: IO[bytes]) -> str:
    size = errors.seek(0, os.SEEK_END)
    errors.seek(max(0, size - TAIL_BYTES))
    return errors.read().decode(errors="replace")


def _ignore(_text: str) -> None:
    pass
