"""In which order a module's layers run, found without computing anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from autoflux.runtime.units import Atom


def layer_atoms(module: nn.Module, run: Callable[[], Any]) -> list[Atom]:
    """The layers that own weights, in the order in which `run` calls them.

    `run` calls the module with tensors made in it; it is traced with fake tensors, so it takes a second or two at any
    size. A layer called more than once in a pass, or one that both owns weights and holds other layers, is left out:
    its weights stay on the device.
    """
    names = {id(child): name for name, child in module.named_modules()}
    called: list[nn.Module] = []

    def note(child: nn.Module, _given: Any) -> None:
        called.append(child)

    hooks = [child.register_forward_pre_hook(note) for child in module.modules() if _is_layer(child)]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    times = Counter(map(id, called))
    return [Atom(names[id(child)], child) for child in called if times[id(child)] == 1]


def _is_layer(module: nn.Module) -> bool:
    own = any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False))
    below = sum(1 for _ in module.parameters()) > sum(1 for _ in module.parameters(recurse=False))
    return own and not below
