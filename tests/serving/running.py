"""Servers in processes of their own, for tests."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

SERVE_FAKE = Path(__file__).parent / "serve_fake.py"
PATIENCE_SECONDS = 60.0


def eventually(found: Callable[[], Any], what: str = "it") -> Any:
    """What `found` returns as soon as that is true."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not (value := found()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not happen in {PATIENCE_SECONDS:.0f} s")
        time.sleep(0.02)
    return value


class Running:
    """A server process at the head of its own process group, as a terminal starts it."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._lines: list[str] = []
        self._fresh: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        self._port: int | None = None

    @property
    def output(self) -> str:
        return "".join(self._lines)

    @property
    def port(self) -> int:
        """As soon as it is open."""
        if self._port is None:
            self._port = int(self.line(r"(?:^|127\.0\.0\.1:)(\d+)$")[1])
        return self._port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def line(self, pattern: str) -> re.Match[str]:
        """The next line of output with that in it."""
        while (line := self._fresh.get(timeout=PATIENCE_SECONDS)) is not None:
            if match := re.search(pattern, line):
                return match
        raise AssertionError(f"ended without a line like {pattern!r}:\n{self.output}")

    def get(self, path: str) -> Any:
        return httpx.get(self.url + path, timeout=PATIENCE_SECONDS).json()

    def order(self, **order: object) -> str:
        """The id of a new job."""
        answer = httpx.post(self.url + "/api/jobs", json=order, timeout=PATIENCE_SECONDS)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def job(self, job_id: str, *states: str) -> Any:
        """The job as soon as it is in one of these states."""
        return eventually(lambda: (job := self.get(f"/api/jobs/{job_id}"))["state"] in states and job, str(states))

    def until(self, state: str) -> Any:
        """The status as soon as the worker is in this state."""
        return eventually(lambda: (status := self.get("/api/status"))["worker"] == state and status, state)

    def workers(self) -> list[psutil.Process]:
        """Its worker processes."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "spawn_main" in " ".join(child.cmdline()):
                        found.append(child)
        return found

    def interrupt(self, number: int = signal.SIGINT) -> int:
        """Press Ctrl-C: the signal goes to the whole process group. Returns the exit code."""
        os.killpg(self.process.pid, number)
        return self.wait()

    def wait(self) -> int:
        """The exit code; afterwards nothing of its process group is left."""
        code = self.process.wait(PATIENCE_SECONDS)
        eventually(lambda: not group_members(self.process.pid), "the end of all children")
        eventually(lambda: self._fresh.empty() or self._fresh.get() is None, "the end of the output")
        return code

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self._lines.append(line)
            self._fresh.put(line)
        self._fresh.put(None)


def group_members(group: int) -> list[int]:
    """Living processes of a process group."""
    members = []
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if process.info["status"] != psutil.STATUS_ZOMBIE and os.getpgid(process.pid) == group:
                members.append(process.pid)
    return members


@contextlib.contextmanager
def running(*command: str, behaviour: str = "{}", **environment: str) -> Iterator[Running]:
    """A server process; whatever is left of it is ended."""
    server = Running(command, {"AUTOFLUX_PLUGINS": "autoflux.testing", "AUTOFLUX_FAKE": behaviour, **environment})
    try:
        yield server
    except BaseException:
        print(server.output)
        raise
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()


def fake_server(*frontends: str, port: int = 0, **options: str) -> contextlib.AbstractContextManager[Running]:
    """A server of the fake model."""
    return running(str(SERVE_FAKE), str(port), *frontends, **options)
