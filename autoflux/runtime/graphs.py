"""Blocks replayed from CUDA graphs: a step asks the host for one launch a block instead of one an operation.

Where the device computes a block in less time than the host takes to launch its operations, the device waits. A graph
holds the launches of one block, so weights may still be brought, and be waited for, between blocks. It computes with
the same kernels, and so the same bits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from functools import cache, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autoflux.runtime.memory import give_back_unused

_log = logging.getLogger(__name__)


class Tape(Protocol):
    """What records work of a device, to have it done again."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Note what `work` has the device do. Gives what has it done, at the same addresses.

        Raises:
            RuntimeError: it does what cannot be recorded, or there is no memory for it.
        """

    def rewind(self) -> None:
        """Let go of the memory of all recordings; none of them may be used any more."""


class CudaTape:
    """Records CUDA graphs, all in one pool of memory: replayed in turn, one may use what another leaves."""

    def __init__(self, device: torch.device) -> None:
        self._stream = _capture_stream(device)
        self._pool: Any = None

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        if self._pool is None:
            give_back_unused()  # what the same work left behind when it was done without a graph
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # Other threads may do as they like meanwhile: they read weights and watch memory.
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph.replay

    def rewind(self) -> None:
        self._pool = None
        give_back_unused()  # which waits until none of them is running


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each device: cuBLAS keeps memory for each stream from its first product on, which must not come from a
    pool that is let go."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        torch.mm(x := torch.zeros(16, 16, device=device, dtype=torch.bfloat16), x)
    return stream


class BlockGraphs:
    """Replays blocks from graphs, once inputs of one shape have come twice in a row.

    The first time a block runs as it was written, which compiles kernels and chooses algorithms; the second time it is
    recorded. Inputs of another shape end all recordings: there are never graphs of two sizes in memory. Should
    recording fail, blocks run as they were written from then on.

    What a block returns is valid until the next block runs. A tensor that is given again is taken to be unchanged.
    """

    def __init__(self, blocks: Iterable[nn.Module], tape: Tape) -> None:
        """Take the place of each block's `forward`; `undo` gives it back."""
        self._blocks = tuple(blocks)
        self._written = [vars(block).get("forward") for block in self._blocks]
        """What was in the place of each forward already, as compiling leaves it."""
        self._tape = tape
        self._seen: dict[int, tuple[Any, ...]] = {}
        self._recordings: dict[int, _Recording] = {}
        self._places: list[_Place] = []
        self._memory: set[int] = set()
        """Where the places lie."""
        self._works = True
        for number, block in enumerate(self._blocks):
            block.forward = partial(self._run, number, block.forward)

    def forget(self) -> None:
        """Let go of all recordings and their memory. They are made anew as soon as blocks run twice."""
        self._seen.clear()
        if not self._places:
            return
        self._recordings.clear()
        self._places.clear()
        self._memory = set()
        self._tape.rewind()

    def undo(self) -> None:
        """From now on blocks run as they were written."""
        self.forget()
        for block, forward in zip(self._blocks, self._written, strict=True):
            del block.forward
            if forward:
                block.forward = forward
        self._blocks = ()

    def _run(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        leaves, structure = pytree.tree_flatten((args, kwargs))
        shape = (structure, *map(_shape, leaves))
        recording = self._recordings.get(number)
        if recording and recording.shape != shape:
            recording = None  # or its memory would be kept
            self.forget()
        if not recording and self._works and self._seen.get(number) == shape:
            recording = self._record(number, forward, leaves, shape)
        self._seen[number] = shape
        return recording.replay(leaves) if recording else forward(*args, **kwargs)

    def _record(
        self, number: int, forward: Callable[..., Any], leaves: Sequence[Any], shape: tuple[Any, ...]
    ) -> _Recording | None:
        try:
            places = self._find_places(leaves)
            recording = _Recording.made(self._tape, forward, leaves, shape, places, self._memory)
        except RuntimeError as error:
            _log.warning("blocks are not replayed from CUDA graphs but launched: %s", error)
            self._works = False
            self.forget()
            return None
        self._recordings[number] = recording
        return recording

    def _find_places(self, leaves: Sequence[Any]) -> list[_Place]:
        """A place for each tensor: where it is already, or else any of its shape that no other of them has."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        found = [next((place for place in self._places if place.has(tensor)), None) for tensor in tensors]
        for i, tensor in enumerate(tensors):
            if found[i] is None:
                free = (p for p in self._places if p.suits(tensor) and all(p is not other for other in found))
                found[i] = next(free, None) or self._new_place(tensor)
        return [place for place in found if place]

    def _new_place(self, tensor: Tensor) -> _Place:
        with torch.inference_mode(mode=tensor.is_inference()):
            place = _Place(torch.empty_like(tensor))
        self._places.append(place)
        self._memory.add(place.tensor.untyped_storage().data_ptr())
        return place


class _Place:
    """Memory from which graphs read a tensor, and in which they leave one."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._source: Tensor | None = None
        """Of what it holds a copy, as long as it does."""

    def has(self, tensor: Tensor) -> bool:
        return tensor is self.tensor or tensor is self._source

    def suits(self, tensor: Tensor) -> bool:
        return bool(_shape(tensor) == _shape(self.tensor))

    def take(self, tensor: Tensor) -> None:
        self.tensor.copy_(tensor)
        self._source = tensor

    def written(self) -> None:
        """A graph has left something else in it."""
        self._source = None


class _Made(NamedTuple):
    """What a recorded block returns: its leaves, of which tensors lie in places or in the recording's own memory."""

    leaves: list[Any]
    structure: Any
    places: list[_Place]


class _Recording:
    """One block for inputs of one shape."""

    def __init__(
        self,
        shape: tuple[Any, ...],
        places: Sequence[_Place],
        memory: AbstractSet[int],
        replay: Callable[[], None],
        made: _Made,
    ) -> None:
        self.shape = shape
        self._places, self._memory, self._replay, self._made = tuple(places), memory, replay, made

    @classmethod
    def made(
        cls,
        tape: Tape,
        forward: Callable[..., Any],
        leaves: Sequence[Any],
        shape: tuple[Any, ...],
        places: Sequence[_Place],
        memory: AbstractSet[int],
    ) -> _Recording:
        """Record `forward` of what will lie in `places`, which it does not read yet; all places are in `memory`.

        Raises:
            RuntimeError: as `Tape.record`.
        """
        tensors = iter(places)
        given = [next(tensors).tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(given, shape[0])
        made: list[_Made] = []
        replay = tape.record(lambda: made.append(_left_in(places, memory, forward(*args, **kwargs))))
        return cls(shape, places, memory, replay, made[0])

    def replay(self, leaves: Sequence[Any]) -> Any:
        """What the block makes of these inputs."""
        tensors = (leaf for leaf in leaves if isinstance(leaf, Tensor))
        elsewhere = [(p, tensor) for p, tensor in zip(self._places, tensors, strict=True) if not p.has(tensor)]
        # One that lies in the place of another could be written before it is read, and will change when it is.
        apart = [(place, _apart(tensor, self._memory)) for place, tensor in elsewhere]
        for place, tensor in apart:
            place.take(tensor)
        self._replay()
        for place in self._made.places:
            place.written()
        return pytree.tree_unflatten(self._made.leaves, self._made.structure)


def _left_in(places: Sequence[_Place], memory: AbstractSet[int], returned: Any) -> _Made:
    """Copy what a block returned to places from which the next one can read it without another copy.

    Otherwise results of all blocks would take memory at once, for nobody knows when the last of them was used.
    """
    leaves, structure = pytree.tree_flatten(returned)
    taken: list[_Place] = [place for place in places for leaf in leaves if leaf is place.tensor]
    written: list[_Place] = []
    # Parts of places are read before anything is written.
    whole = {id(place.tensor) for place in taken}
    apart = [_apart(leaf, memory) if isinstance(leaf, Tensor) and id(leaf) not in whole else leaf for leaf in leaves]
    for i, leaf in enumerate(apart):
        if not isinstance(leaf, Tensor) or any(leaf is place.tensor for place in taken):
            continue
        place = next((p for p in places if p.suits(leaf) and all(p is not other for other in taken)), None)
        if place:
            place.tensor.copy_(leaf)
            apart[i] = place.tensor
            taken.append(place)
            written.append(place)
    return _Made(apart, structure, written)


def _apart(tensor: Tensor, memory: AbstractSet[int]) -> Tensor:
    """The tensor, or a copy if it lies in that memory."""
    return tensor.clone() if tensor.untyped_storage().data_ptr() in memory else tensor


def _shape(leaf: Any) -> Any:
    """What must be the same for a recording to do; what is compiled is not the same for inference tensors."""
    return (leaf.shape, leaf.dtype, leaf.device, leaf.is_inference()) if isinstance(leaf, Tensor) else leaf
