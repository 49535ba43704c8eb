"""What this machine is: asks, measures, and remembers. Nothing about the machine makes these functions throw."""

from __future__ import annotations

import datetime as dt
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import autoflux
from autoflux import paths
from autoflux.hardware import accelerators, cache, child, disk, host, load, nvml
from autoflux.hardware.child import Measured
from autoflux.hardware.values import Accelerator, Disk, Hardware, Host, Problem
from autoflux.units import GIB

FAILURE_KEPT_SECONDS = 600.0
"""A probe whose measuring failed counts this long; then the next one measures again."""

VISIBILITY = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
"""Settings that hide or reorder devices."""

Stage = Callable[[str], None]


@dataclass(frozen=True)
class Surroundings:
    """Where the probe looks; tests lay out their own."""

    root: Path = Path("/")
    """Holds `proc` and `sys`."""
    nvml: Any = None
    """Has the functions of `pynvml`; None imports it."""
    measure: tuple[str, ...] | None = None
    """Command line of the measuring child; None is autoflux's own."""
    limit_seconds: float = child.LIMIT_SECONDS
    cache: Path | None = None
    """Folder of kept measurements; None is autoflux's own."""
    sample_bytes: int = disk.SAMPLE_BYTES
    """Size of the file that the disk's rate is measured with."""
    is_quiet: Callable[[int], bool] = load.is_quiet
    """Whether other programs leave so many processors alone now."""

    @property
    def cache_folder(self) -> Path:
        return self.cache or paths.cache_dir() / "hardware"


@dataclass(frozen=True)
class _Facts:
    """What can be asked without torch, in a tenth of a second."""

    nvidia: nvml.Report
    host: Host
    disk: Disk
    versions: dict[str, str]
    wddm: bool

    @property
    def cards(self) -> list[nvml.Card]:
        return nvml.visible(self.nvidia.cards, nvml.cuda_visible_devices())

    @property
    def busy(self) -> list[nvml.Card]:
        """The cards that compute for others now."""
        return [card for card in self.cards if card.busy_share is not None and card.busy_share > load.MOST_BUSY]

    @property
    def fingerprint(self) -> str:
        return cache.fingerprint(
            {
                "cards": [card.uuid or card.name for card in self.nvidia.cards],
                "versions": {k: v for k, v in self.versions.items() if k in ("autoflux", "python", "torch", "driver")},
                "processor": self.host.processor,
                "cores": self.host.cores,
                "ram": round(self.host.total_bytes.value / GIB),
                "platform": f"{platform.system()} {platform.machine()}",
                "visible": [os.environ.get(name) for name in VISIBILITY],
            }
        )


def probe(
    *,
    refresh: bool = False,
    models_path: Path | None = None,
    on_stage: Stage | None = None,
    surroundings: Surroundings | None = None,
) -> Hardware:
    """This machine. Measures on first use or with `refresh`; otherwise only volatile figures are asked anew.

    What was measured while other programs computed is measured again on the next use that finds them quiet.

    What cannot be found out is a `Problem` in the result. `on_stage` is told what is going on. torch is imported in
    a child process, never in this one.
    """
    surroundings = surroundings or Surroundings()
    stage = on_stage or _silent
    facts = _ask(surroundings, models_path)
    folder = surroundings.cache_folder
    kept, problems = cache.load(folder, facts.fingerprint)
    if kept and not refresh and not _is_stale(kept) and not _is_to_be_retaken(kept, facts, surroundings):
        hardware = _refreshed(kept, facts)
        if disk.is_same(Path(kept.disk.path), Path(facts.disk.path)):
            return hardware.replace(problems=(*hardware.problems, *cache.check(folder)))
        # The same machine, but the models lie on another file system than last time.
        hardware = _with_disk(hardware, facts.disk, stage, surroundings)
    else:
        hardware = _measure(facts, stage, surroundings, disturbed=kept.disturbed if kept else 0)
    problems += cache.save(folder, hardware)
    return hardware.replace(problems=(*hardware.problems, *problems))


def cached(*, models_path: Path | None = None, surroundings: Surroundings | None = None) -> Hardware | None:
    """What an earlier probe of this very machine found, with the memory that is free now; None if there was none."""
    surroundings = surroundings or Surroundings()
    facts = _ask(surroundings, models_path)
    kept, _ = cache.load(surroundings.cache_folder, facts.fingerprint)
    return _refreshed(kept, facts) if kept else None


def _ask(surroundings: Surroundings, models_path: Path | None) -> _Facts:
    report = nvml.read(surroundings.nvml, surroundings.root)
    return _Facts(
        nvidia=report,
        host=host.read(surroundings.root),
        disk=disk.read(models_path),
        versions=_versions(report),
        wddm=host.is_wddm(),
    )


def _measure(facts: _Facts, stage: Stage, surroundings: Surroundings, *, disturbed: int) -> Hardware:
    """`disturbed` is how often in a row it was so before."""
    measured = child.run(_command(facts, surroundings), surroundings.limit_seconds, stage)
    found, problems = accelerators.join(
        facts.cards, measured, available_bytes=facts.host.available_bytes.value, wddm=facts.wddm
    )
    disturbances = list(_disturbances(measured.host.processor_share, facts.busy))
    disturbed = disturbed + 1 if disturbances else 0
    hardware = Hardware(
        fingerprint=facts.fingerprint,
        probed_at=_now().isoformat(timespec="seconds"),
        versions=facts.versions | _torch_versions(measured),
        accelerators=tuple(_with_driver(accelerator, facts) for accelerator in found),
        host=facts.host.replace(copy_gb_per_s=measured.host.copy_gb_per_s, matmul_tflops=measured.host.matmul_tflops),
        disk=facts.disk,
        problems=(
            *facts.nvidia.problems,
            *_measuring_problems(measured),
            *_load_problems(disturbances, disturbed),
            *problems,
        ),
        disturbed=disturbed,
    )
    return _with_disk(hardware, facts.disk, stage, surroundings)


def _command(facts: _Facts, surroundings: Surroundings) -> tuple[str, ...]:
    if surroundings.measure:
        return surroundings.measure
    # The child's own limit is the second net, for when this process is killed and cannot end it.
    limit = surroundings.limit_seconds + 10
    return tuple(child.command(facts.host.cores, facts.host.available_bytes.value, limit))


def _with_disk(hardware: Hardware, where: Disk, stage: Stage, surroundings: Surroundings) -> Hardware:
    stage("timing the disk")
    measured, problems = disk.measure(where, surroundings.sample_bytes, _scratch_folders(surroundings))
    others = [problem for problem in hardware.problems if problem.subject != "disk"]
    return hardware.replace(disk=measured, problems=(*others, *problems))


def _scratch_folders(surroundings: Surroundings) -> list[Path]:
    try:
        return [surroundings.cache_folder, Path(tempfile.gettempdir())]
    except OSError:  # no temporary folder can be written
        return [surroundings.cache_folder]


def _refreshed(kept: Hardware, facts: _Facts) -> Hardware:
    """Kept measurements with today's free memory, free space and versions of packages."""
    available = facts.host.available_bytes.value
    return kept.replace(
        versions=kept.versions | facts.versions,
        accelerators=tuple(
            accelerators.refresh(a, facts.nvidia.cards, available_bytes=available, wddm=facts.wddm)
            for a in kept.accelerators
        ),
        host=facts.host.replace(copy_gb_per_s=kept.host.copy_gb_per_s, matmul_tflops=kept.host.matmul_tflops),
        disk=facts.disk.replace(read_gb_per_s=kept.disk.read_gb_per_s)
        if disk.is_same(Path(kept.disk.path), Path(facts.disk.path))
        else facts.disk,
    )


def _is_stale(kept: Hardware) -> bool:
    """Whether its measuring failed, and some time ago."""
    if not any(problem.subject in ("measuring", "torch") for problem in kept.problems) and all(
        accelerator.matmul_tflops for accelerator in kept.accelerators
    ):
        return False
    try:
        age = _now() - dt.datetime.fromisoformat(kept.probed_at)
    except (ValueError, TypeError):
        return True
    return abs(age.total_seconds()) > FAILURE_KEPT_SECONDS


def _is_to_be_retaken(kept: Hardware, facts: _Facts, surroundings: Surroundings) -> bool:
    """Whether its measuring was disturbed and would not be now."""
    return 0 < kept.disturbed < load.MOST_DISTURBED and not facts.busy and surroundings.is_quiet(facts.host.cores)


def _disturbances(processor_share: float | None, busy: Sequence[nvml.Card]) -> Iterator[str]:
    """What other programs did while, or just before, this machine was measured."""
    if processor_share is not None and load.is_disturbed(processor_share):
        yield f"took {1 - processor_share:.0%} of the processors during measuring"
    for card in busy:
        yield f"kept {card.name} busy {card.busy_share:.0%} of the time before measuring"


def _load_problems(disturbances: Sequence[str], times: int) -> list[Problem]:
    hint = "end them, then `autoflux probe --refresh`"
    if times < load.MOST_DISTURBED:
        hint += "; the next use that finds the machine quiet measures again by itself"
    return [
        Problem(subject="load", message=f"other programs {what}, so figures may be too low", hint=hint)
        for what in disturbances
    ]


def _measuring_problems(measured: Measured) -> list[Problem]:
    problems = [measured.problem] if measured.problem else []
    if measured.torch and measured.torch.error:
        hint = "`pip install --force-reinstall torch`"
        problems.append(Problem(subject="torch", message=f"cannot be imported: {measured.torch.error}", hint=hint))
    return problems + [Problem(subject="host", message=error) for error in measured.host.errors]


def _with_driver(accelerator: Accelerator, facts: _Facts) -> Accelerator:
    is_nvidia = nvml.by_uuid(facts.nvidia.cards, accelerator.uuid) is not None
    return accelerator.replace(driver=facts.nvidia.driver) if is_nvidia else accelerator


def _versions(report: nvml.Report) -> dict[str, str]:
    found = {
        "autoflux": autoflux.__version__,
        "python": platform.python_version(),
        "torch": _package_version("torch"),
        "diffusers": _package_version("diffusers"),
        "triton": _package_version("triton") if _compiles() else None,
        "driver": report.driver,
        "cuda": report.cuda,
    }
    return {name: version for name, version in found.items() if version}


def _torch_versions(measured: Measured) -> dict[str, str]:
    """What torch was built for; `cuda` in `_versions` is what the driver can do."""
    torch = measured.torch
    built = {"torch_build": torch.version, "torch_cuda": torch.cuda, "torch_hip": torch.hip} if torch else {}
    return {name: version for name, version in built.items() if version}


def _compiles() -> bool:
    """Whether there is the C compiler that triton needs for what launches its kernels."""
    return any(shutil.which(name) for name in (os.environ.get("CC") or "cc", "gcc", "clang"))


def _package_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def _silent(_text: str) -> None:
    pass
