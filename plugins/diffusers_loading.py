"""Loading a diffusers folder component by component: only safetensors, only from this disk, no code from the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from autoflux import (
    DEFAULT_ATTENTION,
    TILE_PIXELS,
    AheadStore,
    Component,
    ComponentPlan,
    DamagedCheckpoint,
    DamagedPack,
    Family,
    Layout,
    LoadProgress,
    Model,
    OpenPack,
    OwnOffload,
    Placement,
    Plan,
    Precision,
    Residences,
    Rows,
    Store,
    UnsupportedModel,
    Waiting,
    drop_weights_ahead,
    fill_page_cache,
    is_own_process,
    leave_on_disk,
    load_packed,
    open_pack,
)

# Both are read when the libraries are imported.
os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from .diffusers_imports import LOOKING, OTHERS, RARE, UNUSED, UNUSED_BY_ENCODERS, hidden, import_later, lean_imports

with lean_imports(), hidden(*UNUSED, before=LOOKING):
    with hidden(*UNUSED_BY_ENCODERS, before=LOOKING):
        import transformers
        from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast
    import_later(*RARE, *(OTHERS if is_own_process() else ()))
    import diffusers
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from diffusers.models.attention_dispatch import attention_backend
    from huggingface_hub.errors import StrictDataclassError

from . import diffusers_files
from .diffusers_attention import RotatedAttention
from .diffusers_offload import GroupOffload
from .diffusers_rehearsal import encode_once

DTYPES = {
    Precision.FLOAT32: torch.float32,
    Precision.BFLOAT16: torch.bfloat16,
    Precision.FLOAT16: torch.float16,
}

_NETWORKS: dict[str, Any] = {
    "text_encoder": CLIPTextModel,
    "text_encoder_2": T5EncoderModel,
    "transformer": FluxTransformer2DModel,
    "vae": AutoencoderKL,
}
_TIED = frozenset({"encoder.embed_tokens.weight"})
"""Names of T5's input table, stored once under another name."""
_DAMAGE = (OSError, ValueError, RuntimeError, KeyError, TypeError, StrictDataclassError)


MakeNetwork = Callable[[Path, dict[str, Any], torch.dtype], tuple[torch.nn.Module, Store | None]]
"""From a component's folder or file, configuration and number format to its network, and what reads weights later."""


@dataclass(frozen=True)
class Library:
    """What differs between libraries that compute the transformer. Encoders and decoder are the same for all."""

    name: str
    block_lists: tuple[str, ...]
    """The transformer's, in the order they run."""
    load: MakeNetwork
    """Makes the transformer with its weights in RAM."""
    open: MakeNetwork
    """Makes it without, and what reads them when they are needed."""
    bare: Callable[[OpenPack, Component], tuple[torch.nn.Module, Mapping[str, Sequence[Rows]] | None]]
    """Makes it without weights, for a pack; and what its tensors are put together of, if of several in the pack."""
    own_offload: Callable[[Plan], OwnOffload]
    run_once: Callable[[Any], object]
    """Calls the transformer with small inputs, to see in which order its layers run."""
    attending: Callable[[str], AbstractContextManager[None]]
    """Has the transformer's attention computed in the way of that name, for the time of the context."""
    prepare: Callable[[Any], None] = lambda _transformer: None
    """Changes the transformer, with or without weights, before anything is known of it."""
    refuses: Callable[[Component], str] = lambda _component: ""
    """Why it cannot read the transformer from where it is; "" if it can."""


class Components:
    """The loaded parts: the transformer, diffusers' own pipeline object with the others, and where weights live."""

    def __init__(self, pipe: FluxPipeline, transformer: torch.nn.Module, residences: Residences) -> None:
        self.pipe = pipe
        self.transformer = transformer
        self.residences = residences


def load_components(
    plan: Plan,
    model: Model,
    progress: LoadProgress,
    library: Library | None = None,
    later: Collection[str] = (),
) -> Components:
    """Load every component in its precision and put it where the plan says, in the order they run.

    `library` makes the transformer; diffusers if not given. Text encoders named in `later` are made without weights,
    which are read when they are first used.

    Raises:
        DamagedCheckpoint: weights or configuration do not fit each other.
        UnsupportedModel: a model that cannot draw from a prompt.
    """
    _quiet()
    if model.family == Family.FILL:
        raise UnsupportedModel(
            f"{model.name!r} fills in parts of a given picture, and cannot draw one from a prompt",
            hint="use another FLUX.1, such as flux.1-dev",
        )
    library = library or DIFFUSERS
    read: list[Path] = []
    parts_path = Path(model.parts_path)
    try:
        loaded = assemble(_networks(plan, model, progress, library, later, read=read), plan, parts_path, library)
    except DamagedPack:
        loaded = None  # what was loaded is let go before it is loaded again
    if loaded is None:
        drop_weights_ahead()
        read.clear()
        loaded = assemble(_networks(plan, model, progress, library, later, packed=False), plan, parts_path, library)
    if model.layout != Layout.FOLDER:
        # That of the base may be for another family.
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(model.scheduler)
        loaded.pipe.register_modules(scheduler=scheduler)
    fill_page_cache(read)  # for the next start
    return loaded


class Loaded(NamedTuple):
    """A component: its network, and where its weights are if not in it."""

    name: str
    network: torch.nn.Module
    store: Store | None = None
    later: bool = False
    """Whether the store is to be read when the network is first used."""


def assemble(networks: Iterable[Loaded], plan: Plan, folder: Path, library: Library | None = None) -> Components:
    """Put each network where the plan says as soon as it comes, and join them to a pipeline.

    `folder` holds tokenizers and scheduler; `library` made the transformer, diffusers if not given.

    Raises:
        ContradictoryWishes: the plan combines what does not go together.
        DamagedCheckpoint: they do not fit each other.
    """
    library = library or DIFFUSERS
    residences = Residences(
        plan, block_lists=library.block_lists, own_offload=library.own_offload(plan), run_once=library.run_once
    )
    held: dict[str, Any] = {}
    coming = deferred = False
    for name, network, store, later in networks:
        held[name] = network
        deferred = deferred or later
        if name == "transformer":
            library.prepare(network)
            coming = isinstance(store, AheadStore)
        used = _decoder(network) if name == "vae" else None
        residences.hold(name, network, used=used, store=store, later=later)
    transformer = held.pop("transformer")
    with _damage_named(folder):
        pipe = FluxPipeline(**held, transformer=None, **_load_small_parts(folder))
    diffusers_files.bound_tokens(pipe)
    pipe.set_progress_bar_config(disable=True)
    if plan.tile_decode:
        _decode_in_tiles(pipe.vae)
    if coming and not deferred:
        encode_once(pipe, plan)
    residences.settle()
    return Components(pipe, transformer, residences)


def _networks(
    plan: Plan,
    model: Model,
    progress: LoadProgress,
    library: Library,
    later: Collection[str] = (),
    *,
    packed: bool = True,
    read: list[Path] | None = None,
) -> Iterator[Loaded]:
    """Every component; the packs that are read once go into `read`."""
    folder, done = Path(model.path), 0
    for component in model.in_loading_order:
        if waits := _not_yet(component, plan, later, packed=packed):
            with _damage_named(_place(component, folder)):
                yield waits
            continue
        progress(f"loading {component.name.replace('_', ' ')}", done / model.disk_bytes)
        planned = plan.component(component.name)
        on_disk = planned.placement == Placement.STREAMED and planned.waiting == Waiting.DISK
        # What is to be narrow is read block by block, when it is narrowed.
        narrowed = planned.is_narrow and planned.placement != Placement.NATIVE
        opened = open_pack(component, planned) if packed else None
        with _damage_named(_place(component, folder)):
            if opened:
                if read is not None and not on_disk:
                    read.append(opened.weights)
                network, store = _from_pack(opened, component, planned, torch.device(plan.device), library)
            else:
                make = _maker(component, folder, library, unread=on_disk or narrowed)
                network, store = make(DTYPES[planned.arithmetic])
        yield Loaded(component.name, network, store)
        done += component.disk_bytes


def _not_yet(component: Component, plan: Plan, later: Collection[str], *, packed: bool) -> Loaded | None:
    """The component without its weights, and what reads them; None if it has to be loaded now."""
    planned = plan.component(component.name)
    if component.name not in later or planned.placement == Placement.NATIVE:
        return None
    if opened := open_pack(component, planned) if packed else None:
        network, joined = _bare_network(opened, component)
        network, store = load_packed(network, opened, planned, torch.device(plan.device), joined, later=True)
    elif planned.arithmetic == Precision.FLOAT16:
        return None  # what reads single weights gives all of them one format, and T5 needs some in float32
    else:
        make = _maker(component, Path(plan.model_path), DIFFUSERS, unread=True)
        network, store = make(DTYPES[planned.arithmetic])
    return Loaded(component.name, network, store, later=True)


def _maker(
    component: Component, folder: Path, library: Library, *, unread: bool
) -> Callable[[torch.dtype], tuple[torch.nn.Module, Store | None]]:
    """What makes the component's network, given a number format; `unread` is without weights and with a store."""
    place = _place(component, folder)
    if component.name == "transformer" and library is not DIFFUSERS:
        _check_readable(component, library)
        return partial(library.open if unread else library.load, place, component.config)
    # The libraries would leave scales out.
    if component.files and (component.scaled or not component.folder):
        make = diffusers_files.open_network if unread else diffusers_files.load_network
        return partial(make, _NETWORKS[component.name], component)
    return partial(_open_network if unread else _load_network, place, component.config)


def _from_pack(
    opened: OpenPack, component: Component, planned: ComponentPlan, device: torch.device, library: Library
) -> tuple[torch.nn.Module, Store | None]:
    network, joined = (library if component.name == "transformer" else DIFFUSERS).bare(opened, component)
    return load_packed(network, opened, planned, device, joined)


def _bare_network(_opened: OpenPack, component: Component) -> tuple[torch.nn.Module, None]:
    return diffusers_files.bare_network(_NETWORKS[component.name], component.config), None


def _place(component: Component, folder: Path) -> Path:
    """The folder that has the component, or the file that does."""
    if component.files and not component.folder:
        return Path(component.files[0])
    return Path(component.folder or folder / component.name)


def _check_readable(component: Component, library: Library) -> None:
    """Whether another library's loader can read the transformer from where it is."""
    if reason := library.refuses(component):
        raise UnsupportedModel(f"the backend {library.name!r}: {reason}", hint="use --backend diffusers")


def _decoder(vae: Any) -> torch.nn.Module:
    """What a decode runs, in order."""
    parts = (vae.post_quant_conv, vae.decoder)
    return torch.nn.ModuleList(part for part in parts if part is not None)


def _decode_in_tiles(vae: Any) -> None:
    vae.enable_tiling()
    vae.tile_sample_min_size = TILE_PIXELS
    vae.tile_latent_min_size = TILE_PIXELS // 2 ** (len(vae.config.block_out_channels) - 1)


def _open_network(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> tuple[torch.nn.Module, Store | None]:
    """The network without weights, and what reads them when they are needed."""
    network = diffusers_files.bare_network(_NETWORKS[folder.name], config)
    store = leave_on_disk(network, folder, dtype)
    return network.eval().requires_grad_(requires_grad=False), store


def _load_network(folder: Path, _config: object, dtype: torch.dtype) -> tuple[torch.nn.Module, Store | None]:
    network, report = _NETWORKS[folder.name].from_pretrained(
        folder,
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    missing = set(report["missing_keys"]) - _TIED
    if missing:
        raise ValueError(f"weights are missing, such as {min(missing)!r}")
    return network.eval().requires_grad_(requires_grad=False), None


def _run_once(transformer: Any) -> object:
    config, dtype = transformer.config, transformer.dtype
    tokens, steps = 4, torch.zeros(1, dtype=dtype)
    return transformer(
        hidden_states=torch.zeros(1, tokens, config.in_channels, dtype=dtype),
        encoder_hidden_states=torch.zeros(1, tokens, config.joint_attention_dim, dtype=dtype),
        pooled_projections=torch.zeros(1, config.pooled_projection_dim, dtype=dtype),
        timestep=steps,
        guidance=steps if config.guidance_embeds else None,
        img_ids=torch.zeros(tokens, 3),
        txt_ids=torch.zeros(tokens, 3),
    )


def _attending(name: str) -> AbstractContextManager[None]:
    # Not torch's own switch: the user may have told diffusers to take another library's attention.
    if name == DEFAULT_ATTENTION:
        return nullcontext()
    context: AbstractContextManager[None] = attention_backend(f"_native_{name}")
    return context


DIFFUSERS = Library(
    name="diffusers",
    block_lists=("transformer_blocks", "single_transformer_blocks"),
    load=_load_network,
    open=_open_network,
    bare=_bare_network,
    own_offload=GroupOffload,
    run_once=_run_once,
    attending=_attending,
    prepare=RotatedAttention.placed_in,
)


def _load_small_parts(folder: Path) -> dict[str, Any]:
    kinds = {"tokenizer": CLIPTokenizer, "tokenizer_2": T5TokenizerFast, "scheduler": FlowMatchEulerDiscreteScheduler}
    loaded = {}
    for name, kind in kinds.items():
        with _damage_named(folder / name, (Exception,)):  # tokenizers raises no other
            loaded[name] = kind.from_pretrained(folder / name, local_files_only=True)
    return loaded


@contextmanager
def _damage_named(part: Path, kinds: tuple[type[Exception], ...] = _DAMAGE) -> Iterator[None]:
    try:
        yield
    except kinds as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise DamagedCheckpoint(f"{str(part)!r} cannot be loaded: {error}", hint="download the model again") from error


def _quiet() -> None:
    """Keep the libraries' progress bars and advice out of our output; our errors say what matters."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
