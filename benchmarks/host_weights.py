"""FLUX.1-dev's networks made again and again from one set of random weights in RAM, as a loader would read them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from autoflux.models.values import Model, Precision
from autoflux.planning.packs import PackedPart, Packs
from autoflux.planning.terms import TRANSFORMER, Placement, Waiting
from autoflux.planning.values import ComponentPlan, Plan
from autoflux.runtime.memory import freed_ram_given_back
from autoflux.runtime.packed import fill
from autoflux.runtime.quantized import QuantizedLinear
from autoflux.runtime.session import Session
from autoflux.runtime.stores import make_empty
from autoflux.runtime.streaming import NARROW, load_narrow, stays_wide
from autoflux.runtime.units import Unit, block_atoms
from benchmarks.full_size import BLOCK_LISTS, fill_randomly
from benchmarks.hollow_model import networks_on_meta, write_hollow_model

if TYPE_CHECKING:
    from autoflux.plugins.diffusers_loading import Loaded


class HostWeights:
    """The weights of all four networks, drawn once, in bfloat16; and the transformer's in 8 bits, made once."""

    def __init__(self, *, tiny: bool) -> None:
        self._hollow = networks_on_meta(tiny=tiny)
        self._weights: dict[str, dict[str, Tensor]] = {}
        self._narrow: dict[Precision, Narrow] = {}

    def model(self, folder: Path) -> Model:
        """A model folder with configurations and no weights, and what it consists of."""
        return write_hollow_model(folder, self._hollow)

    def draw(self) -> int:
        """Make the weights; returns the bytes that they take from now on."""
        for name, hollow in self._hollow.items():
            filled = fill_randomly(copy.deepcopy(hollow), device="cpu")
            self._weights[name] = {key: tensor.data for key, tensor in filled.state_dict().items()}
        tensors = {t.data_ptr(): t.nbytes for held in self._weights.values() for t in held.values()}
        return sum(tensors.values())

    def are_there(self, plan: Plan) -> bool:
        """Whether there are weights in the precision of that plan."""
        planned = plan.component(TRANSFORMER)
        return not _is_narrowed(planned) or planned.storage in self._narrow

    def narrow(self, plan: Plan) -> int:
        """Make what that plan holds in 8 bits, if it is not there, as a pack has it; returns the bytes it takes."""
        if self.are_there(plan):
            return 0
        planned = plan.component(TRANSFORMER)
        network = copy.deepcopy(self._hollow[TRANSFORMER])
        make_empty(network, torch.bfloat16)
        weights = self._weights[TRANSFORMER]
        load_narrow(
            network,
            block_atoms(network, BLOCK_LISTS),
            WeightStore(network, weights),
            planned.storage,
            native=planned.native,
            device=torch.device(plan.device),
        )
        made = {
            f"{name}.{own}": getattr(layer, own).data
            for name, layer in network.named_modules()
            if isinstance(layer, QuantizedLinear)
            for own in ("weight", "scale")
        }
        self._narrow[planned.storage] = Narrow(network.to("meta"), weights | made)
        return sum(tensor.nbytes for tensor in made.values())

    def packs(self) -> Packs:
        """What a planner is to know where weights are read `direct`: as if all were packed."""
        wide = Precision.BFLOAT16
        sizes = {
            (name, wide): sum(tensor.numel() for tensor in hollow.state_dict().values()) * wide.item_bytes
            for name, hollow in self._hollow.items()
        }
        narrowed = sum(layer.weight.numel() for layer in self._narrowed_layers())
        for storage in NARROW:
            sizes[TRANSFORMER, storage] = sizes[TRANSFORMER, wide] - narrowed * (wide.item_bytes - storage.item_bytes)
        return Packs(
            parts=tuple(
                PackedPart(component=name, storage=storage, arithmetic=wide, nbytes=nbytes)
                for (name, storage), nbytes in sizes.items()
            )
        )

    def _narrowed_layers(self) -> Iterator[nn.Linear]:
        for block in block_atoms(self._hollow[TRANSFORMER], BLOCK_LISTS):
            for name, layer in block.module.named_modules():
                if isinstance(layer, nn.Linear) and not stays_wide(name, layer):
                    yield layer

    def session(self, plan: Plan, model: Model, *, direct: bool = False) -> Session:
        """The session of that plan through the diffusers backend; `direct` as if from packs."""
        from autoflux.plugins.diffusers_loading import assemble
        from autoflux.plugins.diffusers_pipeline import DiffusersPipeline

        with freed_ram_given_back():
            components = assemble(self._networks(plan, direct=direct), plan, Path(model.path))
        return Session(DiffusersPipeline(components, plan, model), plan, model)

    def _networks(self, plan: Plan, *, direct: bool) -> Iterator[Loaded]:
        """What the backend loads for that plan, with where weights are that it leaves unread.

        `direct` leaves all unread that is streamed, and reads to the device what stays there, as from a pack.
        """
        from autoflux.plugins.diffusers_loading import DTYPES, Loaded

        for name in self._hollow:
            planned = plan.component(name)
            narrow = self._narrow.get(planned.storage) if direct and _is_narrowed(planned) else None
            if narrow:
                network = narrow.made_empty(native=planned.native)
            else:
                network = copy.deepcopy(self._hollow[name])
                make_empty(network, DTYPES[planned.arithmetic])
            store = WeightStore(network, narrow.weights if narrow else self._weights[name])
            if _left_unread(planned) or (direct and planned.placement == Placement.STREAMED):
                yield Loaded(name, network.eval(), store)
                continue
            there = direct and planned.placement == Placement.DEVICE
            fill(network, store, torch.device(plan.device if there else "cpu"))
            yield Loaded(name, network.eval())


class Narrow(NamedTuple):
    """A transformer in 8 bits: without its weights, and these by name."""

    hollow: nn.Module
    weights: dict[str, Tensor]

    def made_empty(self, *, native: bool) -> nn.Module:
        """The network, without its weights in RAM."""
        network = copy.deepcopy(self.hollow)
        make_empty(network)
        for module in network.modules():
            if isinstance(module, QuantizedLinear):
                module.native = native
        return network


def _left_unread(planned: ComponentPlan) -> bool:
    """As the backend does: what is made narrow is read block by block, and what waits in files is not read at all."""
    on_disk = planned.placement == Placement.STREAMED and planned.waiting == Waiting.DISK
    return on_disk or _is_narrowed(planned)


def _is_narrowed(planned: ComponentPlan) -> bool:
    """Whether the engine holds it in 8 bits; libraries do so in their own way."""
    return planned.is_narrow and planned.placement != Placement.NATIVE


class WeightStore:
    """Reads the tensors of a network from weights of the same names. See `autoflux.runtime.stores.Store`."""

    def __init__(self, network: nn.Module, weights: dict[str, Tensor]) -> None:
        state = network.state_dict(keep_vars=True)
        self._sources = {id(tensor): weights[name] for name, tensor in state.items()}
        self._computed = {id(t): t.data for t in network.buffers() if id(t) not in self._sources}

    def read(self, unit: Unit, target: Tensor) -> None:
        """Write the unit's bytes into `target`, converted to the network's format."""
        for view, piece in zip(unit.views(target), unit.pieces, strict=True):
            view.copy_(self._sources.get(id(piece.tensor), self._computed.get(id(piece.tensor))))

    def close(self) -> None:
        """Nothing to close."""
