"""diffusers' own offload, for plans that leave weights to the library."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from diffusers.hooks import apply_group_offloading
from torch import nn

from autoflux import ComponentPlan, ContradictoryWishes, Plan


class GroupOffload:
    """Group offloading layer by layer, with copies on a stream of their own where the device has streams.

    By layer it is faster and takes less device memory than by block: see `benchmarks/streaming_peers.py`.
    """

    def __init__(self, plan: Plan) -> None:
        self._device = torch.device(plan.device)

    def hold(self, network: nn.Module, planned: ComponentPlan) -> nn.Module:
        """Place its hooks.

        Raises:
            ContradictoryWishes: weights are to be held in another format than they are computed in.
        """
        if planned.storage != planned.arithmetic:
            raise ContradictoryWishes(
                f"diffusers' own offload holds weights as they are computed with, and {planned.name!r} is to be held "
                f"as {planned.storage.value}",
                hint="drop --offload, or choose a wide --precision",
            )
        streams = self._device.type in ("cuda", "xpu")
        apply_group_offloading(
            network,
            onload_device=self._device,
            offload_device=torch.device("cpu"),
            offload_type="leaf_level",
            use_stream=streams,
            record_stream=streams,
            non_blocking=streams,
        )
        return network

    def use(self, network: nn.Module) -> AbstractContextManager[None]:  # noqa: ARG002 — its hooks see to everything
        """Nothing to do."""
        return nullcontext()
