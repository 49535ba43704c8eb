"""Taking stock of a model folder: from configurations and file headers to a `Model`, in well under a second."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from autoflux.errors import DamagedCheckpoint, ModelNotFound, UnsafeCheckpoint, UnsupportedModel
from autoflux.models.values import (
    Architecture,
    Block,
    BlockList,
    Component,
    Defaults,
    Model,
    ParameterCount,
    Precision,
    Settings,
)
from autoflux.models.weights import PICKLE_SUFFIXES, Tensor, header_digest, read_tensors, weight_files

COMPONENTS = ("text_encoder", "text_encoder_2", "transformer", "vae")
"""The networks of a FLUX pipeline in the order they run."""

PIPELINES = ("FluxPipeline",)
SCHEDULER = "FlowMatchEulerDiscreteScheduler"

_LIBRARIES = ("diffusers", "transformers")
_BLOCK = re.compile(
    r"(?P<path>transformer_blocks|single_transformer_blocks|encoder\.block|(?:text_model\.)?encoder\.layers)"
    r"\.(?P<index>\d+)\."
)
_FORMATS = {
    "F32": (Precision.FLOAT32, 4),
    "BF16": (Precision.BFLOAT16, 2),
    "F16": (Precision.FLOAT16, 2),
    "F8_E4M3": (Precision.FLOAT8, 1),
    "I8": (Precision.INT8, 1),
}
_EMBEDDINGS = ("embed_tokens", "shared.", "embeddings.", "relative_attention_bias")

_SMALL_PARTS = {
    "tokenizer": ("tokenizer.json", "vocab.json"),
    "tokenizer_2": ("tokenizer.json", "spiece.model"),
    "scheduler": ("scheduler_config.json",),
}

Config = Mapping[str, Any]


def take_stock(folder: Path, name: str | None = None) -> Model:
    """Read a diffusers folder.

    Raises:
        ModelNotFound: the folder or a part of it is missing.
        UnsupportedModel: it holds something other than a FLUX pipeline.
        UnsafeCheckpoint: its weights are pickle files.
        DamagedCheckpoint: a configuration or weight file cannot be right.
    """
    index = _read_index(folder)
    configs = {part: _read_json(folder / part / "config.json") for part in COMPONENTS}
    _check_small_parts(folder)
    files = {part: weight_files(folder / part) for part in COMPONENTS}
    components = tuple(_component(part, index[part][1], files[part]) for part in COMPONENTS)
    settings = _read_settings(folder, guidance=bool(configs["transformer"].get("guidance_embeds")))
    digest = hashlib.sha256(msgspec.json.encode([index, configs], order="deterministic"))
    for file in (file for part in COMPONENTS for file in files[part]):
        digest.update(header_digest(file).encode())
    return Model(
        name=name or folder.resolve().name,
        path=str(folder.resolve()),
        revision=digest.hexdigest()[:16],
        architecture=_architecture(configs, components, folder),
        components=components,
        defaults=settings.defaults,
        limits=settings.limits,
    )


def _read_index(folder: Path) -> Config:
    if not folder.exists():
        raise ModelNotFound(f"no model at {str(folder)!r}", hint="check the path, or use a name: `autoflux plugins`")
    if folder.is_file():
        if folder.suffix in PICKLE_SUFFIXES:
            raise UnsafeCheckpoint(
                f"{str(folder)!r} is a pickle file, which can run code when it is loaded, and is not accepted",
                hint="use the safetensors version of the model",
            )
        raise UnsupportedModel(f"{str(folder)!r} is a file", hint="give the folder that holds model_index.json")
    if not (folder / "model_index.json").is_file():
        raise ModelNotFound(
            f"{str(folder)!r} holds no model_index.json", hint="give the folder of a model in the diffusers layout"
        )
    index = _read_json(folder / "model_index.json")
    if index.get("_class_name") not in PIPELINES:
        raise UnsupportedModel(
            f"{str(folder)!r} holds a {index.get('_class_name')!r}; known are {', '.join(PIPELINES)}",
            hint="autoflux runs models of the FLUX family in the diffusers layout",
        )
    for part in COMPONENTS:
        entry = index.get(part)
        if not (isinstance(entry, list) and len(entry) == 2 and entry[0] in _LIBRARIES):
            raise UnsupportedModel(f"{str(folder)!r}: the component {part!r} is {entry!r}, not one of FLUX's own")
    return index


def _check_small_parts(folder: Path) -> None:
    # transformers makes an empty tokenizer out of a folder without its files, and pictures of nothing follow.
    for part, alternatives in _SMALL_PARTS.items():
        if not any((folder / part / name).is_file() for name in alternatives):
            raise ModelNotFound(
                f"{str(folder / part)!r} holds no {' or '.join(alternatives)}", hint="download the model again"
            )
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json").get("_class_name")
    if scheduler != SCHEDULER:
        raise UnsupportedModel(
            f"the scheduler of {str(folder)!r} is {scheduler!r}, needed is {SCHEDULER!r}",
            hint="download the model again",
        )


def _read_settings(folder: Path, *, guidance: bool) -> Settings:
    file = folder / "autoflux.json"
    if file.is_file():
        return Settings.from_json(file.read_bytes(), origin=repr(str(file)))
    # FLUX.1 schnell takes no guidance, is distilled to 4 steps and was trained on 256 text tokens (its model card).
    return Settings() if guidance else Settings(defaults=Defaults(steps=4, guidance=0.0, text_tokens=256))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = msgspec.json.decode(file.read_bytes())
    except FileNotFoundError as error:
        raise ModelNotFound(f"{str(file)!r} is missing", hint="download the model again") from error
    except (msgspec.MsgspecError, OSError, UnicodeDecodeError) as error:
        raise DamagedCheckpoint(f"{str(file)!r} cannot be read: {error}", hint="download the file again") from error
    if not isinstance(content, dict):
        raise DamagedCheckpoint(f"{str(file)!r} is not a JSON object", hint="download the file again")
    return content


def _component(name: str, class_name: str, files: Iterable[Path]) -> Component:
    tensors = [tensor for file in files for tensor in read_tensors(file)]
    if not tensors:
        raise DamagedCheckpoint(f"the weights of {name!r} are empty", hint="download the model again")
    blocks: dict[str, dict[int, list[Tensor]]] = {}
    rest: list[Tensor] = []
    for tensor in tensors:
        match = _BLOCK.match(tensor.name)
        group = blocks.setdefault(match["path"], {}).setdefault(int(match["index"]), []) if match else rest
        group.append(tensor)
    # Double blocks run before single ones, which is also the order of their names' lengths.
    ordered = sorted(blocks, key=lambda path: (path.startswith("single"), path))
    return Component(
        name=name,
        class_name=class_name,
        disk_precision=_main_precision(name, tensors),
        block_lists=tuple(
            BlockList(path=path, blocks=tuple(_block(blocks[path][i]) for i in sorted(blocks[path])))
            for path in ordered
        ),
        rest=_block(rest),
    )


def _main_precision(name: str, tensors: Iterable[Tensor]) -> Precision:
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[tensor.precision] += tensor.count
    most = counts.most_common(1)[0][0]
    if most not in _FORMATS:
        raise UnsupportedModel(f"the weights of {name!r} are {most}; known are {', '.join(_FORMATS)}")
    return _FORMATS[most][0]


def _block(tensors: Iterable[Tensor]) -> Block:
    counts: Counter[str] = Counter()
    size = 0
    for tensor in tensors:
        counts[_kind(tensor)] += tensor.count
        size += tensor.count * _FORMATS.get(tensor.precision, (None, 4))[1]
    return Block(parameters=ParameterCount(**counts), disk_bytes=size)


def _kind(tensor: Tensor) -> str:
    if any(part in tensor.name for part in _EMBEDDINGS):
        return "embedding"
    if len(tensor.shape) < 2:
        return "bias" if tensor.name.endswith("bias") else "norm"
    return "modulation" if "norm" in tensor.name and tensor.name.endswith("linear.weight") else "matmul"


def _architecture(configs: Mapping[str, Config], components: tuple[Component, ...], folder: Path) -> Architecture:
    transformer, vae, text = configs["transformer"], configs["vae"], configs["text_encoder_2"]
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
            text_parameters=components[1].parameter_count,
            vae_channels=channels,
            vae_layers=int(vae["layers_per_block"]),
            latent_channels=int(vae["latent_channels"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedCheckpoint(
            f"the configuration in {str(folder)!r} lacks or misstates {error}", hint="download the model again"
        ) from error
