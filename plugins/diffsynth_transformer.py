"""DiffSynth's FLUX transformer in any size, with weights in the layout of diffusers or of Black Forest Labs."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from autoflux import Component, FileStore, OpenPack, Rows, cache_dir, leave_on_disk, rotate, rotates, weight_shapes

from . import diffusers_loading  # noqa: F401 — sets what diffusers and transformers, which DiffSynth imports, read

# Read when DiffSynth is imported or asked for a file: weights come from where the model is, never from a hub.
os.environ["DIFFSYNTH_SKIP_DOWNLOAD"] = "true"
os.environ.setdefault("DIFFSYNTH_MODEL_BASE_PATH", str(cache_dir() / "diffsynth"))

from diffsynth.models.flux_dit import (
    AdaLayerNormContinuous,
    FluxDiT,
    FluxJointAttention,
    FluxJointTransformerBlock,
    FluxSingleTransformerBlock,
    RoPEEmbedding,
)
from diffsynth.models.general_modules import RMSNorm, TimestepEmbeddings
from diffsynth.utils.state_dict_converters.flux_dit import (
    FluxDiTStateDictConverter,
    FluxDiTStateDictConverterFromDiffusers,
)

BLOCK_LISTS = ("blocks", "single_blocks")
"""In the order they run."""

ROTARY_AXES = (16, 56, 56)
"""How FLUX.1 splits a head's width between picture, row and column; a `config.json` may say otherwise."""

ROTARY_THETA = 10000
TIME_WIDTH = 256
"""Of the sinusoidal embedding of timestep and guidance, the same in every FLUX."""

Shapes = Mapping[str, tuple[int, ...]]


class Joined(NamedTuple):
    """A tensor of the transformer put together of rows of tensors in files."""

    shape: tuple[int, ...]
    rows: Sequence[Rows]


@dataclass(frozen=True)
class Sizes:
    """What differs between FLUX transformers."""

    width: int
    head_width: int
    double_blocks: int
    single_blocks: int
    latent_width: int
    output_width: int
    text_width: int
    pooled_width: int
    guidance: bool
    rotary_axes: tuple[int, ...] = ROTARY_AXES

    @classmethod
    def of(cls, weights: Mapping[str, Joined], rotary_axes: Sequence[int]) -> Sizes:
        """Read from the shapes of DiffSynth's tensors.

        Raises:
            KeyError: one is missing.
            ValueError: the rotary embedding does not fit the heads.
        """
        width, latent_width = weights["x_embedder.weight"].shape
        head_width = weights["blocks.0.attn.norm_q_a.weight"].shape[0]
        if sum(rotary_axes) != head_width:
            raise ValueError(f"a rotary embedding of {tuple(rotary_axes)} does not fit heads of width {head_width}")
        return cls(
            width=width,
            head_width=head_width,
            double_blocks=_count(weights, "blocks"),
            single_blocks=_count(weights, "single_blocks"),
            latent_width=latent_width,
            output_width=weights["final_proj_out.weight"].shape[0],
            text_width=weights["context_embedder.weight"].shape[1],
            pooled_width=weights["pooled_text_embedder.0.weight"].shape[1],
            guidance=any(name.startswith("guidance_embedder.") for name in weights),
            rotary_axes=tuple(rotary_axes),
        )


class JointAttention(FluxJointAttention):  # type: ignore[misc]  # DiffSynth has no types
    """Attention of a double block, with rotary positions in one pass over memory where the device can."""

    def apply_rope(
        self, xq: torch.Tensor, xk: torch.Tensor, freqs_cis: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `_rotated`."""
        return _rotated(xq, xk, freqs_cis, super().apply_rope)


class SingleBlock(FluxSingleTransformerBlock):  # type: ignore[misc]  # DiffSynth has no types
    """A single block, with the same."""

    def apply_rope(
        self, xq: torch.Tensor, xk: torch.Tensor, freqs_cis: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `_rotated`."""
        return _rotated(xq, xk, freqs_cis, super().apply_rope)


def _rotated(
    query: torch.Tensor,
    key: torch.Tensor,
    matrices: torch.Tensor,
    otherwise: Callable[..., tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """(batch, heads, tokens, width) turned by matrices (1, 1, tokens, width / 2, 2, 2), to the bits of DiffSynth."""
    if not (rotates(query) and rotates(key)):
        return otherwise(query, key, matrices)
    cosine, sine = matrices[0, 0, :, :, 0, 0], matrices[0, 0, :, :, 1, 0]
    turned = (rotate(x.transpose(1, 2), cosine, sine).transpose(1, 2) for x in (query, key))
    return next(turned), next(turned)


class SizedDiT(FluxDiT):  # type: ignore[misc]  # DiffSynth has no types
    """`FluxDiT`, whose own constructor knows the sizes of FLUX.1 only, of the same parts in other sizes."""

    def __init__(self, sizes: Sizes) -> None:
        nn.Module.__init__(self)
        width, heads = sizes.width, sizes.width // sizes.head_width
        self.pos_embedder = RoPEEmbedding(width, ROTARY_THETA, list(sizes.rotary_axes))
        self.time_embedder = TimestepEmbeddings(TIME_WIDTH, width)
        self.guidance_embedder = TimestepEmbeddings(TIME_WIDTH, width) if sizes.guidance else None
        self.pooled_text_embedder = nn.Sequential(
            nn.Linear(sizes.pooled_width, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.context_embedder = nn.Linear(sizes.text_width, width)
        self.x_embedder = nn.Linear(sizes.latent_width, width)
        self.blocks = nn.ModuleList(FluxJointTransformerBlock(width, heads) for _ in range(sizes.double_blocks))
        for block in self.blocks:
            block.attn = JointAttention(width, width, heads, sizes.head_width)
        self.single_blocks = nn.ModuleList(SingleBlock(width, heads) for _ in range(sizes.single_blocks))
        self.final_norm_out = AdaLayerNormContinuous(width)
        self.final_proj_out = nn.Linear(width, sizes.output_width)
        self.input_dim = sizes.latent_width
        _fuse_norms(self)


class Conditioned:
    """A transformer whose conditioning is given, for DiffSynth's step function, which adds it up by itself otherwise.

    It adds timestep, pooled prompt and guidance in that order; Black Forest Labs' own code and diffusers add timestep,
    guidance and pooled prompt. In bfloat16 the sums differ by 0.3 %, and every block feels it.
    """

    guidance_embedder = None

    def __init__(self, dit: SizedDiT, embedding: torch.Tensor) -> None:
        """`embedding` is of shape (batch, width)."""
        self._dit = dit
        self._embedding = embedding

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dit, name)

    def time_embedder(self, *_: object) -> torch.Tensor:
        """The whole sum."""
        return self._embedding

    def pooled_text_embedder(self, *_: object) -> torch.Tensor:
        """Nothing more."""
        return torch.zeros_like(self._embedding)


def embedding_of(
    dit: SizedDiT, time: torch.Tensor, pooled: torch.Tensor, guidance: torch.Tensor | None
) -> torch.Tensor:
    """What blocks modulate by, (batch, width), added up in Black Forest Labs' order.

    `time` and `guidance` are of shape (batch,), in thousandths, `pooled` of shape (batch, pooled width).
    """
    made: torch.Tensor = dit.time_embedder(time, pooled.dtype)
    if guidance is not None and dit.guidance_embedder is not None:
        made = made + dit.guidance_embedder(guidance, pooled.dtype)
    added: torch.Tensor = made + dit.pooled_text_embedder(pooled)
    return added


def _fuse_norms(dit: nn.Module) -> None:
    """Let torch compute the norms of queries and keys, in one kernel each where DiffSynth's takes seven.

    By its reads and writes, that is the tenth which DiffSynth's step takes longer than diffusers' with everything there
    (one H100, 1024x1024: 0.201 and 0.183 s). The result is rounded to bfloat16 once, not twice.
    """
    for name, module in list(dit.named_modules()):
        if isinstance(module, RMSNorm):
            fused = nn.RMSNorm(module.weight.shape, eps=module.eps)
            fused.weight = module.weight
            dit.set_submodule(name, fused)


def open_transformer(place: Path, config: Mapping[str, Any], dtype: torch.dtype) -> tuple[SizedDiT, FileStore]:
    """The transformer without weights, and what reads them: `place` is a component's folder or a single file, and
    `config` its configuration, which a file by itself does not tell.

    Raises:
        DamagedCheckpoint: a file cannot be read or lacks a weight.
        ValueError, KeyError: they are not a FLUX transformer's.
    """
    weights = joined_weights(weight_shapes(place))
    with torch.device("meta"):
        dit = SizedDiT(Sizes.of(weights, config.get("axes_dims_rope", ROTARY_AXES)))
    dit.eval().requires_grad_(requires_grad=False)
    return dit, leave_on_disk(dit, place, dtype, joined={name: joined.rows for name, joined in weights.items()})


def load_transformer(place: Path, config: Mapping[str, Any], dtype: torch.dtype) -> tuple[SizedDiT, None]:
    """The transformer with its weights in RAM.

    Raises:
        As `open_transformer`.
    """
    dit, store = open_transformer(place, config, dtype)
    try:
        store.fill(dit)
    finally:
        store.close()
    return dit, None


def bare_transformer(opened: OpenPack, component: Component) -> tuple[SizedDiT, Mapping[str, Sequence[Rows]]]:
    """The transformer without weights, and what its tensors are made of in a pack, which has diffusers' names.

    Raises:
        ValueError, KeyError: the pack is not of a FLUX transformer.
    """
    shapes = {packed.name: packed.shape for packed in opened.pack.tensors if not packed.name.endswith("_scale")}
    weights = joined_weights(shapes)
    axes = component.config.get("axes_dims_rope", ROTARY_AXES)
    with torch.device("meta"):
        dit = SizedDiT(Sizes.of(weights, axes))
    return dit, {name: joined.rows for name, joined in weights.items()}


def joined_weights(shapes: Shapes) -> dict[str, Joined]:
    """For every tensor of DiffSynth's transformer, what it is made of; found by running DiffSynth's own converter on
    row numbers in place of weights.

    Raises:
        ValueError: these are not the names of diffusers or Black Forest Labs, some are missing, or weights have scales.
    """
    scales = [name for name in shapes if "scale" in name.rpartition(".")[2] and not name.endswith("_norm.scale")]
    if scales:
        # DiffSynth's converters would leave them out, and the picture would be noise.
        raise ValueError(f"its weights are divided by scales, such as {scales[0]!r}, which is not supported")
    numbers, starts = _numbered(shapes)
    if any(name.startswith("transformer_blocks.") for name in shapes):
        converted = FluxDiTStateDictConverterFromDiffusers(dict(numbers))
        for end in ("weight", "bias"):
            # Scale and shift change places. DiffSynth's converter sees to it in FLUX.1's width only.
            halves = numbers[f"norm_out.linear.{end}"]
            converted[f"final_norm_out.linear.{end}"] = halves.roll(len(halves) // 2)
    elif any("double_blocks." in name for name in shapes):
        converted = FluxDiTStateDictConverter(dict(numbers))
    else:
        raise ValueError("it has neither diffusers' names of FLUX's weights nor those of Black Forest Labs")
    return {name: _joined(name, rows, shapes, starts) for name, rows in converted.items()}


def _numbered(shapes: Shapes) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Every row of every tensor numbered, from 1, with a gap between tensors; and the first number of each tensor."""
    numbers, starts, at = {}, [], 1
    for name, shape in shapes.items():
        rows = shape[0] if shape else 0
        numbers[name] = torch.arange(at, at + rows)
        starts.append(at)
        at += rows + 1
    return numbers, starts


def _joined(name: str, numbers: torch.Tensor, shapes: Shapes, starts: Sequence[int]) -> Joined:
    if not numbers.all():
        # Where weights are missing, DiffSynth's converter puts zeros.
        raise ValueError(f"weights are missing that belong to {name!r}")
    names = list(shapes)
    breaks = ((numbers.diff() != 1).nonzero().flatten() + 1).tolist()
    rows = []
    for begin, end in pairwise([0, *breaks, len(numbers)]):
        first = int(numbers[begin])
        source = bisect_right(starts, first) - 1
        start = first - starts[source]
        rows.append(Rows(names[source], start, start + end - begin))
    return Joined((len(numbers), *shapes[rows[0].name][1:]), tuple(rows))


def _count(weights: Mapping[str, Joined], blocks: str) -> int:
    return len({name.split(".")[1] for name in weights if name.startswith(f"{blocks}.")})
