"""What the measuring child says to its parent: one JSON object a line. Both sides read this file; no torch here."""

from __future__ import annotations

import msgspec

from autoflux.hardware.values import BlockKind, BlockTiming, DeviceKind, Figure, Transfer
from autoflux.values import Value

NO_ROOM = "too little for it"
"""How an error ends that says what was not measured for want of free memory."""


class Stage(Value, frozen=True, kw_only=True, tag="stage"):
    """What is being measured now, for people who wait."""

    text: str


class TorchReport(Value, frozen=True, kw_only=True, tag="torch"):
    """The torch that was found, or why there is none. `cuda_error` says why a CUDA build sees no card."""

    version: str | None = None
    cuda: str | None = None
    hip: str | None = None
    error: str | None = None
    cuda_error: str | None = None


class DeviceReport(Value, frozen=True, kw_only=True, tag="device"):
    """One device as torch sees it. Sent before measuring and after each sort of it; the last one counts."""

    kind: DeviceKind
    index: int
    name: str
    uuid: str | None = None
    capability: str | None = None
    driver: str | None = None
    total_bytes: int | None = None
    free_bytes: int | None = None
    unified_memory: bool = False
    current_generation: int | None = None
    current_width: int | None = None
    transfers: tuple[Transfer, ...] = ()
    pin_seconds_per_gb: Figure | None = None
    matmul_tflops: dict[str, Figure] = msgspec.field(default_factory=dict)
    attention_tflops: dict[str, Figure] = msgspec.field(default_factory=dict)
    blocks: dict[BlockKind, BlockTiming] = msgspec.field(default_factory=dict)
    errors: tuple[str, ...] = ()


class HostReport(Value, frozen=True, kw_only=True, tag="host"):
    """What the processor does, measured through torch."""

    processor_share: float | None = None
    """What other programs left of it while this and all devices were measured."""

    copy_gb_per_s: Figure | None = None
    matmul_tflops: dict[str, Figure] = msgspec.field(default_factory=dict)
    errors: tuple[str, ...] = ()


class Done(Value, frozen=True, kw_only=True, tag="done"):
    """The last line: nothing is missing."""


Message = Stage | TorchReport | DeviceReport | HostReport | Done

_decoder: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)


def encode(message: Message) -> bytes:
    """One line, newline included."""
    return msgspec.json.encode(message) + b"\n"


def decode(line: bytes) -> Message | None:
    """The message in `line`; None if a library printed there instead."""
    try:
        return _decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
