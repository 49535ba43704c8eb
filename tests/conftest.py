"""What all tests share: own cache and configuration folders, and models on disk."""

from __future__ import annotations

import os

# Several workers share the processors, and tensors this small only wait for more threads. Before torch reads it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from autoflux.hardware import cache, probe
from autoflux.hardware.values import Accelerator, DeviceKind, Disk, Figure, Hardware, Host, Link, Size, Source, Transfer
from autoflux.models.finding import find
from autoflux.models.pack_shelf import Shelf
from autoflux.models.values import Architecture, Model
from autoflux.runtime import allocator
from tests.tiny_model import write_tiny_flux

GB = 10**9

FLUX_DEV = Architecture(
    hidden_size=3072,
    head_count=24,
    double_blocks=19,
    single_blocks=38,
    patch_pixels=16,
    guidance=True,
    text_hidden_size=4096,
    text_layers=24,
    text_parameters=4_762_310_656,
    vae_channels=(128, 256, 512, 512),
    vae_layers=2,
    latent_channels=16,
)
"""FLUX.1-dev's real sizes."""


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Tests on a card have it to themselves, as some measure it, and torch's memory is set up as commands do it."""
    if "gpu" in config.option.markexpr.replace("not gpu", ""):
        config.option.numprocesses = 0
        if why := allocator.apply(os.environ):
            raise pytest.UsageError(why)


@pytest.fixture(autouse=True, scope="session")
def _own_folders(tmp_path_factory: pytest.TempPathFactory):
    """Keep tests out of the user's cache and configuration; one of each for a worker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOFLUX_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("AUTOFLUX_CONFIG_DIR", str(tmp_path_factory.mktemp("config")))
        # What one test runs is not to change what another one plans.
        patch.setenv("AUTOFLUX_CALIBRATION", "off")
        _keep_a_probe()
        yield


def _keep_a_probe() -> None:
    """As if a machine without accelerator had been measured before: what is measured beside tests is never the same.

    `tests/hardware` measures it in earnest.
    """
    facts = probe._ask(probe.Surroundings(), None)
    if facts.cards or sys.platform == "darwin":
        return
    measured = Hardware(
        fingerprint=facts.fingerprint,
        probed_at="2026-01-01T00:00:00+00:00",
        versions=facts.versions,
        host=facts.host.replace(copy_gb_per_s=figure(8.0), matmul_tflops={"float32": figure(0.1)}),
        disk=facts.disk.replace(read_gb_per_s=figure(1.0)),
    )
    cache.save(probe.Surroundings().cache_folder, measured)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny FLUX with random weights. Do not change it; `tiny_copy` may be changed."""
    return write_tiny_flux(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def tiny_copy(tiny_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "tiny")


@pytest.fixture
def tiny_found(tiny_copy: Path) -> Model:
    """What `tiny_copy` consists of."""
    return find(str(tiny_copy), {})


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    """Packs in a cache folder of the test's own."""
    monkeypatch.setenv("AUTOFLUX_CACHE_DIR", str(tmp_path / "cache"))
    return Shelf()


def figure(value: float, source: Source = Source.MEASURED) -> Figure:
    return Figure(value=value, source=source)


def size(value: int, source: Source = Source.REPORTED) -> Size:
    return Size(value=value, source=source)


def card(total_gb: float = 24, *, kind: DeviceKind = DeviceKind.CUDA, index: int = 0, tflops: float | None = 100.0):
    """An accelerator with that much usable memory."""
    transfer = Transfer(block_bytes=2**26, pinned=False, to_device_gb_per_s=figure(6.0), to_host_gb_per_s=figure(6.0))
    memory = size(int(total_gb * GB))
    return Accelerator(
        kind=kind,
        index=index,
        name=f"Card {index}",
        capability="8.9" if kind == DeviceKind.CUDA else None,
        total_bytes=memory,
        free_bytes=memory,
        usable_bytes=memory,
        unified_memory=kind == DeviceKind.MPS,
        link=Link(pcie_generation=4, pcie_width=16, transfers=(transfer,)),
        matmul_tflops={} if tflops is None else {"bfloat16": figure(tflops)},
    )


@pytest.fixture
def machine() -> Callable[..., Hardware]:
    """Make a machine: `machine(card(24), ram_gb=64)`."""

    def make(*accelerators: Accelerator, ram_gb: float = 64, cpu_tflops: float = 0.2) -> Hardware:
        return Hardware(
            fingerprint="test",
            probed_at="2026-01-01T00:00:00Z",
            versions={},
            accelerators=accelerators,
            host=Host(
                system="Linux",
                processor="Test",
                cores=2,
                total_bytes=size(int(ram_gb * GB)),
                available_bytes=size(int(ram_gb * GB)),
                pinnable_bytes=size(int(ram_gb * GB / 2)),
                matmul_tflops={"float32": figure(cpu_tflops)},
            ),
            disk=Disk(path="/", free_bytes=size(10**12), read_gb_per_s=figure(2.0)),
        )

    return make
