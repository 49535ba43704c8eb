from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from autoflux.plugins import doctor_checks as checks
from autoflux.plugins.doctor_checks import Finding, State
from autoflux.plugins.doctor_command import OWN_VARIABLES

import autoflux
from autoflux import user_profiles
from autoflux.cli import generate
from autoflux.cli.main import run
from autoflux.hardware.values import Hardware, Link, Problem, Transfer
from autoflux.plugin_manager import PluginProblem, Plugins, load_plugins
from tests.conftest import card, figure, size

GB = 10**9
OK, WARNING, FAILURE = State.OK, State.WARNING, State.FAILURE


def only(findings: Iterable[Finding]) -> Finding:
    (finding,) = findings
    return finding


def problem(subject: str, message: str = "broken") -> Problem:
    return Problem(subject=subject, message=message, hint="mend it")


@pytest.mark.parametrize(("version", "state"), [((3, 10, 9), FAILURE), ((3, 11, 0), OK), ((3, 14, 1), OK)])
def test_python(version: tuple[int, ...], state: State):
    assert only(checks.check_python(version)).state == state


@pytest.mark.parametrize(
    ("versions", "state", "words"),
    [
        ({}, FAILURE, "not installed"),
        ({"torch": "2.11"}, OK, "without CUDA"),
        ({"torch": "2.11", "torch_cuda": "13.2"}, OK, "no NVIDIA driver here"),
        ({"torch": "2.11", "torch_cuda": "13.2", "driver": "580", "cuda": "13.0"}, OK, "driver 580"),
        ({"torch": "2.11", "torch_cuda": "13.2", "driver": "550", "cuda": "12.4"}, FAILURE, "goes up to 12.4"),
        ({"torch": "2.11", "torch_hip": "6.4"}, OK, "ROCm"),
    ],
)
def test_torch(machine, versions: dict[str, str], state: State, words: str):
    finding = only(checks.check_torch(machine().replace(versions=versions)))
    assert finding.state == state
    assert words in finding.message


def test_a_torch_that_cannot_use_the_card(machine):
    hardware = machine().replace(versions={"torch": "2"}, problems=(problem("torch", "built without CUDA"),))
    assert only(checks.check_torch(hardware)).state == FAILURE


def test_devices(machine):
    assert only(checks.check_devices(machine(card(24)))).state == OK
    assert only(checks.check_devices(machine())).state == WARNING


def test_without_a_card_it_gives_a_command_that_is_complete(machine):
    hint = only(checks.check_devices(machine())).hint or ""
    _, name, *arguments = shlex.split(hint[hint.index("autoflux ") :])
    context = generate.command.make_context(name, arguments)
    assert "red circle" in context.params["prompt"]


def test_what_the_probe_could_not_find_out_is_said_once(machine):
    hardware = machine(card(24)).replace(problems=tuple(map(problem, ("nvml", "measuring", "torch", "disk", "cache"))))
    assert [finding.state for finding in checks.check_devices(hardware)] == [OK, FAILURE, WARNING]


@pytest.mark.parametrize(("free_gb", "state"), [(23, OK), (12, WARNING), (0, WARNING)])
def test_memory_that_others_hold(machine, free_gb: int, state: State):
    busy = card(24).replace(free_bytes=size(free_gb * GB))
    assert only(checks.check_free_memory(machine(busy))).state == state


def test_ram(machine):
    assert only(checks.check_ram(machine(ram_gb=32))).state == OK
    small = machine(ram_gb=4)
    assert only(checks.check_ram(small)).state == WARNING
    limited = small.replace(host=small.host.replace(container_limit_bytes=4 * GB))
    assert "container" in (only(checks.check_ram(limited)).hint or "")


def test_disk(machine):
    hardware = machine()
    assert [finding.state for finding in checks.check_disk(hardware)] == [OK, OK]
    slow = hardware.disk.replace(free_bytes=size(GB), read_gb_per_s=figure(0.1))
    assert [finding.state for finding in checks.check_disk(hardware.replace(disk=slow))] == [WARNING, WARNING]
    unknown = hardware.replace(disk=hardware.disk.replace(read_gb_per_s=None), problems=(problem("disk", "read-only"),))
    assert [finding.message for finding in checks.check_disk(unknown)][1] == "read-only"


def linked(machine, rate: float, **link) -> Hardware:
    copies = Transfer(block_bytes=2**26, pinned=True, to_device_gb_per_s=figure(rate), to_host_gb_per_s=figure(rate))
    fields = {"pcie_generation": 4, "pcie_width": 16, "current_width": 16} | link
    return machine(card(24).replace(link=Link(transfers=(copies,), **fields)))


def test_link(machine):
    assert only(checks.check_link(linked(machine, 26))).state == OK
    assert only(checks.check_link(linked(machine, 12))).state == WARNING
    narrowed = only(checks.check_link(linked(machine, 6.5, current_width=4)))
    assert "runs at x4" in narrowed.message
    assert "few lanes" in only(checks.check_link(linked(machine, 6.5, pcie_width=4, current_width=4))).message
    assert only(checks.check_link(linked(machine, 6.5, pcie_generation=None))).state == OK
    assert list(checks.check_link(machine(card(24)))) == []  # nothing pinned was measured


def test_packages():
    findings = list(
        checks.check_packages({"json": ("reads", "pip"), "no_such_package": ("flies", "pip install wings")})
    )
    assert [finding.state for finding in findings] == [OK, WARNING]
    assert findings[1].hint == "pip install wings"


def test_a_package_is_named_with_its_version_and_one_without_is_named_alone():
    packages = {"pytest": ("tests", "pip"), "json": ("reads", "pip")}
    messages = [finding.message for finding in checks.check_packages(packages)]
    assert messages == [f"pytest {pytest.__version__} is installed", "json is installed"]


def test_diffsynth_has_a_line_of_its_own():
    (here,) = (finding for finding in checks.check_packages() if "diffsynth" in finding.message)
    assert re.fullmatch(r"diffsynth 2\.\S+ is installed", here.message)
    assert checks.OPTIONAL["diffsynth"][1] == "pip install 'autoflux[diffsynth]'"


def test_a_backend_that_another_stands_in_for_is_no_lack(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [])  # as on a machine where nothing more is installed
    for name in ("diffsynth", "gradio"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    absent = {finding.message.split()[0]: finding for finding in checks.check_packages()}
    assert (absent["diffsynth"].state, absent["gradio"].state) == (OK, WARNING)
    assert absent["diffsynth"].hint == "pip install 'autoflux[diffsynth]'"


def test_plugins():
    assert only(checks.check_plugins([], 5)).message == "5 plugins loaded"
    broken = PluginProblem("wings", "ImportError: no feathers", "Traceback")
    finding = only(checks.check_plugins([broken], 5))
    assert (finding.state, finding.hint) == (FAILURE, "autoflux plugins --json shows the traceback")


def test_profiles_of_the_user(tmp_path: Path):
    def finding() -> Finding:
        return only(checks.run_check("profiles", lambda: checks.check_profiles(user_profiles(tmp_path))))

    assert (finding().state, finding().message) == (OK, "none of your own")
    shipped = [*load_plugins(entry_points=False).profiles]
    assert shipped[0].name in only(checks.check_profiles(shipped)).message
    (tmp_path / "x.toml").write_text("bad = ")
    assert (finding().state, "x.toml" in finding().message) == (FAILURE, True)


def test_folders(tmp_path: Path):
    assert only(checks.check_folder("cache", tmp_path / "not" / "yet", "X")).state == OK
    (tmp_path / "file").write_text("")
    finding = only(checks.check_folder("cache", tmp_path / "file" / "below", "AUTOFLUX_CACHE_DIR"))
    assert finding.state == FAILURE
    assert "AUTOFLUX_CACHE_DIR" in (finding.hint or "")


def test_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        finding = only(checks.check_port("127.0.0.1", port))
        assert finding.state == FAILURE
        assert "--port" in (finding.hint or "")
    assert only(checks.check_port("127.0.0.1", port)).state == OK
    assert only(checks.check_port("192.0.2.1", port)).state == FAILURE  # an address that is no machine's (RFC 5737)


def test_addresses():
    assert only(checks.check_address("127.0.0.1", 6006, {})) == Finding(
        "address", OK, "127.0.0.1 is reachable from this machine only"
    )
    assert only(checks.check_address("0.0.0.0", 6006, {})).state == WARNING
    assert only(checks.check_address("10.0.0.7", 6006, {})).state == WARNING
    for host in ("0.0.0.0", "10.0.0.7"):
        assert "--host 127.0.0.1 is for this machine only" in (only(checks.check_address(host, 6006, {})).hint or "")


def test_the_tunnel_over_ssh():
    here = {"SSH_CONNECTION": "198.51.100.7 50000 203.0.113.9 22"}
    hint = only(checks.check_address("127.0.0.1", 6006, here)).hint or ""
    assert "ssh -N -L 6006:127.0.0.1:6006 " in hint
    assert hint.endswith("@203.0.113.9")
    assert " -p 2222 " in checks.tunnel(6006, {"SSH_CONNECTION": "198.51.100.7 50000 203.0.113.9 2222"})


def test_memory_lock():
    assert "8.39 MB" in only(checks.check_memory_lock((8 * 2**20, -1))).message
    assert "no limit" in only(checks.check_memory_lock((-1, -1))).message
    assert list(checks.check_memory_lock(None)) == []


def test_environment():
    known = ["AUTOFLUX_PORT", "AUTOFLUX_MODEL"]
    assert only(checks.check_environment({"AUTOFLUX_PORT": "1", "HOME": "x"}, known)).state == OK
    finding = only(checks.check_environment({"AUTOFLUX_PROT": "1"}, known))
    assert (finding.state, finding.hint) == (WARNING, "did you mean AUTOFLUX_PORT?")
    finding = only(checks.check_environment({"AUTOFLUX_SEED": "1"}, ["AUTOFLUX_HOST", *known]))
    assert finding.hint == "known: AUTOFLUX_HOST, AUTOFLUX_MODEL, AUTOFLUX_PORT"


def test_model(tiny_model: Path):
    assert only(checks.check_model(str(tiny_model), Plugins())).state == OK
    finding = only(checks.run_check("model", lambda: checks.check_model("no-such-model", Plugins())))
    assert finding.state == FAILURE


def test_a_check_that_breaks_does_not_stop_the_others():
    finding = only(checks.run_check("odd", lambda: [1 / 0]))  # type: ignore[list-item]
    assert finding.state == WARNING
    assert "ZeroDivisionError" in finding.message


def test_the_command(capfd: pytest.CaptureFixture[str], tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AUTOFLUX_MODLE", "x")
    code = run(["doctor", "--json", "--port", "0x1"])
    assert code == 2
    capfd.readouterr()
    code = run(["doctor", "--json", "--model", str(tiny_model), "--port", str(free_port())])
    data = json.loads(capfd.readouterr().out)["data"]
    states = {(finding["check"], finding["state"]) for finding in data["findings"]}
    assert ("model", "ok") in states
    assert ("environment", "warning") in states
    assert ("port", "ok") in states
    assert code == (0 if data["healthy"] else 1)


def test_the_command_fails_when_something_is_broken(capfd, tmp_path: Path):
    assert run(["doctor", "--model", str(tmp_path)]) == 1
    out = capfd.readouterr().out
    assert "failure" in out
    assert "try: " in out


def test_the_command_finds_a_broken_profile(capfd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AUTOFLUX_CONFIG_DIR", str(tmp_path))
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "x.toml").write_text("bad = ")
    assert run(["doctor", "--json", "--port", str(free_port())]) == 1
    findings = json.loads(capfd.readouterr().out)["data"]["findings"]
    (profiles,) = [finding for finding in findings if finding["check"] == "profiles"]
    assert (profiles["state"], "x.toml" in profiles["message"]) == ("failure", True)


def test_the_doctor_asks_without_torch(capfd):
    run(["probe", "--json"])
    code = "import sys\nfrom autoflux.cli.main import run\nrun(['doctor'])\nsys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_every_variable_that_the_program_reads_is_known_to_the_doctor():
    root = Path(autoflux.__file__).parents[1]
    sources = [file for folder in ("autoflux", "plugins") for file in (root / folder).rglob("*.py")]
    read = {name for file in sources for name in re.findall(r'"(AUTOFLUX_[A-Z_]+[A-Z])"', file.read_text())}
    options = {name for name in read if f'envvar="{name}"' in "".join(file.read_text() for file in sources)}
    assert len(read - options) > 4
    assert read - options <= set(OWN_VARIABLES)
