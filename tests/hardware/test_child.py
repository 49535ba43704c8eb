from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autoflux.hardware import child, report
from autoflux.hardware.report import Done, HostReport, Stage
from tests.hardware import fakes
from tests.hardware.fakes import device_report, measured, torch_report


def test_what_it_says_is_taken():
    stages: list[str] = []
    said = (Stage(text="one"), torch_report(), device_report(), device_report(name="later"), Stage(text="two"), Done())
    found = child.run(fakes.child(*said), 30, stages.append)
    assert found.problem is None
    assert [device.name for device in found.devices.values()] == ["later"]
    assert stages == ["one", "two"]


def test_rubbish_in_between_is_ignored():
    said = ("Loading kernels…", '{"type":"device"}', "{", '{"type":"no such"}', "\ufeff", torch_report(), Done())
    found = child.run(fakes.child(*said), 30)
    assert found.problem is None
    assert found.torch == torch_report()


def test_rubbish_only_is_a_problem():
    found = child.run(fakes.child("<html>", "null", "[]"), 30)
    assert found.problem is not None
    assert "code 0" in found.problem.message


def test_a_crash_keeps_what_was_said_before():
    said = (torch_report(), device_report(), HostReport(copy_gb_per_s=measured(1)))
    found = child.run(fakes.child(*said, then="os.kill(os.getpid(), 11)"), 30)
    assert found.problem is not None
    assert "signal 11" in found.problem.message
    assert len(found.devices) == 1


def test_the_last_words_are_quoted():
    found = child.run(fakes.child(then="sys.exit('CUDA driver exploded')"), 30)
    assert found.problem is not None
    assert "CUDA driver exploded" in found.problem.message


def test_a_hang_ends_at_the_limit():
    found = child.run(fakes.child(torch_report(), then="time.sleep(600)"), 1.0)
    assert found.problem is not None
    assert "in time" in found.problem.message
    assert found.torch == torch_report()


def test_a_flood_without_lines_ends_at_the_limit():
    found = child.run(fakes.child(then="sys.stderr.write('x' * 10**7); time.sleep(600)"), 1.0)
    assert found.problem is not None
    assert len(found.problem.message) < 500


def test_a_program_that_is_not_there():
    found = child.run([str(Path(sys.executable).parent / "no-such-program")], 5)
    assert found.problem is not None
    assert "did not start" in found.problem.message


def test_a_broken_torch_is_said_by_the_child_itself():
    found = child.run(fakes.child(torch_report(version=None, cuda=None, error="no module named torch"), Done()), 30)
    assert found.problem is None
    assert found.torch is not None
    assert found.torch.error


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_an_interrupted_parent_takes_the_child_along(tmp_path: Path):
    mark = tmp_path / "pid"
    command = fakes.child(then=f"open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    # What a shell starts in the background ignores interrupts, and so does what that starts.
    heeds = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heeds}\nfrom autoflux.hardware import child\nchild.run({command!r}, 600)"
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    pid = _wait_for_number(mark)
    assert os.getsid(pid) == pid  # Ctrl-C in the terminal does not reach it
    parent.send_signal(signal.SIGINT)
    parent.wait(timeout=20)
    _wait_until_gone(pid)


def test_messages_survive_their_json():
    for message in (device_report(), torch_report(), HostReport(), Stage(text="ä"), Done()):
        assert report.decode(report.encode(message)) == message


def test_the_child_looks_in_the_working_directory_only_if_the_parent_does(tmp_path: Path):
    code = "import sys; sys.path = [p for p in sys.path if p]; from autoflux.hardware.child import command"
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"{code}; print(command(1, 1, 1.0)[1])"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "-P"


def _wait_for_number(path: Path) -> int:
    for _ in range(400):
        if path.exists() and (text := path.read_text()):
            return int(text)
        time.sleep(0.05)
    raise AssertionError("the child did not start")


def _wait_until_gone(pid: int) -> None:
    for _ in range(400):
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
                return
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.05)
    raise AssertionError("the child is still there")
