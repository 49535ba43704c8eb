"""Layers of FLUX's blocks, streamed one by one: how large they are and how long they compute. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

from autoflux.hardware.values import BlockKind
from autoflux.models.values import Model, ParameterCount
from autoflux.planning.schedule import CONTENTION, Unit, bound_seconds, pass_seconds
from autoflux.planning.speed import KINDS
from autoflux.planning.values import ComponentPlan
from autoflux.planning.weights import component_bytes

OF_DOUBLE_BLOCK = (
    *((1, "image"), (1, "image"), (1, "image"), (1, "text"), (1, "text"), (1, "text")),  # queries, keys and values
    *((1, "image"), (1, "text")),  # what attention gives
    *((4, "image"), (4, "image"), (4, "text"), (4, "text")),  # feed-forward
)
OF_SINGLE_BLOCK = ((4, "all"), (1, "all"), (1, "all"), (1, "all"), (5, "all"))
"""Layers in the order that diffusers runs them: squares of the hidden size, and the tokens that they multiply."""

MODULATIONS: dict[BlockKind, int] = {"double": 2, "single": 1}
"""Layers of modulation before them. They multiply one token."""

WAITING = 0.55
"""Of what a pass takes beyond all copies or all arithmetic by this simulation, what it does take. One H200: 0.53 with
one picture of 1024x1024 (benchmarks/streaming.py, smallest), 0.57 with four (benchmarks/planning.py)."""

ROOM = 1.01
"""Of the ring, over the weights of a layer: what is beside its matrix, and where tensors begin."""


class LayerPass(NamedTuple):
    """A pass whose layers are streamed, given by `layers_of`."""

    layers: tuple[Unit, ...]
    bytes_per_second: float
    pause: float

    @property
    def largest(self) -> int:
        """What the ring has to hold, in bytes."""
        return int(ROOM * max(layer.nbytes for layer in self.layers))


def layers_of(
    model: Model, planned: ComponentPlan, seconds: Mapping[BlockKind, float], text_share: float
) -> tuple[Unit, ...]:
    """All of a transformer in the order they run; what lies outside of blocks comes first, and computes nothing.

    `seconds` are what a block computes for; `text_share` is that of text among all tokens.
    """
    component = model.component(planned.name)
    layers: list[Unit] = []
    for kind, blocks in zip(KINDS, component.block_lists, strict=False):
        for block in blocks.blocks:
            layers += _of_block(kind, block.parameters, planned, seconds[kind], text_share)
    largest = max(layer.nbytes for layer in layers)
    outside = component_bytes(model, planned) - sum(layer.nbytes for layer in layers)
    pieces = max(1, -(-outside // largest))
    return (*[Unit(outside // pieces, 0.0)] * pieces, *layers)


def _of_block(
    kind: BlockKind, counts: ParameterCount, planned: ComponentPlan, seconds: float, text_share: float
) -> Iterator[Unit]:
    tokens = {"image": 1 - text_share, "text": text_share, "all": 1.0}
    layers = OF_DOUBLE_BLOCK if kind == "double" else OF_SINGLE_BLOCK
    squares = sum(size for size, _ in layers)
    work = sum(size * tokens[of] for size, of in layers)
    for _ in range(MODULATIONS[kind]):
        yield Unit(counts.modulation * planned.arithmetic.item_bytes // MODULATIONS[kind], 0.0)
    for size, of in layers:
        nbytes = counts.matmul * size // squares * planned.storage.item_bytes
        yield Unit(nbytes, seconds * size * tokens[of] / work)


@lru_cache(maxsize=1024)
def layer_seconds(layers: LayerPass, ring_bytes: int, link_share: float = 1.0) -> float:
    """What the pass takes, at that share of the link's rate."""
    units, rate = layers.layers, link_share * layers.bytes_per_second
    taken = CONTENTION * sum(layer.nbytes for layer in units)
    least = bound_seconds(units, (), rate, pause=layers.pause + taken)
    simulated = pass_seconds(units, (), ring_bytes, rate, pause=layers.pause)
    return least + WAITING * max(0.0, simulated - least)
