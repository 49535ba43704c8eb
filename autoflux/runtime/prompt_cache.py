"""Encoded prompts kept: in RAM for this run, and in a folder so that the next run needs no text encoder for them.

No file holds the prompt, neither in its name, which is a hash, nor inside, where there are numbers only. That is no
encryption: who may read the folder can check a guess, or with the model work back from the numbers towards the words.
So the folder is its owner's alone (0700, files 0600), and `AUTOFLUX_PROMPT_CACHE=off` keeps everything off the disk.

This module imports torch only to read and write files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import stat
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeAlias

from autoflux.errors import OutputUnwritable, UsageError
from autoflux.files import write_atomic
from autoflux.models.values import Model
from autoflux.paths import cache_dir
from autoflux.planning.terms import Placement
from autoflux.planning.values import Plan
from autoflux.units import GIB, MIB, parse_bytes

if TYPE_CHECKING:
    from torch import Tensor

Tensors: TypeAlias = "dict[str, Tensor]"

VARIABLE = "AUTOFLUX_PROMPT_CACHE"
"""Environment variable: `off`, or the most bytes that the folder may take, such as `500MB`."""

MEMORY_BYTES = 256 * MIB
DISK_BYTES = 2 * GIB
"""An encoded prompt of FLUX.1-dev takes 4.2 MB: 60 in RAM, 500 on disk."""

FORMAT = 1
"""Raised when what is stored, or how it is computed, changes: files of other formats are not found any more."""

ENCODERS = ("text_encoder", "tokenizer")
"""What the names of the folders begin with that an encoded prompt depends on."""

_OFF = frozenset({"off", "no", "none", "false", "0"})
_DIGEST = "autoflux.sha256"
_SUFFIX = ".safetensors"
_OURS = re.compile(r"\.?[0-9a-f]{64}\.safetensors(\..+)?")
"""Finished files, and unfinished ones (`.KEY.safetensors.xyz`) of a process that is writing or was killed."""

_log = logging.getLogger(__name__)


class PromptCache:
    """Encoded prompts of one model, as one plan encodes them. The least recently used ones go first.

    Example::

        cache = PromptCache.open(model, plan)
        if (tensors := cache.find("a red circle")) is None:
            tensors = pipeline.pack(*pipeline.encode(["a red circle"]))
            cache.keep("a red circle", tensors)
        conditioning = pipeline.unpack(tensors, "a red circle")
    """

    def __init__(self, encoder: str, folder: PromptFolder | None = None, memory_bytes: int = MEMORY_BYTES) -> None:
        self._encoder = encoder
        self._folder = folder
        self._limit = memory_bytes
        self._used = 0
        self._kept: OrderedDict[str, Tensors] = OrderedDict()

    @classmethod
    def open(cls, model: Model, plan: Plan, environment: Mapping[str, str] = os.environ) -> Self:
        """With the folder `prompts` in autoflux's cache folder, as large as the environment allows.

        Raises:
            UsageError: `AUTOFLUX_PROMPT_CACHE` is neither `off` nor a size.
        """
        limit = disk_limit(environment.get(VARIABLE))
        return cls(encoder_identity(model, plan), PromptFolder(cache_dir() / "prompts", limit) if limit else None)

    def find(self, prompt: str) -> Tensors | None:
        """What was kept of that very text, on the CPU; None when nothing was, or it has been damaged."""
        key = self._key(prompt)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        found = self._folder.read(key) if self._folder else None
        if found is not None:
            self._remember(key, found)
        return found

    def knows(self, prompt: str) -> bool:
        """Whether something was kept of that very text; it may turn out to be damaged. Does not import torch."""
        key = self._key(prompt)
        return key in self._kept or (self._folder is not None and self._folder.has(key))

    def keep(self, prompt: str, tensors: Tensors) -> None:
        """Keep copies. Whatever is wrong with the folder ends in a line in the log."""
        key = self._key(prompt)
        # In RAM, not on the device: the plan has counted on that memory for something else.
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        self._remember(key, copies)
        if self._folder:
            self._folder.write(key, copies)

    def forget(self, prompt: str) -> None:
        """What was found is of no use."""
        key = self._key(prompt)
        self._used -= _size(self._kept.pop(key, {}))
        if self._folder:
            self._folder.remove(key)

    def clear(self) -> None:
        """Give back the RAM; the files stay."""
        self._kept.clear()
        self._used = 0

    def _key(self, prompt: str) -> str:
        return _sha256([self._encoder, prompt])

    def _remember(self, key: str, tensors: Tensors) -> None:
        self._used += _size(tensors) - _size(self._kept.pop(key, {}))
        self._kept[key] = tensors
        while self._used > self._limit:
            self._used -= _size(self._kept.popitem(last=False)[1])


class PromptFolder:
    """A file for each encoded prompt, all together at most `limit_bytes`. Other processes may use the folder too.

    What cannot be read is removed, what cannot be written is left, and the first time the log says so: the files save
    time, and nothing else depends on them.
    """

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self._path = path
        self._limit = limit_bytes
        self._room = 0
        self._told = False

    def has(self, key: str) -> bool:
        """Whether there is a file of that key."""
        return self._file(key).is_file()

    def read(self, key: str) -> Tensors | None:
        """What was written under that key, None if there is nothing that is surely that."""
        file = self._file(key)
        try:
            tensors = _deserialized(key, file.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:
            tensors = None
        if tensors is None:
            self.remove(key)
        else:
            _touch(file)
        return tensors

    def write(self, key: str, tensors: Tensors) -> None:
        data = _serialized(key, tensors)
        if len(data) > self._limit:
            return
        file = self._file(key)
        try:
            self._prepare()
            self._make_room(len(data))
            write_atomic(file, data, mode=0o600)
        except (OSError, OutputUnwritable) as error:
            self._tell(error)
        else:
            _touch(file)

    def remove(self, key: str) -> None:
        with contextlib.suppress(OSError):
            self._file(key).unlink()

    def _file(self, key: str) -> Path:
        return self._path / f"{key}{_SUFFIX}"

    def _prepare(self) -> None:
        self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if stat.S_IMODE(self._path.stat().st_mode) & 0o077:
            self._path.chmod(0o700)

    def _make_room(self, need: int) -> None:
        """Remove files until `need` more bytes fit.

        There can be a hundred thousand files, so they are looked over only after every sixteenth of the limit that was
        written. What another process writes meanwhile, at most as much, may go beyond the limit for that long.
        """
        if need > self._room:
            self._room = max(need, self._limit // 16)
            files = self._oldest_first()
            used = sum(size for _, size, _ in files)
            for _, size, file in files:
                if used + self._room <= self._limit:
                    break
                with contextlib.suppress(FileNotFoundError):
                    file.unlink()
                used -= size
        self._room -= need

    def _oldest_first(self) -> list[tuple[int, int, Path]]:
        found = []
        with os.scandir(self._path) as entries:
            for entry in filter(lambda entry: _OURS.fullmatch(entry.name), entries):
                with contextlib.suppress(FileNotFoundError):  # another process removed it
                    status = entry.stat(follow_symlinks=False)
                    found.append((status.st_mtime_ns, status.st_size, Path(entry.path)))
        return sorted(found)

    def _tell(self, error: OSError | OutputUnwritable) -> None:
        if not self._told:
            self._told = True
            reason = error.message if isinstance(error, OutputUnwritable) else str(error)
            _log.warning("encoded prompts are not kept on disk, the next run encodes them anew: %s", reason)


def disk_limit(setting: str | None) -> int:
    """Bytes that `AUTOFLUX_PROMPT_CACHE` allows on disk, 0 for none.

    Raises:
        UsageError: it is neither `off` nor a size.
    """
    text = (setting or "").strip().lower()
    if not text:
        return DISK_BYTES
    if text in _OFF:
        return 0
    try:
        return parse_bytes(text)
    except UsageError as error:
        # Not ignored: who misspells `off` does not want prompts on the disk.
        raise UsageError(
            f"{VARIABLE}={setting!r} is neither 'off' nor a size", hint="write off, or a size such as 500MB"
        ) from error


def encoder_identity(model: Model, plan: Plan) -> str:
    """A hash of everything but the text that decides what a prompt is encoded to, down to the rounding."""
    precisions = [(c.name, c.storage, c.arithmetic) for c in plan.components if c.name.startswith(ENCODERS)]
    facts = {
        "format": FORMAT,
        "revision": model.revision,
        "files": _encoder_files(model),
        "precisions": sorted(precisions),
        "text_tokens": model.defaults.text_tokens,
        "backend": plan.backend,
        "device": _devices(plan),
    }
    return _sha256(facts)


def _devices(plan: Plan) -> str | dict[str, str]:
    """The kind of device that encodes prompts; of each encoder, if they differ.

    Another kind rounds differently. Where weights wait for it changes nothing.
    """
    device = plan.device.partition(":")[0]
    encoders = (c for c in plan.components if c.name.startswith(ENCODERS))
    by_name = {c.name: "cpu" if c.placement == Placement.HOST else device for c in encoders}
    kinds = set(by_name.values())
    return by_name if len(kinds) > 1 else kinds.pop()


def _encoder_files(model: Model) -> list[tuple[str, int, int]]:
    """Path, size and time of the text encoders' files.

    A model's revision covers the layout of its weights, not the weights: those of a fine-tuned encoder, or of one that
    was trained further in place, have the same. Reading 10 GB to find out would take longer than encoding.
    """
    folder = Path(model.parts_path)
    found = {file for part in folder.glob("*") if part.name.startswith(ENCODERS) for file in part.rglob("*")}
    # Of a single file that holds the encoders too; a folder's own were found above.
    found.update(Path(f) for c in model.components if c.name.startswith(ENCODERS) and not c.folder for f in c.files)
    return sorted((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in found if file.is_file())


def _sha256(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _size(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _serialized(key: str, tensors: Tensors) -> bytes:
    import torch  # noqa: PLC0415 — keeps torch out of light starts
    from safetensors.torch import save  # noqa: PLC0415

    data: bytes = save({**tensors, _DIGEST: torch.frombuffer(_digest(key, tensors), dtype=torch.uint8)})
    return data


def _deserialized(key: str, data: bytes) -> Tensors | None:
    """The tensors in a file, None if it is not, bit for bit, what was written under that key."""
    import torch  # noqa: PLC0415 — keeps torch out of light starts
    from safetensors import SafetensorError  # noqa: PLC0415
    from safetensors.torch import load  # noqa: PLC0415

    try:
        tensors: Tensors = load(data)
        digest = tensors.pop(_DIGEST)
    except (SafetensorError, KeyError, ValueError, RuntimeError):
        return None
    expected = torch.frombuffer(_digest(key, tensors), dtype=torch.uint8)
    return tensors if torch.equal(digest, expected) else None


def _digest(key: str, tensors: Tensors) -> bytearray:
    import torch  # noqa: PLC0415 — keeps torch out of light starts

    digest = hashlib.sha256(key.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return bytearray(digest.digest())


def _touch(file: Path) -> None:
    """Mark the file as just used. By our clock: the kernel's runs in steps of milliseconds."""
    now = time.time_ns()
    with contextlib.suppress(OSError):
        os.utime(file, ns=(now, now))
