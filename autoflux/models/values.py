"""What is to run, as frozen values read from configurations and file headers; no weights are loaded."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from functools import cached_property
from typing import Any

import msgspec

from autoflux.values import Value


class Precision(StrEnum):
    """Number formats, by torch's names."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT8 = "float8_e4m3fn"
    FLOAT8_E5M2 = "float8_e5m2"
    INT8 = "int8"

    @property
    def item_bytes(self) -> int:
        """Bytes a number takes."""
        return _ITEM_BYTES[self]

    @property
    def short_name(self) -> str:
        """As users say, and write it in options."""
        return _SHORT_NAMES.get(self, self.value)


_ITEM_BYTES = {
    Precision.FLOAT32: 4,
    Precision.BFLOAT16: 2,
    Precision.FLOAT16: 2,
    Precision.FLOAT8: 1,
    Precision.FLOAT8_E5M2: 1,
    Precision.INT8: 1,
}
_SHORT_NAMES = {
    Precision.FLOAT32: "fp32",
    Precision.BFLOAT16: "bf16",
    Precision.FLOAT16: "fp16",
    Precision.FLOAT8: "fp8",
}


class Layout(StrEnum):
    """How a model lies on the disk."""

    FOLDER = "diffusers folder"
    TRANSFORMER_FILE = "transformer file"
    """The transformer alone, in one safetensors file; the rest comes from another model, its base."""
    ALL_IN_ONE = "all-in-one file"
    """Transformer, text encoders and autoencoder in one safetensors file, as ComfyUI writes it."""
    GGUF = "GGUF file"
    """The transformer alone, in llama.cpp's format."""
    ABSENT = "not on this machine"
    """Known from the catalogue only."""


class Naming(StrEnum):
    """Whose names the weights of a component have."""

    DIFFUSERS = "diffusers"
    """diffusers' for transformer and autoencoder, transformers' for text encoders."""
    BFL = "Black Forest Labs"
    LDM = "latent diffusion"
    """The original names of the autoencoder."""


class Family(StrEnum):
    """Which FLUX.1 a transformer is."""

    DEV = "FLUX.1 dev"
    SCHNELL = "FLUX.1 schnell"
    KREA = "FLUX.1 Krea dev"
    KONTEXT = "FLUX.1 Kontext dev"
    FILL = "FLUX.1 Fill dev"
    DEV_LIKE = "FLUX.1 dev family"
    """dev, Krea, Kontext or a fine-tune of one: they have the same shapes, and nothing in the files says which."""


class ParameterCount(Value, frozen=True, kw_only=True):
    """Numbers of parameters by what they do.

    `matmul` are the weight matrices used once a token, `modulation` the AdaLN weight matrices used once a picture
    (they depend on timestep, guidance and pooled prompt only), `embedding` tables that are looked up, `norm` scales.
    Convolution kernels count as `matmul`.
    """

    matmul: int = 0
    modulation: int = 0
    embedding: int = 0
    norm: int = 0
    bias: int = 0

    @property
    def total(self) -> int:
        return self.matmul + self.modulation + self.embedding + self.norm + self.bias


class Block(Value, frozen=True, kw_only=True):
    """One block of a block list, the usual unit of streaming."""

    parameters: ParameterCount
    disk_bytes: int


class BlockList(Value, frozen=True, kw_only=True):
    """Blocks that run one after the other; `path` is the attribute below the component (`transformer_blocks`)."""

    path: str
    blocks: tuple[Block, ...]


class Component(Value, frozen=True, kw_only=True, dict=True):
    """One network of the pipeline. `rest` is what lies outside its block lists."""

    name: str
    class_name: str
    disk_precision: Precision
    """The format of most of its numbers; of GGUF's, the one that comes next in bytes a number."""
    block_lists: tuple[BlockList, ...] = ()
    rest: Block
    formats: dict[str, int] = msgspec.field(default_factory=dict)
    """Parameters by their format on disk, in the words of safetensors (`BF16`) or GGUF (`Q4_K`)."""
    scaled: bool = False
    """Whether narrow weights are stored with scales."""
    files: tuple[str, ...] = ()
    """Where its weights are; none if the model is not on this machine."""
    folder: str = ""
    """The folder of `files`, if diffusers or transformers can load it as it is."""
    naming: Naming = Naming.DIFFUSERS
    prefix: str = ""
    """What stands before the names of its weights in the files."""
    config: dict[str, Any] = msgspec.field(default_factory=dict)
    """Its configuration as diffusers or transformers read it."""

    @cached_property
    def parameter_count(self) -> int:
        return self.rest.parameters.total + sum(b.parameters.total for b in self.blocks)

    @property
    def disk_bytes(self) -> int:
        return self.rest.disk_bytes + sum(b.disk_bytes for b in self.blocks)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks in the order they run."""
        return tuple(block for blocks in self.block_lists for block in blocks.blocks)

    @cached_property
    def alike(self) -> dict[ParameterCount, int]:
        """How many blocks there are of each sort; the many blocks of FLUX are of two."""
        return dict(Counter(block.parameters for block in self.blocks))

    def bytes_as(self, precision: Precision) -> int:
        """Size of the weights held in `precision`."""
        return self.parameter_count * precision.item_bytes


class Architecture(Value, frozen=True, kw_only=True):
    """The sizes that decide arithmetic and activations of a FLUX pipeline."""

    hidden_size: int
    head_count: int
    double_blocks: int
    single_blocks: int
    patch_pixels: int
    """Pixels along one side of what becomes one image token: 16 for FLUX (8 in the VAE, 2 in packing)."""
    guidance: bool
    text_hidden_size: int
    text_layers: int
    text_parameters: int
    vae_channels: tuple[int, ...]
    """Channels of the VAE's levels, full resolution first."""
    vae_layers: int
    latent_channels: int


class Defaults(Value, frozen=True, kw_only=True):
    """What a picture request gets when it does not say."""

    steps: int = 28
    guidance: float = 3.5
    width: int = 1024
    height: int = 1024
    text_tokens: int = 512
    """Length the T5 prompt is padded to; a longer prompt is cut there."""


class Limits(Value, frozen=True, kw_only=True):
    """What a picture request may ask of this model."""

    size_multiple: int = 16
    min_side: int = 64
    max_side: int = 4096
    max_pixels: int = 4 * 1024 * 1024
    max_steps: int = 200
    max_guidance: float = 100.0
    max_prompt_characters: int = 5000


class Settings(Value, frozen=True, kw_only=True):
    """The optional `autoflux.json` in a model's folder: what suits this model."""

    defaults: Defaults = Defaults()
    limits: Limits = Limits()


class Model(Value, frozen=True, kw_only=True):
    """A model on this machine: where it lies, what it is made of, what it takes.

    `path` is a folder or a file, "" if the weights are not on this machine. `revision` changes when a weight file or
    configuration changes.
    """

    name: str
    path: str
    revision: str
    layout: Layout = Layout.FOLDER
    family: Family = Family.DEV_LIKE
    base_path: str = ""
    """The folder that has tokenizers, and the components that `path` lacks; "" if it is `path`."""
    scheduler: dict[str, Any] = msgspec.field(default_factory=dict)
    """The scheduler's configuration as diffusers reads it."""
    architecture: Architecture
    components: tuple[Component, ...]
    defaults: Defaults = Defaults()
    limits: Limits = Limits()

    @property
    def parts_path(self) -> str:
        """The folder that has the tokenizers."""
        return self.base_path or self.path

    def component(self, name: str) -> Component:
        """The component of that name; KeyError if the pipeline has none."""
        return {c.name: c for c in self.components}[name]

    @property
    def in_loading_order(self) -> tuple[Component, ...]:
        """Text encoders first, which a picture needs first; the transformer last: while it comes, all else is made."""
        return tuple(sorted(self.components, key=lambda component: component.name == "transformer"))

    @property
    def disk_bytes(self) -> int:
        return sum(c.disk_bytes for c in self.components)


class ModelEntry(Value, frozen=True, kw_only=True):
    """A name users can give instead of a path, registered by a plugin through `register_models`."""

    name: str
    path: str
    description: str
