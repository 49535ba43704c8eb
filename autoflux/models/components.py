"""One network from where its weights lie: what they are, in which blocks, and whether they are all there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from autoflux.errors import DamagedCheckpoint, UnsupportedModel
from autoflux.models.checkpoints import Part, check_formats
from autoflux.models.configs import CLASSES
from autoflux.models.formats import FORMATS
from autoflux.models.shapes import Shape, each_weight
from autoflux.models.values import Architecture, Block, BlockList, Component, ParameterCount, Precision
from autoflux.units import counted

_BLOCK = re.compile(
    r"(?P<path>transformer_blocks|single_transformer_blocks|encoder\.block|encoder\.layers)\.(?P<index>\d+)\."
)
_EMBEDDINGS = ("embed_tokens", "shared.", "embeddings.", "relative_attention_bias")


def make_component(
    name: str,
    config: dict[str, Any],
    parts: Mapping[str, Part],
    *,
    origin: str,
    files: Iterable[Path] = (),
    folder: Path | None = None,
) -> Component:
    """A component from where its weights lie, after checking that they are those of its configuration.

    Raises:
        DamagedCheckpoint: a weight is missing or has another shape.
        UnsupportedModel: a weight has a format that is not known, or the transformer has others than FLUX.1's.
    """
    kept = _needed(name, config, parts, origin)
    if name == "transformer":
        refuse_foreign(parts.keys() - kept.keys(), origin)
    check_formats(kept, name)
    blocks: dict[str, dict[int, dict[str, Part]]] = {}
    rest: dict[str, Part] = {}
    for weight, part in kept.items():
        match = _BLOCK.match(weight)
        group = blocks.setdefault(match["path"], {}).setdefault(int(match["index"]), {}) if match else rest
        group[weight] = part
    formats: Counter[str] = Counter()
    for part in kept.values():
        formats[part.format] += prod(part.shape)
    return Component(
        name=name,
        class_name=CLASSES[name],
        disk_precision=FORMATS[formats.most_common(1)[0][0]].precision if formats else Precision.BFLOAT16,
        # Double blocks run before single ones, and so they come in the configuration.
        block_lists=tuple(
            BlockList(path=path, blocks=tuple(_block(group[i]) for i in sorted(group)))
            for path, group in blocks.items()
        ),
        rest=_block(rest),
        formats=dict(formats.most_common()),
        scaled=any(part.scale for part in kept.values()),
        files=tuple(str(file.absolute()) for file in files),
        folder=str(folder.absolute()) if folder else "",
        config=config,
    )


def refuse_foreign(names: Collection[str], origin: str) -> None:
    """Refuse a transformer with weights that would be left out.

    Raises:
        UnsupportedModel: there are any.
    """
    if names:
        raise UnsupportedModel(
            f"{origin!r} holds {counted(len(names), 'weight')} that FLUX.1 has not, such as {min(names)!r}",
            hint="it is made for a changed FLUX, or quantized in a way that is not known",
        )


def _needed(name: str, config: Mapping[str, Any], parts: Mapping[str, Part], origin: str) -> dict[str, Part]:
    """Those that the configuration names. Ends at the first that is missing: it may name more than memory holds."""
    needed: dict[str, Part] = {}
    try:
        for weight, shape in each_weight(name, config):
            needed[weight] = _fitting(weight, shape, parts, origin)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise DamagedCheckpoint(
            f"the configuration in {origin!r} lacks or misstates {error}", hint="download the model again"
        ) from error
    return needed


def _fitting(weight: str, shape: Shape, parts: Mapping[str, Part], origin: str) -> Part:
    part = parts.get(weight)
    if part is None:
        what = f"weights are missing, such as {weight!r}"
    elif part.shape != shape:
        what = f"{weight!r} has the shape {part.shape}, needed is {shape}"
    else:
        return part
    raise DamagedCheckpoint(f"{origin!r} cannot be loaded: {what}", hint="download the model again")


def _block(parts: Mapping[str, Part]) -> Block:
    counts: Counter[str] = Counter()
    for name, part in parts.items():
        counts[_kind(name, part.shape)] += prod(part.shape)
    return Block(parameters=ParameterCount(**counts), disk_bytes=sum(part.nbytes for part in parts.values()))


def _kind(name: str, shape: Shape) -> str:
    if any(part in name for part in _EMBEDDINGS):
        return "embedding"
    if len(shape) < 2:
        return "bias" if name.endswith("bias") else "norm"
    return "modulation" if "norm" in name and name.endswith("linear.weight") else "matmul"


def architecture(components: Iterable[Component], origin: str) -> Architecture:
    """The sizes that decide arithmetic and activations, from the components' configurations.

    Raises:
        DamagedCheckpoint: a configuration lacks or misstates one.
    """
    parts = {component.name: component for component in components}
    transformer, vae, text = (parts[name].config for name in ("transformer", "vae", "text_encoder_2"))
    try:
        heads = int(transformer["num_attention_heads"])
        channels = tuple(int(c) for c in vae["block_out_channels"])
        return Architecture(
            hidden_size=heads * int(transformer["attention_head_dim"]),
            head_count=heads,
            double_blocks=int(transformer["num_layers"]),
            single_blocks=int(transformer["num_single_layers"]),
            patch_pixels=2 ** (len(channels) - 1) * 2,
            guidance=bool(transformer["guidance_embeds"]),
            text_hidden_size=int(text["d_model"]),
            text_layers=int(text["num_layers"]),
            text_parameters=parts["text_encoder_2"].parameter_count,
            vae_channels=channels,
            vae_layers=int(vae["layers_per_block"]),
            latent_channels=int(vae["latent_channels"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedCheckpoint(
            f"the configuration in {origin!r} lacks or misstates {error}", hint="download the model again"
        ) from error
