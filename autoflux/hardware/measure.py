"""The measuring child: `python -m autoflux.hardware.measure`. It alone imports torch, and `blocks.py` for it.

It runs as a process of its own, because a broken driver can crash or hang whoever asks it, because torch takes
seconds to import, and because the context it creates on a card takes memory until the process ends. It says what it
finds line by line on stdout (`report.py`), so that what was found before a crash is kept.

A probe is to take less than 20 s with one card. What is spent where on a card that is neither slow nor full:

    torch, the card's context                 5 s   not ours
    copies: 2 x 0.3 waking, 24 x 0.1          3 s   `copies.WAKE_SECONDS`, `COPY_SECONDS`
    pinning: 3 x 0.1                        0.3 s   `copies.PIN_ROUNDS`
    matrix products: 5 formats x 0.5        2.5 s   `timing.SUSTAINED_SECONDS`
    attention: 2 x 0.5                        1 s   the same
    blocks: 2 x 0.5                           1 s   the same
    the processor: 2 formats x 0.5, copies  1.5 s   the same, `timing.BUDGET_SECONDS`
    the disk, in the parent                   3 s   `disk.READ_SECONDS`, `disk.WRITE_SECONDS`

Where things are slow, sizes end where a call would take more than `timing.LARGEST_SECONDS`.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

import click

from autoflux.hardware import copies, load, nvml, products
from autoflux.hardware.device import Device, Findings, first_line
from autoflux.hardware.products import ATTENTIONS, DEVICE_PRODUCTS, HOST_PRODUCTS, Attention, Product
from autoflux.hardware.report import NO_ROOM, DeviceReport, Done, HostReport, Message, Stage, TorchReport, encode
from autoflux.hardware.values import LEAST_CUDNN, DeviceKind, Figure
from autoflux.units import GB, MIB, format_bytes

LEAST_CAPABILITY = {"float8_e4m3fn": (8, 9), "int8": (7, 5)}
"""Compute capability from which NVIDIA cards have arithmetic in these formats."""

LEAST_BLOCK_BYTES = 2 * GB
"""Free memory below which no block is timed: a double block has 453 MB of weights, and 4608 tokens in it, four times
as wide inside, take about as much again."""

Say = Callable[[Message], None]
Step = Callable[[], dict[str, object]]
"""Measures, and returns the fields of a report that it knows then."""


@click.command()
@click.option("--cores", type=int, default=1, help="Processors to compute with.")
@click.option("--host-bytes", type=int, default=2**32, help="RAM that is available.")
@click.option("--limit", type=float, default=120.0, help="Seconds after which the process ends itself.")
def main(cores: int, host_bytes: int, limit: float) -> None:
    """Measure this machine through torch and print JSON lines."""
    # A C thread: it ends the process also when a driver hangs inside a call, and when the parent is gone.
    faulthandler.dump_traceback_later(limit, exit=True)
    out = _take_stdout()

    def say(message: Message) -> None:
        out.write(encode(message))
        out.flush()

    measure(say, cores, host_bytes)
    say(Done())
    # A broken driver can hang in its own clean-up at exit; there is nothing of ours to clean up.
    sys.stderr.flush()
    os._exit(0)


def measure(say: Say, cores: int, host_bytes: int) -> None:
    """Everything in order: torch, each device, the processor."""
    say(Stage(text="importing torch"))
    try:
        import torch  # noqa: PLC0415 — takes seconds and may fail
    except Exception as error:  # noqa: BLE001 — a torch that does not import fails in many ways
        say(TorchReport(error=first_line(error) or type(error).__name__))
        return
    torch.set_num_threads(cores)
    say(torch_report(torch))
    begun = load.moment()
    with torch.inference_mode():
        measured: list[DeviceReport] = []
        for device in devices(torch):
            measured.append(measure_device(say, device, host_bytes, measured))
        say(Stage(text="timing the processor"))
        report = host_report(torch, host_bytes)
    say(report.replace(processor_share=load.share_left(begun, load.moment(), cores)))


def torch_report(torch: Any) -> TorchReport:
    """Version and build of torch, and why it cannot use CUDA if it cannot."""
    return TorchReport(
        version=str(torch.__version__),
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        cuda_error=_cuda_error(torch) if torch.version.cuda else None,
    )


def _cuda_error(torch: Any) -> str | None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if torch.cuda.is_available():
                return None
            torch.cuda.init()
        except Exception as error:  # noqa: BLE001 — that text is the answer
            return first_line(error)
    return str(caught[0].message) if caught else None


def devices(torch: Any) -> Iterator[Device]:
    """All devices but the processor; a kind whose very listing fails is left out."""
    count = Findings()
    for kind in (DeviceKind.CUDA, DeviceKind.XPU):
        number = count.attempt(kind, partial(_device_count, getattr(torch, kind, None)))
        yield from (Device(torch, kind, index) for index in range(number or 0))
    if count.attempt("mps", torch.backends.mps.is_available):
        yield Device(torch, DeviceKind.MPS)


def _device_count(module: Any) -> int:
    return int(module.device_count()) if module and module.is_available() else 0


def measure_device(say: Say, device: Device, host_bytes: int, earlier: Sequence[DeviceReport] = ()) -> DeviceReport:
    """Say what the device is, then again after each sort of measurement. `earlier` are the devices measured before."""
    findings = Findings()
    facts = findings.attempt("properties", partial(_facts, device))
    facts = facts or DeviceReport(kind=device.kind, index=device.index, name=device.name)
    report = _with_memory(facts, device, findings)
    say(report.replace(errors=tuple(findings.errors)))
    for what, step in _steps(device, report, host_bytes, findings, earlier):
        say(Stage(text=f"timing {what} {report.name}"))
        changes = step()
        report = report.replace(**changes, errors=tuple(findings.errors))
        say(report)
        findings.attempt("memory", device.release)
    return report


def _steps(
    device: Device, facts: DeviceReport, host_bytes: int, findings: Findings, earlier: Sequence[DeviceReport]
) -> Iterator[tuple[str, Step]]:
    if not facts.unified_memory:
        yield "copies to", partial(_copies, device, facts, host_bytes, findings)
    twin = next((report for report in earlier if _is_twin(report, facts)), None)
    if twin:
        yield "nothing more on", partial(_arithmetic_of, twin)
        return
    free = _free_bytes(facts)
    fitting = _fitting(free, findings)
    yield "matrix products on", partial(_products, device, facts, fitting.products, findings)
    yield "attention on", partial(_attention, device, facts, fitting.attentions, findings)
    if fitting.blocks:
        yield "blocks on", partial(_blocks, device, facts, findings)


def _facts(device: Device) -> DeviceReport:
    if device.kind == DeviceKind.MPS:
        total = device.torch.mps.recommended_max_memory()
        return DeviceReport(kind=device.kind, index=0, name="Apple GPU", unified_memory=True, total_bytes=int(total))
    properties = device.module.get_device_properties(device.index)
    major, minor = getattr(properties, "major", None), getattr(properties, "minor", None)
    uuid = getattr(properties, "uuid", None)
    return DeviceReport(
        kind=device.kind,
        index=device.index,
        name=str(properties.name),
        uuid=str(uuid) if uuid is not None else None,
        # AMD numbers its chips in the same fields, with another meaning.
        capability=f"{major}.{minor}" if major is not None and not device.torch.version.hip else None,
        driver=getattr(properties, "driver_version", None),
        total_bytes=int(properties.total_memory),
        unified_memory=bool(getattr(properties, "is_integrated", False)),
    )


def _with_memory(facts: DeviceReport, device: Device, findings: Findings) -> DeviceReport:
    """Free memory. On a card that refuses a context (exclusive mode, no memory left) this is what fails first."""
    if device.kind == DeviceKind.MPS:
        held = findings.attempt("memory", device.torch.mps.driver_allocated_memory)
        return facts.replace(free_bytes=max(0, (facts.total_bytes or 0) - int(held or 0)))
    memory = findings.attempt("memory", partial(_mem_get_info, device))
    return facts.replace(free_bytes=memory[0], total_bytes=facts.total_bytes or memory[1]) if memory else facts


def _mem_get_info(device: Device) -> tuple[int, int]:
    free, total = device.module.mem_get_info(device.index)
    return int(free), int(total)


def _current_link(facts: DeviceReport) -> tuple[int | None, int | None]:
    """Generation and width right after copying, while the link is awake."""
    card = nvml.by_uuid(nvml.read().cards, facts.uuid) if facts.kind == DeviceKind.CUDA else None
    return (card.current_generation, card.current_width) if card else (None, None)


def _copies(device: Device, facts: DeviceReport, host_bytes: int, findings: Findings) -> dict[str, object]:
    found = copies.transfers(device, _free_bytes(facts), host_bytes, findings)
    generation, width = _current_link(facts)
    pin = findings.attempt("pinning", partial(copies.pin_seconds_per_gb, device, host_bytes))
    return {
        "transfers": tuple(found),
        "current_generation": generation,
        "current_width": width,
        "pin_seconds_per_gb": pin,
    }


def _products(device: Device, facts: DeviceReport, sizes: Sequence[Product], findings: Findings) -> dict[str, object]:
    precisions = ["bfloat16", "float16", "float32", *(name for name in LEAST_CAPABILITY if _has(name, facts))]
    return {"matmul_tflops": products.matmul_rates(device, precisions, sizes, findings)}


def _attention(
    device: Device, facts: DeviceReport, sizes: Sequence[Attention], findings: Findings
) -> dict[str, object]:
    cudnn = device.is_nvidia and _capability(facts) >= LEAST_CUDNN
    return {"attention_tflops": products.attention_rates(device, _wide(facts), sizes, findings, cudnn=cudnn)}


def _blocks(device: Device, facts: DeviceReport, findings: Findings) -> dict[str, object]:
    from autoflux.hardware import blocks  # noqa: PLC0415 — imports torch, which may not be there

    return {"blocks": blocks.timings(device, _wide(facts), blocks.TOKENS, findings)}


def _wide(facts: DeviceReport) -> str:
    """The 16-bit format to compute in: NVIDIA cards before 8.0 (Ampere) have no arithmetic in bfloat16."""
    return "float16" if _capability(facts) < (8, 0) else "bfloat16"


@dataclass(frozen=True)
class _Fitting:
    """The sizes that the device has room for."""

    products: tuple[Product, ...]
    attentions: tuple[Attention, ...]
    blocks: bool


def _fitting(free_bytes: int, findings: Findings) -> _Fitting:
    """What takes at most half of the free memory; says what there is no room for at all."""
    room = free_bytes // 2
    fitting = _Fitting(
        products=tuple(size for size in DEVICE_PRODUCTS if size.bytes_needed <= room),
        attentions=tuple(size for size in ATTENTIONS if size.bytes_needed <= room),
        blocks=free_bytes >= LEAST_BLOCK_BYTES,
    )
    named = {"matrix products": fitting.products, "attention": fitting.attentions, "blocks": fitting.blocks}
    if missing := [name for name, fits in named.items() if not fits]:
        findings.errors.append(f"{', '.join(missing)} not timed: {format_bytes(free_bytes)} are free, {NO_ROOM}")
    return fitting


def _free_bytes(facts: DeviceReport) -> int:
    return 64 * MIB if facts.free_bytes is None else facts.free_bytes


def _is_twin(one: DeviceReport, other: DeviceReport) -> bool:
    """Whether both are of one make and the first was measured whole: many cards are not to take many times as long."""
    alike = all(getattr(one, name) == getattr(other, name) for name in ("kind", "name", "capability", "total_bytes"))
    return alike and bool(one.matmul_tflops and one.attention_tflops and one.blocks)


def _arithmetic_of(twin: DeviceReport) -> dict[str, object]:
    def as_there(figure: Figure) -> Figure:
        return figure.replace(note=f"{figure.note}; on {twin.kind}:{twin.index}")

    return {
        "matmul_tflops": {name: as_there(rate) for name, rate in twin.matmul_tflops.items()},
        "attention_tflops": {name: as_there(rate) for name, rate in twin.attention_tflops.items()},
        "blocks": {kind: timing.replace(seconds=as_there(timing.seconds)) for kind, timing in twin.blocks.items()},
    }


def host_report(torch: Any, host_bytes: int) -> HostReport:
    """Copy rate and arithmetic of the processor, on the cores that torch was given."""
    findings = Findings()
    processor = Device(torch, DeviceKind.CPU)
    return HostReport(
        copy_gb_per_s=findings.attempt("copying in RAM", partial(copies.host_copy_rate, torch, host_bytes)),
        matmul_tflops=products.matmul_rates(processor, ("float32", "bfloat16"), HOST_PRODUCTS, findings),
        errors=tuple(findings.errors),
    )


def _has(precision: str, facts: DeviceReport) -> bool:
    """Whether an NVIDIA card has arithmetic in that format; others are not asked."""
    if precision == "float8_e4m3fn" and sys.platform == "win32":
        return False  # torch is built without the product that scales by row there (pytorch/pytorch#194606)
    return (
        facts.kind == DeviceKind.CUDA
        and facts.capability is not None
        and (_capability(facts) >= LEAST_CAPABILITY[precision])
    )


def _capability(facts: DeviceReport) -> tuple[int, int]:
    """(99, 0) if it is not known."""
    if facts.kind != DeviceKind.CUDA or not facts.capability:
        return 99, 0
    major, minor = facts.capability.split(".")
    return int(major), int(minor)


def _take_stdout() -> BinaryIO:
    """Keep the real stdout for our lines, and let everything that libraries print go to stderr."""
    kept = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return kept


if __name__ == "__main__":
    main()
