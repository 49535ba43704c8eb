"""Hubs on the loopback with a small model in them, and empty caches."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from autoflux.models.hubs.stores import Store, stores
from autoflux.models.hubs.values import HubId, Reference, Source
from tests.models.hubs.stub import Files, StubHub

REPO = "someone/small-flux"


def pattern(length: int, seed: int = 0) -> bytes:
    """Bytes in which no stretch looks like another one."""
    words = ((i * 2654435761 + seed * 40503) & 0xFFFFFFFF for i in range(length // 4 + 1))
    return b"".join(word.to_bytes(4, "little") for word in words)[:length]


def flux_files() -> Files:
    """The names of FLUX.1-dev's repository with small contents: what is needed, and what is not."""
    index = {"weight_map": {"a": f"{SHARDS}-00001-of-00002.safetensors", "b": f"{SHARDS}-00002-of-00002.safetensors"}}
    return {
        **NEEDED,
        f"transformer/{SHARDS}.safetensors.index.json": json.dumps(index).encode(),
        ".gitattributes": b"*.safetensors filter=lfs",
        "README.md": b"# a model",
        "ae.safetensors": pattern(300, 8),
        "dev_grid.jpg": pattern(100, 9),
        "flux1-dev.safetensors": pattern(4000, 10),
        "text_encoder/model.fp16.safetensors": pattern(200, 11),
        "text_encoder/pytorch_model.bin": pattern(200, 12),
        "vae/diffusion_pytorch_model.bf16.safetensors": pattern(200, 13),
    }


SHARDS = "diffusion_pytorch_model"
NEEDED: Files = {
    "LICENSE.md": b"do what is right\n",
    "model_index.json": b'{"_class_name": "FluxPipeline"}',
    "scheduler/scheduler_config.json": b"{}",
    "text_encoder/config.json": b'{"a": 1}',
    "text_encoder/model.safetensors": pattern(500, 1),
    "text_encoder_2/config.json": b'{"b": 1}',
    "text_encoder_2/model.safetensors": pattern(900, 2),
    "tokenizer/merges.txt": b"a b",
    "tokenizer/vocab.json": b'{"c": 1}',
    "tokenizer_2/spiece.model": pattern(64, 3),
    "tokenizer_2/tokenizer.json": b'{"d": 1}',
    "transformer/config.json": b'{"e": 1}',
    f"transformer/{SHARDS}-00001-of-00002.safetensors": pattern(3000, 4),
    f"transformer/{SHARDS}-00002-of-00002.safetensors": pattern(2000, 5),
    "vae/config.json": b'{"f": 1}',
    "vae/diffusion_pytorch_model.safetensors": pattern(700, 6),
}
BIG = f"transformer/{SHARDS}-00001-of-00002.safetensors"


@pytest.fixture
def start_hub() -> Iterator[Callable[[], StubHub]]:
    """Start hubs; all are closed in the end."""
    started: list[StubHub] = []

    def start() -> StubHub:
        started.append(StubHub())
        started[-1].repos[REPO] = flux_files()
        return started[-1]

    yield start
    for hub in started:
        hub.close()


@pytest.fixture
def hub(start_hub: Callable[[], StubHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StubHub:
    """A hub that stands for both, with empty caches and no tokens."""
    hub = start_hub()
    for name in ("AUTOFLUX_SOURCE", "HF_HUB_OFFLINE", "HF_TOKEN", "MODELSCOPE_API_TOKEN", "MODELSCOPE_DOMAIN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    return hub


@pytest.fixture(params=list(Source))
def source(request: pytest.FixtureRequest) -> Source:
    return request.param


@pytest.fixture
def small(source: Source) -> Reference:
    """The small model on one of the hubs."""
    return Reference(name=REPO, ids=(HubId(source=source, repo_id=REPO),))


@pytest.fixture
def store(hub: StubHub, source: Source) -> Store:
    return stores()[source]


def contents(folder: Path) -> Files:
    """What lies in a folder, by path; partial downloads and records apart."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".autoflux" not in path.parts
    }
