"""A FLUX.1-dev model folder at full size without any weights in it: what a plan is made from, and networks to fill."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import msgspec
import torch

import autoflux
from autoflux.models.inventory import take_stock
from autoflux.models.values import Model
from benchmarks.full_size import FLUX_DEV, FLUX_TINY, T5_TINY, T5_XXL, empty_text_encoder, empty_transformer

SAMPLE = Path(autoflux.__file__).parent / "models" / "sample"


def networks_on_meta(*, tiny: bool) -> dict[str, Any]:
    """The four networks of FLUX.1-dev without weights; small ones have T5's real vocabulary, for its tokenizer."""
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    flux = FLUX_TINY if tiny else FLUX_DEV
    clip = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=flux.pooled_width,
        intermediate_size=4 * flux.pooled_width,
        num_hidden_layers=2 if tiny else 12,
        num_attention_heads=2 if tiny else 12,
        projection_dim=flux.pooled_width,
        eos_token_id=2,
    )
    with init_empty_weights(include_buffers=False):
        text_encoder = CLIPTextModel(clip)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=[16, 32, 64, 64] if tiny else [128, 256, 512, 512],
            layers_per_block=2,
            latent_channels=16,
            norm_num_groups=8 if tiny else 32,
            sample_size=1024,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.1159,
            scaling_factor=0.3611,
        )
    t5 = msgspec.structs.replace(T5_TINY, vocabulary=T5_XXL.vocabulary) if tiny else T5_XXL
    return {
        "text_encoder": text_encoder,
        "text_encoder_2": empty_text_encoder(t5),
        "transformer": empty_transformer(flux),
        "vae": vae,
    }


def write_hollow_model(folder: Path, networks: dict[str, Any]) -> Model:
    """A model folder with configurations and weight files that have a header and no data, and what it consists of."""
    for name, network in networks.items():
        save = network.save_config if hasattr(network, "save_config") else network.config.save_pretrained
        save(folder / name)
        _write_hollow_weights(folder / name / "model.safetensors", network)
    for part in ("tokenizer", "tokenizer_2", "scheduler"):
        shutil.copytree(SAMPLE / part, folder / part)
    index = json.loads((SAMPLE / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index))
    return take_stock(folder, "flux.1-dev")


def _write_hollow_weights(file: Path, network: torch.nn.Module) -> None:
    header, at, seen = {}, 0, set()
    for name, tensor in network.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + 2 * tensor.numel()]}
        at += 2 * tensor.numel()
    text = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        opened.truncate(8 + len(text) + at)
