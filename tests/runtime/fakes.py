"""A tiny transformer, and devices whose copies come as late or as early as the engine allows."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from autoflux.planning.schedule import aligned
from autoflux.runtime.lanes import DirectLane
from autoflux.runtime.ring import Arena
from autoflux.runtime.units import make_units, rest_of
from tests.tiny_model import TRANSFORMER

CPU = torch.device("cpu")
LISTS = ("transformer_blocks", "single_transformer_blocks")
POISON = 0xFF
"""Bytes that are NaN in every floating-point format, and no weight in an integer."""


def tiny_transformer(seed=0, dtype=torch.float32):
    """FLUX with two double and three single blocks, every weight a number of its own."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(**TRANSFORMER, guidance_embeds=True)
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.data = (torch.randn(weight.shape, generator=generator) * 0.2).to(dtype)
    return model.eval()


def tiny_inputs(batch=1, *, seed=0, dtype=torch.float32, times=(0.7, 0.3, 0.9, 0.1)) -> dict[str, Any]:
    """What a pass takes. Pictures of a batch differ, also in the time that they are at."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 12, 64, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(batch, 5, 32, generator=generator).to(dtype),
        "pooled_projections": torch.randn(batch, 32, generator=generator).to(dtype),
        "timestep": torch.tensor(times[:batch], dtype=dtype),
        "guidance": torch.full((batch,), 3.5, dtype=dtype),
        "img_ids": torch.randint(0, 4, (12, 3), generator=generator).float(),
        "txt_ids": torch.zeros(5, 3),
        "return_dict": False,
    }


@torch.no_grad()
def output_of(model: nn.Module, **inputs: Any) -> Tensor:
    return model(**(inputs or tiny_inputs()))[0]


def poisoned_arena(*, resident_bytes=0, ring_bytes=0, lane=None) -> Arena:
    """An arena in which what was never copied shows."""
    arena = Arena(CPU, resident_bytes=resident_bytes, ring_bytes=ring_bytes, lane=lane or DirectLane())
    for memory in (arena.resident, arena.ring.memory):
        memory.fill_(POISON)
    return arena


def staying_bytes(module, units, resident=()) -> int:
    """What an arena must hold for good."""
    rest = rest_of(module, units)
    return sum(aligned(units[i].nbytes) for i in resident) + (rest.nbytes if rest else 0)


def arena_for(module, units, resident=(), *, ring_bytes=None, lane=None) -> Arena:
    """A poisoned arena as small as it may be; the ring holds the largest streamed unit unless told."""
    largest = max((unit.nbytes for i, unit in enumerate(units) if i not in resident), default=0)
    ring_bytes = largest if ring_bytes is None else ring_bytes
    return poisoned_arena(resident_bytes=staying_bytes(module, units, resident), ring_bytes=ring_bytes, lane=lane)


def hooks_of(module: nn.Module) -> list[Any]:
    """Every hook of a module and those below it."""
    return [
        hook
        for child in module.modules()
        for kind in (child._forward_pre_hooks, child._forward_hooks, child._backward_hooks)
        for hook in kind.values()
    ]


class NeverMark:
    """A mark that nobody waits for."""

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end) -> float:
        return 0.0


class LateLane:
    """Computes at once and copies as late as it may: when the computation or the host waits for it."""

    class _Mark(NeverMark):
        def __init__(self, lane: LateLane) -> None:
            self.lane = lane
            self.due = 0

        def synchronize(self) -> None:
            self.lane.copy_until(self.due)

    def __init__(self) -> None:
        self.waiting: deque[tuple[Tensor, Tensor]] = deque()
        self.asked = self.done = 0
        self._lock = threading.RLock()

    def mark(self, *, timing: bool = False) -> Any:
        return self._Mark(self)

    def copy(self, target: Tensor, source: Tensor) -> None:
        with self._lock:
            self.waiting.append((target, source))
            self.asked += 1

    def set_copied(self, mark) -> None:
        mark.due = self.asked

    def set_computed(self, mark) -> None:
        mark.due = 0

    def copies_wait(self, mark) -> None:
        pass

    def computation_waits(self, mark) -> None:
        mark.synchronize()

    def copy_until(self, due: int) -> None:
        with self._lock:
            while self.done < due:
                target, source = self.waiting.popleft()
                target.copy_(source)
                self.done += 1


class TwoQueues:
    """A device like CUDA: two queues in which the host runs ahead, and marks that order them.

    `copies_first` says which queue goes on where both may. Nothing happens before the host waits for a mark or calls
    `finish`: whatever the marks do not forbid can come out wrong.
    """

    class _Mark(NeverMark):
        def __init__(self, device: TwoQueues) -> None:
            self.device = device
            self.times_set = self.times_passed = 0

        def synchronize(self) -> None:
            goal = self.times_set
            self.device.advance(lambda: self.times_passed >= goal)

    def __init__(self, copies_first: Callable[[], bool]) -> None:
        self._copies_first = copies_first
        self._copies: deque[tuple[Callable[[], bool], Callable[[], None]]] = deque()
        self._computing: deque[tuple[Callable[[], bool], Callable[[], None]]] = deque()
        self._lock = threading.RLock()

    @property
    def copies_under_way(self) -> int:
        return len(self._copies)

    def mark(self, *, timing: bool = False) -> Any:
        return self._Mark(self)

    def compute(self, work: Callable[[], None]) -> None:
        self._put(self._computing, work)

    def copy(self, target: Tensor, source: Tensor) -> None:
        self._put(self._copies, lambda: target.copy_(source))

    def set_copied(self, mark) -> None:
        self._set(self._copies, mark)

    def set_computed(self, mark) -> None:
        self._set(self._computing, mark)

    def copies_wait(self, mark) -> None:
        self._wait(self._copies, mark)

    def computation_waits(self, mark) -> None:
        self._wait(self._computing, mark)

    def finish(self) -> None:
        self.advance(lambda: not self._copies and not self._computing)

    def advance(self, until: Callable[[], bool]) -> None:
        with self._lock:
            while not until():
                can_copy = bool(self._copies) and self._copies[0][0]()
                can_compute = bool(self._computing) and self._computing[0][0]()
                assert can_copy or can_compute, "both queues wait for each other"
                queue = self._copies if can_copy and (not can_compute or self._copies_first()) else self._computing
                queue.popleft()[1]()

    def _put(self, queue, work, ready=lambda: True) -> None:
        with self._lock:
            queue.append((ready, work))

    def _set(self, queue, mark) -> None:
        with self._lock:
            mark.times_set += 1
            number = mark.times_set

        def passed() -> None:
            mark.times_passed = number

        self._put(queue, passed)

    def _wait(self, queue, mark) -> None:
        # As an event of CUDA: what was last recorded when the wait was put in the queue; nothing if it never was.
        number = mark.times_set
        self._put(queue, lambda: None, lambda: mark.times_passed >= number)


class Number:
    """A result on a `TwoQueues`: there once the device has come to it."""

    def __init__(self, value: int | None = None) -> None:
        self.value = value


class QueuedLayer(nn.Module):
    """A layer whose weights are read when the device computes it, not when the host calls it."""

    def __init__(self, device: TwoQueues, sizes, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.device = device
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randint(-(2**40), 2**40, (size,), generator=generator), requires_grad=False)
            for size in sizes
        )
        self.fails = False

    def forward(self, given: Number) -> Number:
        if self.fails:
            raise ArithmeticError
        made = Number()

        def work() -> None:
            made.value = self.computed(given.value)

        self.device.compute(work)
        return made

    def computed(self, given: int) -> int:
        """What the layer makes of a number, at once."""
        for weight in self.weights:
            given = (given * 31 + int(weight.sum())) % (2**61 - 1)
        return given


class QueuedChain(nn.Module):
    """Layers one after the other; some may be skipped."""

    def __init__(self, device: TwoQueues, sizes, seed=0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(QueuedLayer(device, each, 1000 * seed + i) for i, each in enumerate(sizes))

    def forward(self, given: Number, skipped=()) -> Number:
        for i, layer in enumerate(self.layers):
            if i not in skipped:
                given = layer(given)
        return given


class Chain(nn.Module):
    """Linear layers one after the other; some may be skipped."""

    def __init__(self, widths=(16, 24, 8, 40, 16), seed=0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, (*widths[1:], widths[0]), strict=True))
        self.requires_grad_(requires_grad=False)

    def forward(self, x: Tensor, skipped=()) -> Tensor:
        for i, layer in enumerate(self.layers):
            # A layer that is skipped is replaced by something that is as wide.
            x = layer(x) if i not in skipped else x.sum(-1, keepdim=True).expand(*x.shape[:-1], layer.out_features)
        return x


def layer_units(module: nn.Module, block_bytes=0):
    """Units of a chain's layers."""
    from autoflux.runtime.units import block_atoms

    return make_units(block_atoms(module, ["layers"]), block_bytes)


def read_ahead_threads() -> Iterator[threading.Thread]:
    return (thread for thread in threading.enumerate() if thread.name == "read-ahead" and thread.is_alive())
