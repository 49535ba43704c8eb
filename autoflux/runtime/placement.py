"""Where the weights of a component are while they are not used: on the device, or in RAM until their phase."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from autoflux.planning.values import Placement


class Residence:
    """Holds one component as its plan says.

    A visiting component's weights never change, so its RAM copy is kept and leaving the device costs nothing: the
    parameters are pointed back at it.
    """

    def __init__(self, module: nn.Module, placement: Placement, device: torch.device) -> None:
        self.module = module
        self.device = device
        self.visiting = placement == Placement.VISITING
        if not self.visiting:
            module.to(device)

    @contextmanager
    def on_device(self) -> Iterator[nn.Module]:
        """The module with its weights on the device, for the time of the block."""
        if not self.visiting:
            yield self.module
            return
        tensors = [*self.module.parameters(), *self.module.buffers()]
        in_ram = [tensor.data for tensor in tensors]
        try:
            for tensor in tensors:
                tensor.data = tensor.data.to(self.device)
            yield self.module
        finally:
            for tensor, data in zip(tensors, in_ram, strict=True):
                tensor.data = data
