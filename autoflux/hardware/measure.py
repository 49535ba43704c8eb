"""The measuring child: `python -m autoflux.hardware.measure`. The only file of this room that imports torch.

It runs as a process of its own, because a broken driver can crash or hang whoever asks it, because torch takes
seconds to import, and because the context it creates on a card takes memory until the process ends. It says what it
finds line by line on stdout (`report.py`), so that what was found before a crash is kept.
"""

from __future__ import annotations

import faulthandler
import os
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO, TypeVar

import click

from autoflux.hardware import nvml
from autoflux.hardware.report import DeviceReport, Done, HostReport, Message, Stage, TorchReport, encode
from autoflux.hardware.timing import keep_busy, round_seconds
from autoflux.hardware.values import DeviceKind, Figure, Source, Transfer
from autoflux.units import MIB

COPY_BYTES = (1 * MIB, 16 * MIB, 64 * MIB, 256 * MIB)
"""From the smallest piece worth streaming to beyond a FLUX double block in 8 bits (340 MB)."""

WAKE_SECONDS = 0.3
"""An idle card sits in a low-power link state and its clocks are down. On one H200 (PCIe 5 x16) both are up in less."""

DEVICE_SIDES = (1024, 2048, 4096)
HOST_SIDES = (256, 512, 1024, 2048)
"""Sides of the square matrices, tried upwards; the smaller ones also warm the card up. One H200 multiplies bfloat16 at
800 TFLOP/s for some 30 ms and then, at its power limit, at 690, both at 4096 and at 8192. A picture takes seconds, so
the lower figure is the true one."""

LARGEST_SECONDS = 0.25
"""A larger product is tried only if it will take less than this."""

LEAST_CAPABILITY = {"float8_e4m3fn": (8, 9), "int8": (7, 5)}
"""Compute capability from which NVIDIA cards have arithmetic in these formats."""

T = TypeVar("T")
Product = Callable[[int], Callable[[], object]]
"""Given the side of the matrices, makes them and returns what multiplies them."""

Say = Callable[[Message], None]


@dataclass
class Findings:
    """Runs measurements that may fail; what a driver throws becomes a line of text."""

    errors: list[str] = field(default_factory=list)

    def attempt(self, what: str, action: Callable[[], T]) -> T | None:
        try:
            return action()
        except Exception as error:  # noqa: BLE001 — drivers and torch throw whatever they like
            self.errors.append(f"{what}: {_first_line(error)}")
            return None


@dataclass(frozen=True)
class Device:
    """A device by torch's name, and the torch module that synchronizes it."""

    torch: Any
    kind: DeviceKind
    index: int = 0

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.index}" if self.kind in (DeviceKind.CUDA, DeviceKind.XPU) else str(self.kind)

    @property
    def module(self) -> Any:
        return getattr(self.torch, self.kind)

    def synchronize(self) -> None:
        if self.kind in (DeviceKind.CUDA, DeviceKind.XPU):
            self.module.synchronize(self.index)
        elif self.kind == DeviceKind.MPS:
            self.module.synchronize()


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
        say(TorchReport(error=_first_line(error) or type(error).__name__))
        return
    torch.set_num_threads(cores)
    say(torch_report(torch))
    with torch.inference_mode():
        for device in devices(torch):
            measure_device(say, device, host_bytes)
        say(Stage(text="timing the processor"))
        say(host_report(torch, host_bytes))


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
            return _first_line(error)
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


def measure_device(say: Say, device: Device, host_bytes: int) -> None:
    """Say what the device is, then again with what was measured."""
    findings = Findings()
    facts = findings.attempt("properties", partial(_facts, device))
    facts = facts or DeviceReport(kind=device.kind, index=device.index, name=device.name)
    facts = _with_memory(facts, device, findings)
    say(facts.replace(errors=tuple(findings.errors)))
    transfers: list[Transfer] = []
    link: tuple[int | None, int | None] = (None, None)
    if not facts.unified_memory:
        say(Stage(text=f"timing copies to {facts.name}"))
        transfers = list(_transfers(device, facts, host_bytes, findings))
        link = _current_link(facts)
    say(Stage(text=f"timing arithmetic on {facts.name}"))
    say(
        facts.replace(
            current_generation=link[0],
            current_width=link[1],
            transfers=tuple(transfers),
            matmul_tflops=_device_rates(device, facts, findings),
            errors=tuple(findings.errors),
        )
    )


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


def _transfers(device: Device, facts: DeviceReport, host_bytes: int, findings: Findings) -> Iterator[Transfer]:
    # A quarter of what the card has free and an eighth of the RAM: measuring must not push others out of memory.
    largest = min((facts.free_bytes or 64 * MIB) // 4, host_bytes // 8, COPY_BYTES[-1])
    sizes = [size for size in COPY_BYTES if size <= largest]
    for pinned in (True, False):
        what = f"{'pinned' if pinned else 'pageable'} copies"
        yield from findings.attempt(what, partial(_curve, device, sizes, pinned=pinned)) or []


def _curve(device: Device, sizes: list[int], *, pinned: bool) -> list[Transfer]:
    if not sizes:
        return []
    torch = device.torch
    host = torch.ones(sizes[-1], dtype=torch.uint8, pin_memory=pinned)  # written, so that its pages are there
    card = torch.empty(sizes[-1], dtype=torch.uint8, device=device.name)
    if pinned:
        keep_busy(partial(card.copy_, host, non_blocking=True), device.synchronize, WAKE_SECONDS)
    return [_transfer(device, host[:size], card[:size], pinned=pinned) for size in sizes]


def _transfer(device: Device, host: Any, card: Any, *, pinned: bool) -> Transfer:
    return Transfer(
        block_bytes=host.numel(),
        pinned=pinned,
        to_device_gb_per_s=_copy_rate(card, host, device.synchronize, pinned=pinned),
        to_host_gb_per_s=_copy_rate(host, card, device.synchronize, pinned=pinned),
    )


def _copy_rate(target: Any, source: Any, synchronize: Callable[[], None], *, pinned: bool) -> Figure:
    taken = round_seconds(partial(target.copy_, source, non_blocking=pinned), synchronize)
    return _measured(source.numel() / min(taken) / 1e9, f"best of {len(taken)}")


def _device_rates(device: Device, facts: DeviceReport, findings: Findings) -> dict[str, Figure]:
    torch = device.torch
    room = (facts.free_bytes or 64 * MIB) // 2
    products: dict[str, Product] = {
        str(dtype).removeprefix("torch."): partial(_product, torch, device.name, dtype)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    }
    if _has("float8_e4m3fn", facts):
        products["float8_e4m3fn"] = partial(_product_fp8, torch, device.name)
    if _has("int8", facts):
        products["int8"] = partial(_product_int8, torch, device.name)
    sides = [side for side in DEVICE_SIDES if 3 * 4 * side * side <= room]
    return _rates(products, sides, device.synchronize, findings)


def host_report(torch: Any, host_bytes: int) -> HostReport:
    """Copy rate and arithmetic of the processor, on the cores that torch was given."""
    findings = Findings()
    products: dict[str, Product] = {
        str(dtype).removeprefix("torch."): partial(_product, torch, "cpu", dtype)
        for dtype in (torch.float32, torch.bfloat16)
    }
    return HostReport(
        copy_gb_per_s=findings.attempt("copying in RAM", partial(_host_copy_rate, torch, host_bytes)),
        matmul_tflops=_rates(products, list(HOST_SIDES), _nothing, findings),
        errors=tuple(findings.errors),
    )


def _host_copy_rate(torch: Any, host_bytes: int) -> Figure:
    count = max(MIB, min(256 * MIB, host_bytes // 8))
    source, target = torch.ones(count, dtype=torch.uint8), torch.zeros(count, dtype=torch.uint8)
    taken = round_seconds(partial(target.copy_, source), _nothing)
    return _measured(count / min(taken) / 1e9, "bytes copied, each read once and written once")


def _rates(
    products: Mapping[str, Product],
    sides: list[int],
    synchronize: Callable[[], None],
    findings: Findings,
) -> dict[str, Figure]:
    rates = {
        name: findings.attempt(f"arithmetic in {name}", partial(_matmul_rate, make, sides, synchronize))
        for name, make in products.items()
    }
    return {name: rate for name, rate in rates.items() if rate}


def _matmul_rate(make: Product, sides: list[int], synchronize: Callable[[], None]) -> Figure | None:
    """The sustained rate at the largest side that does not take too long: the median, since clocks go up and down."""
    figure: Figure | None = None
    for side, following in zip(sides, [*sides[1:], None], strict=True):
        seconds = statistics.median(round_seconds(make(side), synchronize))
        figure = _measured(2 * side**3 / seconds / 1e12, f"{side}x{side}x{side}")
        if following is None or seconds * (following / side) ** 3 > LARGEST_SECONDS:
            break
    return figure


def _product(torch: Any, device: str, dtype: Any, side: int) -> Callable[[], object]:
    # Random numbers: on zeros cards draw less power and run faster than they ever do in earnest.
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return partial(torch.mm, left, right, out=torch.empty_like(left))


def _product_fp8(torch: Any, device: str, side: int) -> Callable[[], object]:
    left, right = (torch.randn(side, side, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    multiply = torch._scaled_mm  # noqa: SLF001 — torch's only fp8 product; guarded by `Findings`
    return partial(multiply, left, right.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def _product_int8(torch: Any, device: str, side: int) -> Callable[[], object]:
    left, right = (torch.randint(-127, 127, (side, side), device=device, dtype=torch.int8) for _ in range(2))
    return partial(torch._int_mm, left, right.t())  # noqa: SLF001 — torch's only int8 product; guarded by `Findings`


def _has(precision: str, facts: DeviceReport) -> bool:
    if facts.kind != DeviceKind.CUDA or not facts.capability:
        return False
    major, minor = facts.capability.split(".")
    return (int(major), int(minor)) >= LEAST_CAPABILITY[precision]


def _measured(value: float, note: str) -> Figure:
    return Figure(value=value, source=Source.MEASURED, note=note)


def _nothing() -> None:
    """The processor has done its work when the call returns."""


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _take_stdout() -> BinaryIO:
    """Keep the real stdout for our lines, and let everything that libraries print go to stderr."""
    kept = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return kept


if __name__ == "__main__":
    main()
