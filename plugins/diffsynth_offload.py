"""DiffSynth's VRAM management, for plans that leave weights to the library."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pkgutil import resolve_name
from typing import Any, Self

import torch
from torch import nn

from autoflux import ComponentPlan, ContradictoryWishes, Plan, Precision, give_back_unused

from . import diffsynth_transformer  # noqa: F401 — sets DiffSynth's environment first
from .diffusers_loading import DTYPES

# isort: split
from diffsynth.configs import VRAM_MANAGEMENT_MODULE_MAPS
from diffsynth.core import ModelConfig
from diffsynth.core.vram.layers import AutoTorchModule, enable_vram_management
from diffsynth.models.general_modules import RMSNorm

_GIB = 2**30
_MAPS = {
    "text_encoder": "diffsynth.models.flux_text_encoder_clip.FluxTextEncoderClip",
    "text_encoder_2": "diffsynth.models.flux_text_encoder_t5.FluxTextEncoderT5",
    "transformer": "diffsynth.models.flux_dit.FluxDiT",
    "vae": "diffsynth.models.flux_vae.FluxVAEDecoder",
}
"""Whose list of layers to manage DiffSynth has for each component: the layers are the same in ours."""


def vram_fields(planned: ComponentPlan, device: str) -> dict[str, Any]:
    """DiffSynth's four states for a component: it waits in RAM as stored, stays on the device as stored as far as its
    limit allows, and is computed with as planned.

    Raises:
        ContradictoryWishes: the planned format is none that DiffSynth casts to.
    """
    storage = _storage(planned)
    return {
        "offload_dtype": storage,
        "offload_device": "cpu",
        "onload_dtype": storage,
        "onload_device": "cpu",
        "preparing_dtype": storage,
        "preparing_device": device,
        "computation_dtype": DTYPES[planned.arithmetic],
        "computation_device": device,
    }


class VramManagement:
    """Layers come to the device when they are first used, and stay until its memory in use reaches a limit; beyond it
    they are copied for each use. Components that are not in use leave the device when another is used.
    """

    def __init__(self, device: str, limit_gib: float | None) -> None:
        """`limit_gib` counts all that is in use on the device, by whomever; None for no limit, which the CPU needs."""
        self._device = device
        self.limit_gib = limit_gib
        self._held: list[nn.Module] = []
        self._in_use: list[nn.Module] = []

    @classmethod
    def planned(cls, plan: Plan) -> Self:
        """With a limit that leaves room for what the plan puts beside weights, and counts the driver's context in."""
        limited = plan.vram_limit_bytes is not None
        return cls(plan.device, (plan.ring_bytes + plan.priors.context_bytes) / _GIB if limited else None)

    def hold(self, network: nn.Module, planned: ComponentPlan) -> nn.Module:
        """Wrap its layers.

        Raises:
            ContradictoryWishes: see `vram_fields`.
        """
        config = ModelConfig(**vram_fields(planned, self._device))
        if config.offload_dtype != config.computation_dtype:
            network.to(config.offload_dtype)
        names = VRAM_MANAGEMENT_MODULE_MAPS[_MAPS[planned.name]]
        layers = {resolve_name(layer): resolve_name(wrapper) for layer, wrapper in names.items()}
        if RMSNorm in layers:  # in whose place ours has torch's
            layers[nn.RMSNorm] = layers[RMSNorm]
        managed: nn.Module = enable_vram_management(
            network, layers, vram_config=config.vram_config(), vram_limit=self.limit_gib
        )
        _place_rest(managed, torch.device(self._device))
        self._held.append(managed)
        return managed

    @contextmanager
    def use(self, network: nn.Module) -> Iterator[None]:
        """Let the network's layers come to the device, and those leave it that are not in use."""
        self._offload_all_but([network, *self._in_use])
        for module in _managed(network):
            module.onload()
        self._in_use.append(network)
        try:
            yield
        finally:
            self._in_use.remove(network)

    def _offload_all_but(self, kept: list[nn.Module]) -> None:
        idle = [network for network in self._held if not any(network is other for other in kept)]
        leaving = [module for network in idle for module in _managed(network) if module.state != 0]
        for module in leaving:
            module.offload()
        if leaving:
            give_back_unused()  # what torch keeps for itself counts as used


def _storage(planned: ComponentPlan) -> torch.dtype:
    if planned.storage == planned.arithmetic:
        return DTYPES[planned.storage]
    if planned.storage == Precision.FLOAT8 and planned.name == "transformer":
        return torch.float8_e4m3fn
    raise ContradictoryWishes(
        f"DiffSynth's own offload cannot hold {planned.name!r} as {planned.storage.value}",
        hint="drop --offload, or choose another --precision",
    )


def _managed(network: nn.Module) -> list[Any]:
    return [module for module in network.modules() if isinstance(module, AutoTorchModule)]


def _place_rest(module: nn.Module, device: torch.device) -> None:
    """Move what no wrapper manages, such as buffers of positions."""
    if isinstance(module, AutoTorchModule):
        return
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        tensor.data = tensor.data.to(device)
    for child in module.children():
        _place_rest(child, device)
