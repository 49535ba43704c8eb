from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from autoflux.cli import probe as probe_command
from autoflux.cli.main import run
from autoflux.hardware.known import known_machine
from autoflux.hardware.values import BlockTiming, Figure, Hardware, Link, Problem, Size, Source, Transfer
from tests.conftest import card


def data(text: str) -> Hardware:
    envelope = json.loads(text)
    assert envelope["ok"] is True
    assert envelope["error"] is None
    return msgspec.convert(envelope["data"], Hardware)


def test_json_is_a_whole_hardware(capfd: pytest.CaptureFixture[str]):
    assert run(["probe", "--json"]) == 0
    found = data(capfd.readouterr().out)
    assert found.host.matmul_tflops
    assert found.fingerprint


def test_cached_says_the_same_later(capfd: pytest.CaptureFixture[str]):
    run(["probe", "--json"])
    first = data(capfd.readouterr().out)
    assert run(["probe", "--cached", "--json"]) == 0
    assert data(capfd.readouterr().out).probed_at == first.probed_at


def test_cached_without_an_earlier_probe(capfd, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("AUTOFLUX_CACHE_DIR", str(tmp_path))
    assert run(["probe", "--cached"]) == 1
    assert "was not measured yet" in capfd.readouterr().err


def test_cached_and_refresh_exclude_each_other(capfd):
    assert run(["probe", "--cached", "--refresh"]) == 2
    assert "use one of them" in capfd.readouterr().err


@pytest.mark.parametrize("cached", [[], ["--cached"]])
def test_a_folder_of_models_that_is_not_there(capfd, tmp_path: Path, cached: list[str]):
    (tmp_path / "file").write_text("")
    for name, what in (("nope", "does not exist"), ("file", "is not a folder")):
        assert run(["probe", *cached, "--models", str(tmp_path / name)]) == 2
        assert f"{str(tmp_path / name)!r} {what}" in capfd.readouterr().err


def test_a_folder_of_models_that_is_there(capfd, tmp_path: Path):
    assert run(["probe", "--json", "--models", str(tmp_path)]) == 0
    assert data(capfd.readouterr().out).disk.path == str(tmp_path)


def test_cached_imports_no_torch(capfd):
    run(["probe", "--json"])
    code = "import sys\nfrom autoflux.cli.main import run\nrun(['probe', '--cached'])\nsys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_piped_output_is_plain_and_whole(capfd):
    run(["probe", "--json"])
    environment = os.environ | {"COLUMNS": "40"}
    command = [sys.executable, "-m", "autoflux", "probe", "--cached"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "\x1b" not in done.stdout
    assert "…" not in done.stdout
    assert "measured" in done.stdout
    assert done.stderr == ""


def shown(hardware: Hardware) -> str:
    text = io.StringIO()
    probe_command.show(hardware, Console(file=text, width=80, highlight=False))
    return text.getvalue()


def rate(value: float, source: Source = Source.MEASURED) -> Figure:
    return Figure(value=value, source=source)


def test_a_card_for_people(machine):
    pinned = Transfer(block_bytes=2**26, pinned=True, to_device_gb_per_s=rate(26.5), to_host_gb_per_s=rate(25))
    link = Link(pcie_generation=4, pcie_width=16, current_generation=4, current_width=8, transfers=(pinned,))
    usable = Size(value=22_500_000_000, source=Source.ASSUMED, note="less 1.50 GB (Windows)")
    hidden = Problem(subject="card 1", message="the card [sic] is lost", hint="reboot")
    hardware = machine(card(24).replace(link=link, usable_bytes=usable)).replace(problems=(hidden,))
    text = shown(hardware)
    assert "Card 0 (cuda:0)" in text
    assert "PCIe 4 x16, now 4 x8" in text
    assert "of 64 MiB 26.5 25.0 - - measured" in " ".join(text.split())
    assert "assumed: less 1.50 GB (Windows)" in text
    assert "problem: card 1: the card [sic] is lost" in text
    assert "try: reboot" in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_a_measured_card_fits_a_terminal(machine):
    copies = tuple(
        Transfer(block_bytes=size, pinned=pinned, to_device_gb_per_s=rate(55.04), to_host_gb_per_s=rate(0.66))
        for size in (2**18, 2**28)
        for pinned in (False, True)
    )
    timing = BlockTiming(
        seconds=rate(0.0031), precision="bfloat16", hidden_size=3072, image_tokens=4096, text_tokens=512
    )
    fp8 = Figure(value=1250, source=Source.MEASURED, note="4608 x 3072 -> 12288; on cuda:0")
    measured = card(24).replace(
        link=Link(transfers=copies, pin_seconds_per_gb=rate(0.21)),
        matmul_tflops={"float8_e4m3fn": fp8},
        attention_tflops={"cudnn": rate(512.3)},
        blocks={"double": timing, "single": timing},
    )
    text = shown(machine(measured))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "copies, GB/s pinned in out pageable in out" in lines
    assert "of 256 KiB 55.0 0.66 55.0 0.66 measured" in lines
    assert "pinning RAM 210 ms a GB measured" in lines
    assert "matmul float8_e4m3fn 1250 TFLOP/s measured: 4608 x 3072 -> 12288; on cuda:0" in lines
    assert "attention cudnn 512 TFLOP/s measured" in lines
    assert "single block 3.10 ms measured" in lines
    assert max(len(line) for line in text.splitlines()) <= 100


def test_no_card_for_people(machine):
    assert "no accelerator" in shown(machine())


def test_what_is_only_known_by_name_was_reported_by_nobody(machine):
    known = known_machine("rtx-4060-8gb")
    assert "reported" not in shown(known)
    for row in ("compute capability 8.9 assumed", "link PCIe 4 x8 assumed", "system Linux assumed", "cores 8 assumed"):
        assert row in " ".join(shown(known).split())
    assert "reported" in shown(machine(card(24)))
