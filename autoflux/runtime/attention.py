"""What computes attention: torch's own choice, or cuDNN, which is faster on some cards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from autoflux.errors import UnknownName
from autoflux.hardware.values import LEAST_CUDNN
from autoflux.models.values import Precision
from autoflux.planning.terms import ATTENTIONS, CUDNN, DEFAULT_ATTENTION
from autoflux.planning.ways import check_cudnn

_KERNELS = {CUDNN: SDPBackend.CUDNN_ATTENTION}


def check_attention(name: str, device: torch.device, arithmetic: Precision) -> None:
    """Whether the device can compute attention so.

    Raises:
        ContradictoryWishes: it cannot, or not in that number format.
        UnknownName: nothing is called that.
    """
    if name == DEFAULT_ATTENTION:
        return
    if name not in _KERNELS:
        raise UnknownName("way to compute attention", name, ATTENTIONS)
    check_cudnn(str(device), arithmetic, there=_has_cudnn(device))


@contextmanager
def attending(name: str) -> Iterator[None]:
    """Confine torch's `scaled_dot_product_attention` to that way of computing it for the time of the block.

    torch.compile chooses when it compiles, and does not compile again when this has changed.
    """
    if name == DEFAULT_ATTENTION:
        yield
        return
    with sdpa_kernel(_KERNELS[name]):
        yield


def _has_cudnn(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    if not torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return torch.cuda.get_device_capability(device) >= LEAST_CUDNN
