"""What `autoflux doctor` looks at. Each check takes what it judges and returns findings; none changes anything."""

from __future__ import annotations

import difflib
import errno
import getpass
import importlib.util
import os
import socket
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Any

from autoflux import (
    Accelerator,
    AutofluxError,
    Hardware,
    HostProfile,
    Profile,
    check_writable,
    find_model,
    format_bytes,
)

OLDEST_PYTHON = (3, 11)

LEAST_FREE_SHARE = 0.85
"""A desktop takes some 5 to 10 % of a card; below this share something else is running there."""

LEAST_RAM_BYTES = 6 * 10**9
"""torch, the backend and one picture take about 3 GB beside the weights."""

FLUX_BYTES = 33_700_000_000
"""Weights of FLUX.1-dev in 16 bits: transformer 23.8, T5 9.5, CLIP and VAE 0.4 GB."""

SLOW_DISK_GB_PER_S = 0.3

LANE_GB_PER_S = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}
"""What one PCIe lane carries, by generation, after line coding (PCI-SIG's base specifications)."""

LEAST_LINK_SHARE = 0.6
"""Of gen x width; measured 0.87 on one H200 (PCIe 5 x16: 55 of 63 GB/s)."""

NARROW_LANES = 4

OPTIONAL = {
    "diffusers": ("draws the pictures", "pip install diffusers"),
    "gradio": ("the Gradio page", "pip install 'autoflux[gradio]'"),
    "diffsynth": ("the backend diffsynth", "pip install 'autoflux[diffsynth]'"),
}

ANOTHER_WAY = {"diffsynth"}
"""Nothing lacks where these are not: another backend draws the same pictures."""

SMALLEST_RUN = "autoflux generate 'a red circle on a blue background' --model sample"

PREFIX = "AUTOFLUX_"

LEAST_LIKENESS = 0.75
"""Of two variables' names after the prefix: PROT and PORT are at 0.75, SEED and HOST at 0.25."""

LOCAL_HINT = "--host 127.0.0.1 is for this machine only; an SSH tunnel leads there from others"

EVERYWHERE = {"0.0.0.0", "::", ""}  # noqa: S104 — what the user may ask for; the check warns of it


class State(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    check: str
    state: State
    message: str
    hint: str | None = None


Findings = Iterable[Finding]


def run_check(name: str, check: Callable[[], Findings]) -> list[Finding]:
    """The findings of a check. One that fails itself is a finding, not the end of the others."""
    try:
        return list(check())
    except AutofluxError as error:
        return [Finding(name, State.FAILURE, error.message, error.hint)]
    except Exception as error:  # noqa: BLE001 — the doctor is called when things are broken
        return [Finding(name, State.WARNING, f"could not be checked: {type(error).__name__}: {error}")]


def check_python(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> Findings:
    """autoflux needs Python 3.11."""
    text = ".".join(str(part) for part in version[:3])
    if version[:2] < OLDEST_PYTHON:
        yield Finding("python", State.FAILURE, f"Python {text} is too old", "install Python 3.11 or newer")
    else:
        yield Finding("python", State.OK, f"Python {text}")


def check_torch(hardware: Hardware) -> Findings:
    """torch is there, imports, and its build suits the driver."""
    versions = hardware.versions
    problems = [problem for problem in hardware.problems if problem.subject == "torch"]
    yield from (Finding("torch", State.FAILURE, problem.message, problem.hint) for problem in problems)
    if "torch" not in versions:
        yield Finding("torch", State.FAILURE, "torch is not installed", "pip install torch")
    elif _is_driver_too_old(versions):
        message = (
            f"torch is built for CUDA {versions['torch_cuda']}, the driver {versions.get('driver', '')} goes up to"
        )
        hint = "update the NVIDIA driver, or install a build of torch for an older CUDA"
        yield Finding("torch", State.FAILURE, f"{message} {versions['cuda']}", hint)
    elif not problems:
        yield Finding("torch", State.OK, _torch_name(versions))


def _is_driver_too_old(versions: Mapping[str, str]) -> bool:
    """Within one major version of CUDA newer builds run on older drivers."""
    built, driver = versions.get("torch_cuda"), versions.get("cuda")
    return bool(built and driver) and _major(built) > _major(driver)


def _major(version: str | None) -> int:
    return int((version or "0").split(".")[0])


def _torch_name(versions: Mapping[str, str]) -> str:
    name = f"torch {versions.get('torch_build') or versions['torch']}"
    if "torch_hip" in versions:
        return f"{name}, built for ROCm {versions['torch_hip']}"
    if "torch_cuda" not in versions:
        return f"{name}, built without CUDA"
    driver = versions.get("driver")
    return f"{name}, {f'NVIDIA driver {driver}' if driver else 'no NVIDIA driver here'}"


def check_devices(hardware: Hardware) -> Findings:
    """What computes, and what the probe could not find out."""
    for accelerator in hardware.accelerators:
        usable = format_bytes(accelerator.usable_bytes.value)
        yield Finding("devices", State.OK, f"{accelerator.device}: {accelerator.name}, {usable} usable")
    if not hardware.accelerators:
        message = f"no accelerator; {hardware.host.processor} computes, which takes minutes to hours with large models"
        yield Finding("devices", State.WARNING, message, f"the sample model is made for this: {SMALLEST_RUN}")
    for problem in hardware.problems:
        if problem.subject not in ("torch", "disk", "cache"):
            state = State.FAILURE if problem.subject == "nvml" else State.WARNING
            yield Finding("devices", state, f"{problem.subject}: {problem.message}", problem.hint)


def check_free_memory(hardware: Hardware) -> Findings:
    """Device memory that others hold."""
    for accelerator in hardware.accelerators:
        total, free = accelerator.total_bytes.value, accelerator.free_bytes.value
        if accelerator.unified_memory or not total:
            continue
        message = f"{accelerator.device}: {format_bytes(free)} of {format_bytes(total)} are free"
        if free < LEAST_FREE_SHARE * total:
            hint = "nvidia-smi lists the processes on the card; end those you do not need"
            yield Finding("vram", State.WARNING, f"{message}; other processes hold the rest", hint)
        else:
            yield Finding("vram", State.OK, message)


def check_ram(hardware: Hardware) -> Findings:
    """Host memory under the container's limit."""
    host = hardware.host
    limit = (
        f" (the container's limit is {format_bytes(host.container_limit_bytes)})" if host.container_limit_bytes else ""
    )
    message = (
        f"{format_bytes(host.available_bytes.value)} of {format_bytes(host.total_bytes.value)} are available{limit}"
    )
    if host.available_bytes.value < LEAST_RAM_BYTES:
        hint = "raise the container's memory limit" if limit else "close other programs"
        yield Finding("ram", State.WARNING, message, hint)
    else:
        yield Finding("ram", State.OK, message)


def check_disk(hardware: Hardware) -> Findings:
    """Room for a model, and how long it takes to read one."""
    disk = hardware.disk
    free = f"{format_bytes(disk.free_bytes.value)} are free at {disk.path!r}"
    if disk.free_bytes.value < FLUX_BYTES:
        message = f"{free}; FLUX.1-dev takes {format_bytes(FLUX_BYTES)}"
        yield Finding("disk", State.WARNING, message, "set HF_HOME to a folder on a larger disk")
    else:
        yield Finding("disk", State.OK, free)
    rate = disk.read_gb_per_s
    if rate is None:
        found = next((p for p in hardware.problems if p.subject == "disk"), None)
        message = found.message if found else "the read rate is not known"
        yield Finding("disk", State.WARNING, message, found.hint if found else "autoflux probe --refresh")
        return
    message = f"reads {rate.value:.2g} GB/s: FLUX.1-dev in {FLUX_BYTES / 1e9 / rate.value:.0f} s"
    state, hint = (State.OK, None) if rate.value >= SLOW_DISK_GB_PER_S else (State.WARNING, "keep models on an SSD")
    yield Finding("disk", state, message, hint)


def check_link(hardware: Hardware) -> Findings:
    """Whether copies reach what generation and width of the link promise, and whether the slot is a narrow one."""
    for accelerator in hardware.accelerators:
        yield from _check_link(accelerator)


def _check_link(accelerator: Accelerator) -> Findings:
    link = accelerator.link
    rate = link.to_device_gb_per_s(pinned=True) if link else None
    if not link or not rate:
        return
    message = f"{accelerator.device}: {rate.value:.3g} GB/s to the card"
    generation, width = link.pcie_generation, link.pcie_width
    lane = LANE_GB_PER_S.get(generation or 0)
    if not generation or not width or not lane:
        yield Finding("link", State.OK, message)
        return
    message += f", PCIe {generation} x{width} promises {lane * width:.3g}"
    if link.current_width and link.current_width < width:
        hint = "seat the card anew, use another slot or riser, look for lanes shared with an SSD in the BIOS"
        yield Finding("link", State.WARNING, f"{message}; it runs at x{link.current_width}", hint)
    elif rate.value < LEAST_LINK_SHARE * lane * width:
        hint = "look at the slot, the riser and power saving of PCIe (ASPM); then autoflux probe --refresh"
        yield Finding("link", State.WARNING, message, hint)
    elif width <= NARROW_LANES:
        hint = "a slot with more lanes, if the board has one, makes offloading faster"
        yield Finding("link", State.WARNING, f"{message}; few lanes", hint)
    else:
        yield Finding("link", State.OK, message)


def check_packages(packages: Mapping[str, tuple[str, str]] | None = None) -> Findings:
    """Optional packages, found without importing them."""
    for name, (purpose, command) in (OPTIONAL if packages is None else packages).items():
        if importlib.util.find_spec(name) is None:
            state = State.OK if name in ANOTHER_WAY else State.WARNING
            yield Finding("packages", state, f"{name} is not installed ({purpose})", command)
        else:
            yield Finding("packages", State.OK, f"{name} {_version(name)} is installed".replace("  ", " "))


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # a module without a distribution
        return ""


def check_plugins(problems: Iterable[Any], count: int) -> Findings:
    """Plugins that did not load."""
    problems = list(problems)
    for problem in problems:
        hint = "autoflux plugins --json shows the traceback" if problem.details else None
        yield Finding("plugins", State.FAILURE, f"{problem.plugin!r} did not load: {problem.message}", hint)
    if not problems:
        yield Finding("plugins", State.OK, f"{count} plugins loaded")


def check_profiles(profiles: Iterable[Profile | HostProfile]) -> Findings:
    """The user's own profiles. Reading them is the check; what cannot be read raises before it comes here."""
    names = ", ".join(profile.name for profile in profiles)
    yield Finding("profiles", State.OK, f"your own profiles can be read: {names}" if names else "none of your own")


def check_folder(name: str, folder: Path, variable: str) -> Findings:
    """Whether a file can be made in one of autoflux's own folders, or the folder itself where it is not there yet."""
    there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    try:
        check_writable(there)
    except AutofluxError as error:
        hint = f"set {variable} to a folder that can be written"
        yield Finding("folders", State.FAILURE, f"the {name} folder: {error.message}", hint)
    else:
        yield Finding("folders", State.OK, f"the {name} folder {str(folder)!r} can be written")


def check_port(host: str, port: int) -> Findings:
    """Whether `autoflux serve` could listen there."""
    try:
        _bind(host, port)
    except OSError as error:
        yield Finding(
            "port", State.FAILURE, f"cannot listen on {host}, port {port}: {_reason(error)}", _port_hint(error)
        )
    else:
        yield Finding("port", State.OK, f"port {port} is free on {host}")


def _bind(host: str, port: int) -> None:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    with socket.socket(family, kind, protocol) as listener:
        if os.name == "posix":  # as the server does: a connection that lingers from the last run is no obstacle
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _port_hint(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "another program listens there (autoflux already?); choose another one: --port 6007"
    if error.errno == errno.EACCES:
        return "ports below 1024 are not for every user: --port 6006"
    return "use an address of this machine: --host 127.0.0.1"


def check_address(host: str, port: int, environment: Mapping[str, str]) -> Findings:
    """Who can reach the server at that address."""
    if host in EVERYWHERE:
        message = f"{host or '0.0.0.0'} is reachable by everyone who can reach this machine"  # noqa: S104
        yield Finding("address", State.WARNING, message, LOCAL_HINT)
    elif host == "localhost" or host.startswith("127.") or host == "::1":
        over_ssh = "SSH_CONNECTION" in environment
        message = f"{host} is reachable from this machine only"
        yield Finding("address", State.OK, message, tunnel(port, environment) if over_ssh else None)
    else:
        yield Finding("address", State.WARNING, f"{host} is for everyone in its network", LOCAL_HINT)


def tunnel(port: int, environment: Mapping[str, str]) -> str:
    """The command, to be run on the user's own computer, that brings the port there."""
    # SSH_CONNECTION: client address, client port, server address, server port (sshd(8)).
    parts = environment.get("SSH_CONNECTION", "").split()
    server = parts[2] if len(parts) == 4 else socket.gethostname()
    other_port = f" -p {parts[3]}" if len(parts) == 4 and parts[3] != "22" else ""
    return f"on your computer: ssh -N{other_port} -L {port}:127.0.0.1:{port} {_user()}@{server}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return "user"


def check_memory_lock(limits: tuple[int, int] | None) -> Findings:
    """The limit of `ulimit -l`; CUDA's pinned memory is not held to it, other drivers' may be."""
    if limits is None:
        return
    soft = limits[0]
    text = "no limit" if soft < 0 or soft >= 1 << 60 else f"limited to {format_bytes(soft)}"
    yield Finding("memory lock", State.OK, f"{text} (CUDA's pinned memory is not held to it)")


def memory_lock_limits() -> tuple[int, int] | None:
    """Soft and hard limit in bytes, None where there is no such thing."""
    try:
        import resource  # noqa: PLC0415 — not on Windows
    except ImportError:
        return None
    return resource.getrlimit(resource.RLIMIT_MEMLOCK)


def check_environment(environment: Mapping[str, str], known: Iterable[str]) -> Findings:
    """Variables that look like ours but are not."""
    known = sorted(known)
    unknown = sorted(name for name in environment if name.startswith(PREFIX) and name not in known)
    for name in unknown:
        close = _closest(name, known)
        hint = f"did you mean {close}?" if close else f"known: {', '.join(known)}"
        yield Finding("environment", State.WARNING, f"{name} means nothing to autoflux", hint)
    if not unknown:
        yield Finding("environment", State.OK, "no unknown AUTOFLUX_ variables")


def _closest(name: str, known: Iterable[str]) -> str | None:
    """The prefix is the same in all and must not count, or everything would be alike."""
    parts = [other.removeprefix(PREFIX) for other in known]
    close = difflib.get_close_matches(name.removeprefix(PREFIX), parts, n=1, cutoff=LEAST_LIKENESS)
    return PREFIX + close[0] if close else None


def check_model(name: str, plugins: Any) -> Findings:
    """Whether the model is there and its headers can be read."""
    model = find_model(name, plugins)
    yield Finding("model", State.OK, f"{model.name}: {format_bytes(model.disk_bytes)} at {model.path!r}")
