"""The small files of a diffusers folder: index, configurations, tokenizers, scheduler."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import msgspec

from autoflux.errors import DamagedCheckpoint, ModelNotFound, UnsafeCheckpoint, UnsupportedModel
from autoflux.files import is_there
from autoflux.models.config_values import check_values
from autoflux.models.families import PIPELINES
from autoflux.models.weights import PICKLE_SUFFIXES, check_regular, unreadable

SCHEDULER = "FlowMatchEulerDiscreteScheduler"

_LIBRARIES = ("diffusers", "transformers")
FILES_OF_SMALL_PARTS = {
    "tokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "tokenizer_2": (("tokenizer.json",), ("spiece.model",)),
    "scheduler": (("scheduler_config.json",),),
}
"""For each part the sets of files that it can be loaded from."""


def read_index(folder: Path, components: Iterable[str]) -> dict[str, Any]:
    """The folder's `model_index.json`, if it describes a FLUX pipeline made of the libraries' own classes.

    Raises:
        ModelNotFound: there is none.
        UnsupportedModel: another pipeline, or code that comes with the model.
        DamagedCheckpoint: it cannot be read.
    """
    check_regular(folder / "model_index.json")
    if not (folder / "model_index.json").is_file():
        raise ModelNotFound(
            f"{str(folder)!r} holds no model_index.json",
            hint="give the folder of a model in the diffusers layout, or a single file",
        )
    index = read_json(folder / "model_index.json")
    kind = index.get("_class_name")
    if not isinstance(kind, str) or kind not in PIPELINES:
        raise UnsupportedModel(
            f"{str(folder)!r} holds a {kind!r}; known are {', '.join(PIPELINES)}",
            hint="autoflux runs models of the FLUX family",
        )
    for part in components:
        entry = index.get(part)
        if not (isinstance(entry, list) and len(entry) == 2 and entry[0] in _LIBRARIES):
            raise UnsupportedModel(
                f"{str(folder)!r}: the component {part!r} is {entry!r}, not one of FLUX's own",
                hint="autoflux runs no code that comes with a model; use another version of it",
            )
    return index


def check_file(file: Path) -> None:
    """Refuse what is not there or is no file, such as a pipe, and pickles by their usual names.

    Raises:
        ModelNotFound, UnsafeCheckpoint: as said.
    """
    if not is_there(file):
        raise ModelNotFound(f"no model at {str(file)!r}", hint="check the path, or use a name: `autoflux plugins`")
    if not file.is_file():
        raise ModelNotFound(f"{str(file)!r} is neither a folder nor a file", hint="give a file that can be read twice")
    if file.suffix.lower() in PICKLE_SUFFIXES:
        raise UnsafeCheckpoint(
            f"{str(file)!r} is a pickle file, which can run code when it is loaded, and is not accepted",
            hint="use the safetensors version of the model",
        )


def check_small_parts(folder: Path) -> None:
    """Refuse a folder without tokenizers or scheduler.

    Raises:
        ModelNotFound: one is missing.
        DamagedCheckpoint: one cannot be read.
        UnsupportedModel: the scheduler is not FLUX's.
    """
    # transformers makes an empty tokenizer out of a folder without its files, and pictures of nothing follow.
    for part, alternatives in FILES_OF_SMALL_PARTS.items():
        known = [folder / part / name for names in alternatives for name in names]
        for file in known:
            check_regular(file)
        found = [file for file in known if file.is_file()]
        if not is_loadable(part, [file.name for file in found]):
            needed = " or ".join(" with ".join(names) for names in alternatives)
            raise ModelNotFound(f"{str(folder / part)!r} holds no {needed}", hint="download the model again")
        for file in found:
            if file.suffix == ".json":
                _decoded(file, dict[str, msgspec.Raw])  # quick: 2 MB of words are looked through, not kept
        settings = folder / part / "tokenizer_config.json"
        if is_there(settings):
            check_values(part, read_json(settings), settings)
    read_scheduler(folder)


def is_loadable(part: str, names: Collection[str]) -> bool:
    """Whether the tokenizers or the scheduler of a folder can be made of files of these names."""
    return any(set(names).issuperset(needed) for needed in FILES_OF_SMALL_PARTS[part])


def read_scheduler(folder: Path) -> dict[str, Any]:
    """The scheduler's configuration.

    Raises:
        UnsupportedModel: it is not FLUX's.
        DamagedCheckpoint: it cannot be read, or says what cannot be.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    config = read_json(file)
    if config.get("_class_name") != SCHEDULER:
        raise UnsupportedModel(
            f"the scheduler of {str(folder)!r} is {config.get('_class_name')!r}, needed is {SCHEDULER!r}",
            hint="download the model again",
        )
    check_values("scheduler", config, file)
    return config


def read_config(folder: Path, part: str) -> dict[str, Any]:
    """The configuration of a network.

    Raises:
        ModelNotFound: it is missing.
        DamagedCheckpoint: it cannot be read, or says what cannot be.
    """
    file = folder / part / "config.json"
    config = read_json(file)
    check_values(part, config, file)
    return config


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ModelNotFound: the file is missing.
        DamagedCheckpoint: it cannot be read, or is not a JSON object.
    """
    content = _decoded(file, Any)
    if not isinstance(content, dict):
        raise DamagedCheckpoint(f"{str(file)!r} is not a JSON object", hint="download the file again")
    return content


def _decoded(file: Path, kind: Any) -> Any:
    check_regular(file)
    try:
        return msgspec.json.decode(file.read_bytes(), type=kind)
    except FileNotFoundError as error:
        raise ModelNotFound(f"{str(file)!r} is missing", hint="download the model again") from error
    except OSError as error:
        raise unreadable(file, error) from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{str(file)!r} cannot be read: {error}", hint="download the file again") from error
