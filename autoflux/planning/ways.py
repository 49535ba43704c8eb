"""The ways to compute that a device has and the wishes leave open."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

from autoflux.errors import ContradictoryWishes
from autoflux.hardware.values import LEAST_CUDNN, DeviceKind, Hardware
from autoflux.models.values import Model, Precision
from autoflux.planning.sites import ROCM, Site
from autoflux.planning.speed import Way
from autoflux.planning.terms import CUDNN, DEFAULT_ATTENTION, TRANSFORMER, Offload, Quality, TransferUnit
from autoflux.planning.values import Wishes

LEAST_FOR_TRITON = (7, 0)
"""Compute capability from which triton compiles."""


class Option(NamedTuple):
    """One way to hold the weights and to compute with them."""

    offload: Offload
    way: Way


def options(hardware: Hardware, site: Site, wishes: Wishes, model: Model) -> list[Option]:
    """All of a device.

    Raises:
        ContradictoryWishes: two wishes exclude each other.
    """
    _check(wishes)
    if wishes.graphs and site.kind != DeviceKind.CUDA:
        hint = "drop --graphs" + (" or --device" if wishes.device else "")
        raise ContradictoryWishes(f"there are no CUDA graphs on {site.kind.value!r}", hint=hint)
    if wishes.attention == CUDNN:
        check_cudnn(site.device, wishes.precision, there=_has_cudnn(hardware, site))
    offloads = _offloads(site, wishes, model)
    found = [
        Option(offload, way)
        for arithmetic in ((wishes.precision,) if wishes.precision else site.profile.precision)
        for offload in offloads
        for way in _ways(hardware, site, wishes, arithmetic, offload)
    ]
    if not found:
        asked, option = _asked_of_streaming(wishes)
        raise ContradictoryWishes(f"{asked}, {_why_not(site, wishes)}", hint=f"drop {option}{_or_else(site, wishes)}")
    return found


def _why_not(site: Site, wishes: Wishes) -> str:
    """Why there are no streamed blocks."""
    if site.one_memory:
        return f"which only devices have that weights are streamed to; {site.kind.value!r} computes where they lie"
    if wishes.offload:
        return f"which only streamed weights have, and --offload {wishes.offload.value} streams none"
    return "which only streamed weights have, and this model has no blocks to stream"


def _or_else(site: Site, wishes: Wishes) -> str:
    if site.one_memory:
        return " or --device" if wishes.device else ""
    return " or --offload" if wishes.offload else ""


def _asked_of_streaming(wishes: Wishes) -> tuple[str, str]:
    """What is wished that only streamed weights have, in words, and its option."""
    if _is_narrow_wished(wishes):
        return f"--quant {_asked_format(wishes)} asks for blocks in 8 bits", "--quant"
    if wishes.compiled:
        return "--compile asks for compiled blocks", "--compile"
    if _is_unit_wished(wishes):
        return "--block-size says what is streamed at once", "--block-size"
    return "--graphs asks for CUDA graphs of blocks", "--graphs"


def wished_attention(wishes: Wishes) -> str | None:
    """What is to compute attention; None for the fastest. Others than torch's choice differ in the last bits."""
    exact = wishes.quality == Quality.EXACT
    return wishes.attention or (DEFAULT_ATTENTION if exact else None)


def check_cudnn(device: str, arithmetic: Precision | None, *, there: bool) -> None:
    """Whether cuDNN, if it is there, computes attention on that device in that number format.

    Raises:
        ContradictoryWishes: it cannot.
    """
    if not there:
        capability = ".".join(map(str, LEAST_CUDNN))
        raise ContradictoryWishes(
            f"{device!r} has no attention of cuDNN, which cards of NVIDIA have from compute capability {capability} on",
            hint="use --attention default",
        )
    if arithmetic == Precision.FLOAT32:
        raise ContradictoryWishes(
            "cuDNN has no attention in float32", hint="use --attention default, or --precision bfloat16"
        )


def _has_cudnn(hardware: Hardware, site: Site) -> bool:
    there = site.kind == DeviceKind.CUDA and ROCM not in hardware.versions
    return there and site.accelerator is not None and site.accelerator.is_at_least(LEAST_CUDNN)


def _check(wishes: Wishes) -> None:
    for wished, option, does in (
        (_is_narrow_wished(wishes), f"--quant {_asked_format(wishes)}", "makes weights narrow"),
        (wishes.compiled, "--compile", "changes the last bits"),
        (wishes.attention == CUDNN, f"--attention {CUDNN}", "changes the last bits"),
    ):
        if wished and wishes.quality == Quality.EXACT:
            raise ContradictoryWishes(
                f"--quality exact keeps pictures the same to the bit, and {option} {does}", hint="drop one of the two"
            )
    for wished, option, does in (
        (wishes.graphs, "--graphs", "replays"),
        (wishes.compiled, "--compile", "compiles"),
    ):
        if wished and wishes.unit == TransferUnit.LAYER:
            raise ContradictoryWishes(
                f"{option} {does} whole blocks, and --block-size layer brings the layers of a block one by one",
                hint="drop one of the two",
            )
    if TRANSFORMER in wishes.keep and (wishes.unit == TransferUnit.LAYER or wishes.block_bytes):
        raise ContradictoryWishes(
            "--keep transformer has all blocks stay, and --block-size says how they are streamed",
            hint="drop one of the two",
        )


def _offloads(site: Site, wishes: Wishes, model: Model) -> Sequence[Offload]:
    if wishes.offload is not None:
        return (wishes.offload,)
    if site.one_memory:
        return (Offload.NONE,)
    # Kept as a whole it may still be beside others that are streamed.
    ours = (Offload.NONE,) if TRANSFORMER in wishes.keep else (Offload.NONE, Offload.COMPONENT)
    return (*ours, Offload.STREAM) if model.component(TRANSFORMER).blocks else ours


def _ways(hardware: Hardware, site: Site, wishes: Wishes, arithmetic: Precision, offload: Offload) -> Iterator[Way]:
    narrow_wished = _is_narrow_wished(wishes)
    if offload != Offload.STREAM:
        if not (narrow_wished or wishes.compiled or wishes.graphs or _is_unit_wished(wishes)):
            yield Way(arithmetic=arithmetic, storage=arithmetic)
        return
    for compiled, graphs in product(_compiled(hardware, site, wishes), _graphs(hardware, site, wishes)):
        if not narrow_wished:
            yield Way(arithmetic=arithmetic, storage=arithmetic, compiled=compiled, graphs=graphs)
        for storage in _narrow(site, wishes):
            for native in (True, False) if _multiplies(site, storage) else (False,):
                yield Way(arithmetic=arithmetic, storage=storage, native=native, compiled=compiled, graphs=graphs)


def _asked_format(wishes: Wishes) -> str:
    """The value of `--quant`, as it was given."""
    return wishes.quant.short_name if wishes.quant else "none"


def _is_unit_wished(wishes: Wishes) -> bool:
    return wishes.unit is not None or bool(wishes.block_bytes)


def _is_narrow_wished(wishes: Wishes) -> bool:
    return wishes.quant is not None and wishes.quant.item_bytes == 1


def _narrow(site: Site, wishes: Wishes) -> Sequence[Precision]:
    if wishes.quant is not None:
        return (wishes.quant,) if _is_narrow_wished(wishes) else ()
    return () if wishes.quality == Quality.EXACT else site.profile.eight_bit


def _multiplies(site: Site, storage: Precision) -> bool:
    """Whether products in that format were measured, or are known to be there."""
    return site.accelerator is not None and storage.value in site.accelerator.matmul_tflops


def _compiled(hardware: Hardware, site: Site, wishes: Wishes) -> Sequence[bool]:
    if wishes.compiled is not None:
        return (wishes.compiled,)
    # What brings a layer would have to run inside of a compiled block.
    if wishes.quality == Quality.EXACT or site.kind != DeviceKind.CUDA or wishes.unit == TransferUnit.LAYER:
        return (False,)
    return (False, True) if _compiles(hardware, site) else (False,)


def _graphs(hardware: Hardware, site: Site, wishes: Wishes) -> Sequence[bool]:
    """Whether blocks are replayed from CUDA graphs: these hold whole blocks. On ROCm they were not tried."""
    if wishes.graphs is not None:
        return (wishes.graphs,)
    there = site.kind == DeviceKind.CUDA and ROCM not in hardware.versions
    return (False, True) if there and wishes.unit != TransferUnit.LAYER else (False,)


def _compiles(hardware: Hardware, site: Site) -> bool:
    new_enough = site.accelerator is None or site.accelerator.is_at_least(LEAST_FOR_TRITON)
    return new_enough and "triton" in hardware.versions
