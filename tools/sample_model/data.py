"""Training data: scenes and captions made on all cores, pictures drawn on the device."""

from __future__ import annotations

import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from os import cpu_count

import torch
from torch import Tensor

from tools.sample_model.captions import training_caption
from tools.sample_model.drawing import row
from tools.sample_model.scenes import training_scene

CHUNK = 2000
"""Scenes made by one call in a worker process."""


@dataclass(frozen=True)
class Scenes:
    """`rows` (scenes, fields) is what drawing needs; `captions` has some for each scene."""

    rows: Tensor
    captions: list[list[str]]


def make_scenes(count: int, captions_each: int, seed: int) -> Scenes:
    """`count` scenes of combinations that training may see; the same seed gives the same scenes."""
    chunks = [(seed * 1_000_003 + start, min(CHUNK, count - start), captions_each) for start in range(0, count, CHUNK)]
    if len(chunks) == 1:  # not worth starting processes for
        return _joined([_make_chunk(chunks[0])])
    with ProcessPoolExecutor(cpu_count(), mp_context=get_context("spawn")) as pool:
        return _joined(list(pool.map(_make_chunk, chunks)))


def _joined(parts: list[list[tuple[list[float], list[str]]]]) -> Scenes:
    numbers = torch.tensor([numbers for part in parts for numbers, _ in part], dtype=torch.float32)
    return Scenes(numbers, [captions for part in parts for _, captions in part])


def _make_chunk(order: tuple[int, int, int]) -> list[tuple[list[float], list[str]]]:
    seed, count, captions_each = order
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        scene = training_scene(rng)
        made.append((row(scene), [training_caption(scene, rng) for _ in range(captions_each)]))
    return made
