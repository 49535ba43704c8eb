"""The terms in which wishes and plans are said."""

from __future__ import annotations

from enum import StrEnum

TRANSFORMER = "transformer"
"""The name of the component that denoises: only its blocks are made narrow, kept apart, or compiled."""


DEFAULT_ATTENTION, CUDNN = "default", "cudnn"

ATTENTIONS = (DEFAULT_ATTENTION, CUDNN)
"""What can compute attention: torch's own choice, or cuDNN on NVIDIA cards."""


class Quality(StrEnum):
    """How far a plan may go from the picture that bfloat16 weights give."""

    EXACT = "exact"
    """No weights in 8 bits: the same picture, to the bit, as with all weights on the device."""
    BALANCED = "balanced"
    """Weights of the transformer in 8 bits where that is faster or smaller."""


class TransferUnit(StrEnum):
    """The least that one copy to the device moves."""

    LAYER = "layer"
    BLOCK = "block"


class Offload(StrEnum):
    """Where weights are when they are not used."""

    NONE = "none"
    """All weights stay on the device."""
    COMPONENT = "component"
    """Each component lies in RAM and comes to the device, whole, for its phase."""
    STREAM = "stream"
    """Weights lie in RAM and pass through the device block by block while it computes; as many as fit stay there."""
    NATIVE = "native"
    """The backend's library brings weights in its own way. Never chosen, only wished for."""


class Placement(StrEnum):
    """Where one component's weights live during its phase."""

    DEVICE = "device"
    """On the device all the time."""
    VISITING = "visiting"
    """In RAM, copied to the device whole for its phase."""
    STREAMED = "streamed"
    """In RAM, copied to the device block by block, in each pass, but for the blocks that stay."""
    HOST = "host"
    """In RAM, and computed there by the processor; only what it gives goes to the device."""
    NATIVE = "native"
    """In RAM, brought to the device by the backend's library."""


class Waiting(StrEnum):
    """Where streamed weights wait, fastest first."""

    PINNED = "pinned"
    """In RAM that the device copies from directly."""
    PAGEABLE = "pageable"
    """In ordinary RAM, copied through a small pinned buffer: less can be pinned than there is."""
    DISK = "disk"
    """In their files, read ahead into a small pinned buffer: RAM is too small for them."""


class Origin(StrEnum):
    """How what a choice rests on is known, strongest first; of several figures the weakest counts."""

    WISH = "wish"
    """The user said so, or asked for a quality that leaves nothing else."""
    CALIBRATED = "calibrated"
    """What this model took when it ran here."""
    MEASURED = "measured"
    REPORTED = "reported"
    """By the system, its drivers or packages."""
    ASSUMED = "assumed"
    """Of a machine that is not here, or by the user."""
    PRIOR = "prior"
    """The profile's, as nothing better is known."""
