"""Taking the AdaLN modulation out of the denoise loop.

A quarter of FLUX's weights (the modulation linears) only see the embedding of timestep, guidance and pooled prompt,
which is known for all steps before the first. Their outputs are computed once a picture, linear by linear, with calls
of the same shape as in the loop, so that they are the same bits; in the loop they are looked up, and the weights are
neither streamed nor held.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoflux.runtime.units import Atom


class LookUp(nn.Module):
    """In the place of a modulation linear: gives rows computed before, whatever it is asked."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features
        self.rows = torch.empty(0)

    def forward(self, _embedding: Tensor) -> Tensor:
        """(batch, out features) of the step that was selected."""
        return self.rows


class ModulationLinear(nn.Module):
    """One modulation linear over the embeddings of many steps."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, embeddings: Tensor) -> Tensor:
        """(steps, hidden) to (steps, out features), one row at a time: a batch of rows would round differently."""
        return torch.cat([self.linear(functional.silu(row)) for row in torch.split(embeddings, 1)])


@dataclass(frozen=True)
class _Site:
    """Where a linear was, and its columns in a row of all modulation."""

    name: str
    owner: nn.Module
    original: nn.Module
    lookup: LookUp
    columns: slice


class Modulation(nn.Module):
    """All modulation linears of a transformer, in the order they run, outside of it.

    Stream this module's atoms like any other: each runs once a picture. `restore` puts the linears back.
    """

    def __init__(self, sites: Sequence[_Site]) -> None:
        super().__init__()
        self._sites = tuple(sites)
        self.linears = nn.ModuleList(ModulationLinear(site.original) for site in sites)
        self.width = sites[-1].columns.stop if sites else 0
        self._selected = torch.empty(0)

    @classmethod
    def taken_from(cls, blocks: Iterable[Atom]) -> Modulation:
        """Replace every modulation linear of these blocks by a look-up.

        Recognized by diffusers' and DiffSynth's names: a `linear` inside a module whose name begins with `norm`.
        """
        sites, at = [], 0
        for block in blocks:
            for name, module in block.module.named_modules():
                linear = getattr(module, "linear", None)
                if not name.rpartition(".")[2].startswith("norm") or not isinstance(linear, nn.Module):
                    continue
                width = int(cast("nn.Linear", linear).out_features)
                lookup = LookUp(width)
                sites.append(_Site(f"{block.name}.{name}.linear", module, linear, lookup, slice(at, at + width)))
                module.linear = lookup
                at += width
        return cls(sites)

    def atoms(self) -> list[Atom]:
        """The linears in the order `forward` runs them."""
        return [Atom(site.name, module) for site, module in zip(self._sites, self.linears, strict=True)]

    def forward(self, embeddings: Tensor) -> Tensor:
        """Embeddings of steps, (steps, hidden), to the modulation of all blocks in each, (steps, width)."""
        rows = embeddings.new_empty(len(embeddings), self.width)
        for site, linear in zip(self._sites, self.linears, strict=True):
            rows[:, site.columns] = linear(embeddings)
        return rows

    def select(self, rows: Tensor) -> None:
        """Let the next pass use `rows`: (batch, width), one row a picture, of the step that picture is at.

        They are copied to where those of the pass before were, which a CUDA graph may read them from.
        """
        before = self._selected
        if (rows.shape, rows.dtype, rows.device) == (before.shape, before.dtype, before.device):
            before.copy_(rows)
            return
        with torch.inference_mode(mode=False):
            self._selected = torch.empty_like(rows)
        self._selected.copy_(rows)
        for site in self._sites:
            site.lookup.rows = self._selected[:, site.columns]

    def restore(self) -> None:
        """Put the linears back in their places."""
        for site in self._sites:
            site.owner.linear = site.original
