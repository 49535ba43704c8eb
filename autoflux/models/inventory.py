"""Taking stock of a model: from configurations and file headers to a `Model`, in well under a second."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from autoflux.errors import DamagedCheckpoint, UnsupportedModel
from autoflux.files import check_text, is_there
from autoflux.models.checkpoints import Checkpoint, Located, Part, check_formats, find_parts, read_checkpoint
from autoflux.models.components import architecture, make_component, refuse_foreign
from autoflux.models.configs import CLASSES, FLUX_DEV, SCHEDULERS, told_by_shapes
from autoflux.models.families import DEFAULTS, tell_family, words_beside
from autoflux.models.folders import check_file, check_small_parts, read_config, read_index, read_json, read_scheduler
from autoflux.models.layouts import Place, recognise
from autoflux.models.values import Component, Family, Layout, Model, Naming, Settings
from autoflux.models.weights import check_regular, weight_files

COMPONENTS = tuple(CLASSES)
"""The networks of a FLUX pipeline in the order they run."""

FindBase = Callable[[Family], Path]
"""Gives the folder of a model that has the parts a file of that family lacks."""

_SIZES = {
    "text_encoder": "hidden_size",
    "text_encoder_2": "d_model",
    "transformer": "attention_head_dim",
    "vae": "block_out_channels",
}
"""The sizes on which the part of a configuration depends that shapes do not tell: heads, groups, positions."""

Config = Mapping[str, Any]


def take_stock(
    path: Path, name: str | None = None, *, find_base: FindBase | None = None, published_as: str = ""
) -> Model:
    """Read a diffusers folder, or a single file together with the folder of its base.

    `published_as` is the id on a hub that a folder is known to come from, which tells its family.

    Raises:
        ModelNotFound: the model, a part of it, or the base of a single file is missing.
        UnsupportedModel: it holds something other than a FLUX pipeline.
        UnsafeCheckpoint: its weights are pickle files.
        DamagedCheckpoint: a configuration or weight file cannot be right.
        UsageError: a path is not valid text.
    """
    return _folder(path, name, published_as) if is_there(path) and path.is_dir() else _file(path, name, find_base)


def _folder(path: Path, name: str | None, published_as: str) -> Model:
    index = read_index(path, COMPONENTS)
    check_small_parts(path)
    components = tuple(_from_folder(part, path) for part in COMPONENTS)
    scheduler = read_scheduler(path)
    words = [published_as, *words_beside({}, str(path.resolve()))]
    transformer = components[COMPONENTS.index("transformer")]
    words += [str(source[key]) for source in (index, transformer.config) for key in ("_name_or_path",) if key in source]
    family = tell_family(transformer.config, class_name=index["_class_name"], words=words)
    return _model(path, name, Layout.FOLDER, family, components, scheduler)


def _file(path: Path, name: str | None, find_base: FindBase | None) -> Model:
    check_file(path)
    checkpoint = read_checkpoint(path)
    places = recognise(checkpoint.tensors, str(path))
    # The transformer is told first: which base suits depends on it, and sizes that only the base knows come after.
    located = {part: _complete(part, find_parts([checkpoint], *place), path) for part, place in places.items()}
    family = tell_family(
        _told("transformer", located["transformer"].parts, path),
        words=words_beside(checkpoint.metadata, str(path.absolute())),
    )
    base = find_base(family) if find_base else path.parent
    check_small_parts(base)
    components = tuple(
        _from_file(part, checkpoint, places[part], located[part], base) if part in places else _from_folder(part, base)
        for part in COMPONENTS
    )
    layout = Layout.ALL_IN_ONE if len(places) > 1 else Layout.TRANSFORMER_FILE
    layout = Layout.GGUF if checkpoint.is_gguf else layout
    return _model(path, name, layout, family, components, _scheduler(base, family), base)


def _complete(part: str, located: Located, path: Path) -> Located:
    """Refuse what does not tell its own sizes, or holds weights of another transformer."""
    if part == "transformer":
        refuse_foreign(located.others, str(path))
    check_formats(located.parts, part)
    return located


def _scheduler(base: Path, family: Family) -> dict[str, Any]:
    """The base's own, unless the base takes guidance and the transformer not, or the other way round."""
    guidance = family != Family.SCHNELL
    config = base / "transformer" / "config.json"
    if not config.is_file() or bool(read_json(config).get("guidance_embeds")) == guidance:
        return read_scheduler(base)
    return SCHEDULERS[guidance]


def _model(
    path: Path,
    name: str | None,
    layout: Layout,
    family: Family,
    components: tuple[Component, ...],
    scheduler: dict[str, Any],
    base: Path | None = None,
) -> Model:
    settings = _settings(base or path, family)
    for used in (path.resolve(), path.absolute(), *([base.resolve()] if base else []), *_files(components)):
        check_text(used)
    return Model(
        name=name or (path.stem if path.is_file() else path.resolve().name),
        path=str(path.resolve()) if path.is_dir() else str(path.absolute()),
        revision=_revision(components, scheduler),
        layout=layout,
        family=family,
        base_path=str(base.resolve()) if base else "",
        scheduler=scheduler,
        architecture=architecture(components, str(path)),
        components=components,
        defaults=settings.defaults,
        limits=settings.limits,
    )


def _revision(components: Iterable[Component], scheduler: Config) -> str:
    configs = [[part.name, part.naming, part.prefix, part.config] for part in components]
    digest = hashlib.sha256(msgspec.json.encode([configs, scheduler], order="deterministic"))
    for file in _files(components):
        digest.update(read_checkpoint(file).digest.encode())
    return digest.hexdigest()[:16]


def _files(components: Iterable[Component]) -> list[Path]:
    return [Path(file) for file in dict.fromkeys(file for part in components for file in part.files)]


def _settings(folder: Path, family: Family) -> Settings:
    file = folder / "autoflux.json"
    check_regular(file)
    if file.is_file():
        return Settings.from_json(file.read_bytes(), origin=repr(str(file)))
    return Settings(defaults=DEFAULTS[family])


def _from_folder(part: str, folder: Path) -> Component:
    config = read_config(folder, part)
    if method := config.get("quantization_config"):
        name = method.get("quant_method") if isinstance(method, dict) else method
        raise UnsupportedModel(
            f"{str(folder / part)!r} is quantized by {name!r}", hint="use the GGUF, float8 or bfloat16 version"
        )
    files = weight_files(folder / part)
    located = find_parts([read_checkpoint(file) for file in files], Naming.DIFFUSERS, "")
    if not located.parts:
        raise DamagedCheckpoint(f"the weights of {part!r} are empty", hint="download the model again")
    _check_told(part, config, located.parts, folder / part)
    return make_component(part, config, located.parts, origin=str(folder / part), files=files, folder=folder / part)


def _check_told(part: str, config: Config, parts: Mapping[str, Part], folder: Path) -> None:
    """Refuse a configuration of another model than the weights are of: the libraries would leave out what is over."""
    for key, told in _told(part, parts, folder).items():
        said = config.get(key, told)
        if told is not None and (type(said), said) != (type(told), told):
            raise DamagedCheckpoint(
                f"{str(folder)!r} cannot be loaded: {key!r} is {said!r} in its config.json and {told!r} in its weights",
                hint="download the model again",
            )


def _from_file(part: str, checkpoint: Checkpoint, place: Place, located: Located, base: Path) -> Component:
    config = _config(part, located.parts, base, checkpoint.file)
    made = make_component(part, config, located.parts, origin=str(checkpoint.file), files=[checkpoint.file])
    return made.replace(naming=place.naming, prefix=place.prefix)


def _config(part: str, parts: Mapping[str, Part], base: Path, origin: Path) -> dict[str, Any]:
    """What the shapes tell, and for the rest the base's configuration or FLUX.1's own."""
    told = _told(part, parts, origin)
    file = base / part / "config.json"
    for rest in ([read_config(base, part)] if file.is_file() else []) + [FLUX_DEV[part]]:
        if rest.get(_SIZES[part]) == told.get(_SIZES[part], rest.get(_SIZES[part])):
            return {**rest, **told}
    raise UnsupportedModel(
        f"{str(origin)!r}: {part!r} has sizes that are not FLUX.1's ({_SIZES[part]} is {told[_SIZES[part]]})",
        hint="give a folder with a fitting config.json as --base",
    )


def _told(part: str, parts: Mapping[str, Part], origin: Path) -> dict[str, Any]:
    try:
        return told_by_shapes(part, {name: held.shape for name, held in parts.items()})
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise DamagedCheckpoint(
            f"{str(origin)!r} cannot be loaded: {part!r} lacks or misshapes a weight that tells its sizes: {error}",
            hint="download the file again",
        ) from error
