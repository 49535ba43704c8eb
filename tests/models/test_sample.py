"""The model that ships: small enough, complete, and nothing but a diffusers folder."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

import autoflux
from autoflux.models.inventory import take_stock

SAMPLE = Path(str(resources.files("autoflux.models"))) / "sample"
PROMPT = "a red circle on a blue background"


def test_it_is_small_and_in_bf16():
    assert sum(file.stat().st_size for file in SAMPLE.rglob("*.safetensors")) <= 16_000_000
    model = take_stock(SAMPLE)
    assert {c.disk_precision for c in model.components} == {autoflux.Precision.BFLOAT16}
    assert (model.defaults.width, model.defaults.height, model.defaults.steps) == (256, 256, 12)
    assert model.architecture.guidance


@pytest.mark.parametrize("text_tokens", [64, 512])
def test_diffusers_alone_draws_with_it(text_tokens: int):
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(SAMPLE)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(7)
    sizes = {"width": 128, "height": 128, "num_inference_steps": 2, "max_sequence_length": text_tokens}
    drawn = np.asarray(pipe(PROMPT, generator=generator, **sizes).images[0])
    assert drawn.shape == (128, 128, 3)
    assert drawn.std() > 0
    if text_tokens == take_stock(SAMPLE).defaults.text_tokens:
        with autoflux.load("sample", wishes=autoflux.Wishes(device="cpu")) as session:
            (ours,) = session.generate(PROMPT, seed=7, width=128, height=128, steps=2)
        assert np.array_equal(np.asarray(ours.image), drawn)


def test_its_tokenizers_read_any_text():
    from transformers import CLIPTokenizer, T5TokenizerFast

    clip = CLIPTokenizer.from_pretrained(SAMPLE / "tokenizer")
    t5 = T5TokenizerFast.from_pretrained(SAMPLE / "tokenizer_2")
    for text in ("", PROMPT, "Zebra & 日本語 🙂"):
        ids = clip(text).input_ids
        # The encoder pools at the first end mark, so there must be one only.
        assert ids.count(clip.eos_token_id) == 1
        assert t5(text).input_ids[-1] == t5.eos_token_id
