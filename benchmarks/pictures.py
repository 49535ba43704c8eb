"""A whole FLUX.1-dev picture at full size (random weights) under hard caps of device memory: time and peak memory.

    python -m benchmarks.pictures --vram 6          # one cap, in GB: plan, encode, 28 steps, decode
    python -m benchmarks.pictures --tiny            # the same with small networks, on whatever device there is

The plan is the planner's own for that cap. torch is forbidden to take more than the cap leaves beside the context, so
that a plan that counts wrongly fails here as it would on a small card. Weights are random: right for time and memory.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import struct
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import torch

import autoflux
from autoflux import api
from autoflux.models.inventory import take_stock
from autoflux.models.values import Model
from autoflux.planning.values import Plan, Wishes
from autoflux.plugin_manager import load_plugins
from benchmarks.full_size import (
    FLUX_DEV,
    FLUX_TINY,
    T5_TINY,
    T5_XXL,
    empty_text_encoder,
    empty_transformer,
    fill_randomly,
)

GB = 10**9
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


def plan_for(model: Model, vram_bytes: int | None) -> Plan:
    """What autoflux would do here under that ceiling; without one, on the CPU."""
    wishes = Wishes(device="cuda", vram_bytes=vram_bytes) if vram_bytes else Wishes(device="cpu")
    return api.plan_for(model, wishes, load_plugins(), autoflux.probe())


def open_session(model: Model, plan: Plan, networks: dict[str, Any]) -> autoflux.Session:
    """The session of that plan over random weights."""
    from autoflux.plugins.diffusers_loading import DTYPES, Loaded, assemble
    from autoflux.plugins.diffusers_pipeline import DiffusersPipeline

    filled = (
        Loaded(name, fill_randomly(network, device="cpu", dtype=DTYPES[plan.component(name).arithmetic]))
        for name, network in networks.items()
    )
    components = assemble(filled, plan, Path(model.path))
    return autoflux.Session(DiffusersPipeline(components, plan, model), plan, model)


class Memory:
    """Device memory of this process; zeros without CUDA."""

    def __init__(self) -> None:
        self.on_card = torch.cuda.is_available()
        self.context_bytes = self._used() - torch.cuda.memory_reserved() if self.on_card else 0

    def cap(self, nbytes: int) -> None:
        """Forbid torch to hold more than that, the context included."""
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction((nbytes - self.context_bytes) / total)

    def restart(self) -> None:
        """Forget the peak so far."""
        if self.on_card:
            torch.cuda.reset_peak_memory_stats()

    def peak_gb(self) -> dict[str, float]:
        """Since the restart: what tensors took, what torch held for them, and what the card had to give."""
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {
            "allocated_gb": allocated / GB,
            "reserved_gb": reserved / GB,
            "on_card_gb": (reserved + self.context_bytes) / GB,
        }

    def _used(self) -> int:
        free, total = torch.cuda.mem_get_info()
        return total - free


def draw(
    session: autoflux.Session, memory: Memory, *, seed: int, width: int, height: int, steps: int
) -> dict[str, Any]:
    """One picture, with the time of its parts."""
    marks: list[float] = []
    memory.restart()
    began = time.perf_counter()
    # Another prompt each time, so that the text encoders run.
    session.generate(
        f"picture number {seed}",
        seed=seed,
        steps=steps,
        width=width,
        height=height,
        on_step=lambda *_: marks.append(time.perf_counter()),
    )
    total = time.perf_counter() - began
    pauses = [later - earlier for earlier, later in pairwise(marks)]
    step = statistics.median(pauses) if pauses else marks[0] - began
    return {
        "width": width,
        "height": height,
        "steps": steps,
        "seconds": total,
        "seconds_per_step": step,
        "seconds_beside_steps": total - steps * step,
        **memory.peak_gb(),
    }


def endurance(session: autoflux.Session, memory: Memory, *, steps: int) -> dict[str, Any]:
    """Fifty pictures of mixed sizes, then a hundred of one: does memory hold, and how much of it is lost to gaps?"""
    rng = random.Random(0)
    sides = range(512, 1281, 64)
    sizes = [(rng.choice(sides), rng.choice(sides)) for _ in range(50)] + [(1024, 1024)] * 100
    held = []
    for seed, (width, height) in enumerate(sizes):
        row = draw(session, memory, seed=seed, width=width, height=height, steps=steps)
        held.append((row["reserved_gb"], torch.cuda.memory_allocated() / GB))
    reserved = [r for r, _ in held]
    return {
        "pictures": len(sizes),
        "unused_share": 1 - row["allocated_gb"] / row["reserved_gb"] if row["reserved_gb"] else 0.0,
        "reserved_after_50_gb": reserved[49],
        "reserved_after_150_gb": reserved[-1],
        "allocated_growth_bytes": int((held[-1][1] - held[60][1]) * GB),
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Plan, load and draw under one cap."""
    cap = int(options.vram * GB) if options.vram else None
    memory = Memory()
    with tempfile.TemporaryDirectory() as folder:
        networks = networks_on_meta(tiny=options.tiny)
        model = write_hollow_model(Path(folder), networks)
        plan = plan_for(model, cap)
        began = time.perf_counter()
        with open_session(model, plan, networks) as session:
            ready = time.perf_counter() - began
            if cap:
                torch.cuda.empty_cache()
                memory.cap(cap)
            rows = [
                draw(session, memory, seed=seed, width=options.size, height=options.size, steps=options.steps)
                for seed in range(options.pictures)
            ]
            lasting = endurance(session, memory, steps=2) if options.endurance else None
    transformer = plan.component("transformer")
    return {
        "cap_gb": options.vram,
        "context_gb": memory.context_bytes / GB,
        "offload": plan.offload,
        "resident_blocks": len(transformer.resident),
        "ring_gb": plan.ring_bytes / GB,
        "waiting": {part.name: part.waiting for part in plan.arrangement.streamed},
        "placement": {part.name: part.placement for part in plan.components},
        "storage": transformer.storage,
        "native": transformer.native,
        "compiled": plan.compiled,
        "attention": plan.attention,
        "unit": plan.unit,
        "block_bytes": plan.block_bytes,
        "tiled": plan.tile_decode,
        "predicted_seconds_per_step": plan.predicted.seconds_per_step,
        "predicted_peak_gb": plan.predicted.peak_vram_bytes.peak / GB,
        "ready_seconds": ready,
        "pictures": rows,
        "endurance": lasting,
    }


def main() -> None:
    """Draw under one cap and print what it took as a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vram", type=float, help="cap of device memory in GB, the context included")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--pictures", type=int, default=2, help="the first one warms up")
    parser.add_argument("--endurance", action="store_true", help="then 150 pictures of many sizes")
    parser.add_argument("--tiny", action="store_true", help="small networks")
    print(json.dumps(run(parser.parse_args())), flush=True)


if __name__ == "__main__":
    main()
