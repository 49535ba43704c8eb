"""Train the sample model from nothing.

    python -m tools.sample_model.train --out DIR

draws the training pictures, trains the autoencoder, the transformer with both text encoders, and distils guidance. It
writes diffusers folders: DIR/model, and DIR/undistilled, which can be trained or distilled on. On one H100 the defaults
take 27 minutes. The seed fixes the data; the weights differ a little from run to run, as training goes by the clock and
GPU sums are not ordered.
"""

from __future__ import annotations

import argparse
import shutil
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTokenizer, T5TokenizerFast

from tools.sample_model import networks
from tools.sample_model.batches import Latents, Sampler
from tools.sample_model.data import Scenes, make_scenes
from tools.sample_model.distil import distil
from tools.sample_model.drawing import draw
from tools.sample_model.latents import latents_of
from tools.sample_model.ranks import join, leave, rank
from tools.sample_model.train_flow import Networks, train_flow
from tools.sample_model.train_text import train_text
from tools.sample_model.train_vae import reconstruction_psnr, train_vae
from tools.sample_model.words import CLIP_LENGTH, clip_tokenizer, t5_tokenizer

SETTINGS = Path(__file__).with_name("autoflux.json")
TEXT_TOKENS = 64
CAPTIONS_EACH = 4
SIZES = ((256, 256), (192, 320), (320, 192), (320, 320))
"""Heights and widths; most training is at the first."""


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=120_000, help="pictures of the first size; a tenth of each other")
    parser.add_argument("--vae-minutes", type=float, default=2.5)
    parser.add_argument("--text-minutes", type=float, default=1.0)
    parser.add_argument("--flow-minutes", type=float, default=16.0)
    parser.add_argument("--distil-minutes", type=float, default=2.8)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--vae-batch", type=int, default=24)
    parser.add_argument("--text-batch", type=int, default=512)
    parser.add_argument("--distil-batch", type=int, default=64, help="small: what is learned there is free of noise")
    parser.add_argument("--start", type=Path, help="train this one on, such as DIR/undistilled; 0 minutes leave a part")
    parser.add_argument("--teacher", type=Path, help="--start, before it was distilled in part: distil it on")
    parser.add_argument("--compile", action="store_true", help="compile the transformer's blocks")
    parser.add_argument("--seed", type=int, default=0)
    try:
        train(parser.parse_args())
    finally:
        leave()


def train(options: argparse.Namespace) -> None:
    """All stages in order."""
    device = join()
    torch.manual_seed(options.seed + rank())
    torch.set_float32_matmul_precision("high")
    # Its backward pass fails at these sizes (torch 2.11, CUDA 13, H200), and the failure surfaces in cuBLAS.
    torch.backends.cuda.enable_cudnn_sdp(enabled=False)
    counts = [options.scenes, *(options.scenes // 10 for _ in SIZES[1:])]
    sets = [make_scenes(count, CAPTIONS_EACH, options.seed + i) for i, count in enumerate(counts)]
    print(f"{sum(counts)} scenes, such as: {sets[0].captions[0]}", flush=True)
    start = _load(options, sets[0], device) if options.start else _fresh(sets[0], options, device)
    vae, clip_words, t5_words = start.vae.to(device), start.tokenizer, start.tokenizer_2
    print(f"autoencoder: {reconstruction_psnr(vae, sets[0].rows[:64], device):.1f} dB", flush=True)
    latents = [_latents(s, size, clip_words, t5_words, device) for s, size in zip(sets, SIZES, strict=True)]
    # Processors multiply bf16 slowly.
    place = {"device": device, "dtype": torch.bfloat16 if device.type == "cuda" else torch.float32}
    trained = Networks(start.transformer.to(**place), start.text_encoder.to(**place), start.text_encoder_2.to(**place))
    trained.all().train()
    if options.compile:
        # One graph for each length of prompt and size of picture, forwards and backwards.
        torch._dynamo.config.recompile_limit = 64  # noqa: SLF001 — the documented place of this setting
        trained.transformer.compile_repeated_blocks(dynamic=False)
    empty = (_clip_ids(clip_words, [""]).to(device), _t5_ids(t5_words, [""]).to(device))
    if options.text_minutes > 0:
        ids = (latents[0].clip_ids, latents[0].t5_ids)
        told = train_text(trained, sets[0].rows, *ids, minutes=options.text_minutes, batch=options.text_batch)
        print(f"text encoders: {100 * told:.2f} % of shapes told rightly", flush=True)
    sampler = Sampler(latents, empty, options.batch, options.seed)

    def save(name: str) -> None:
        if rank() == 0:
            _export(options.out / name, trained, vae, clip_words, t5_words)

    if options.flow_minutes > 0:
        minutes = options.flow_minutes
        train_flow(trained, sampler, minutes=minutes, on_milestone=partial(save, "undistilled"))
        save("undistilled")
    if options.distil_minutes > 0:
        teacher = FluxTransformer2DModel.from_pretrained(options.teacher / "transformer") if options.teacher else None
        small = Sampler(latents, empty, options.distil_batch, options.seed)
        distil(trained, small, minutes=options.distil_minutes, teacher=teacher and teacher.to(**place))
        save("model")
    print("done", flush=True)


def _fresh(scenes: Scenes, options: argparse.Namespace, device: torch.device) -> FluxPipeline:
    """Tokenizers and a trained autoencoder, with a transformer and encoders that know nothing yet."""
    known = [captions[0] for captions in scenes.captions[:50_000]]
    clip_words, t5_words = clip_tokenizer(known), t5_tokenizer(known)
    return FluxPipeline(
        scheduler=networks.scheduler(),
        vae=train_vae(scenes.rows, device, minutes=options.vae_minutes, batch=options.vae_batch),
        text_encoder=networks.clip_encoder(clip_words),
        tokenizer=clip_words,
        text_encoder_2=networks.t5_encoder(t5_words),
        tokenizer_2=t5_words,
        transformer=networks.transformer(),
    )


def _load(options: argparse.Namespace, scenes: Scenes, device: torch.device) -> FluxPipeline:
    """A model trained before, its autoencoder trained on if there is time for that."""
    pipe = FluxPipeline.from_pretrained(options.start, dtype=torch.float32)
    if options.vae_minutes > 0:
        train_vae(scenes.rows, device, minutes=options.vae_minutes, batch=options.vae_batch, start=pipe.vae)
    pipe.vae.eval().requires_grad_(requires_grad=False)
    return pipe


@torch.inference_mode()
def _latents(
    scenes: Scenes,
    size: tuple[int, int],
    clip_words: CLIPTokenizer,
    t5_words: T5TokenizerFast,
    device: torch.device,
) -> Latents:
    parts = []
    for start in range(0, len(scenes.rows), 128):
        pictures = draw(scenes.rows[start : start + 128].to(device), *size)
        parts.append(latents_of(pictures).to(torch.bfloat16))
    captions = [caption for variants in scenes.captions for caption in variants]
    shape = (len(scenes.captions), CAPTIONS_EACH, -1)
    return Latents(
        latents=torch.cat(parts).clone(),
        clip_ids=_clip_ids(clip_words, captions).view(shape).to(device),
        t5_ids=_t5_ids(t5_words, captions).view(shape).to(device),
    )


def _clip_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    ids = tokenizer(captions, padding="max_length", max_length=CLIP_LENGTH, truncation=True).input_ids
    return torch.tensor(ids, dtype=torch.int16)


def _t5_ids(tokenizer: T5TokenizerFast, captions: list[str]) -> torch.Tensor:
    ids = tokenizer(captions, padding="max_length", max_length=TEXT_TOKENS, truncation=True).input_ids
    return torch.tensor(ids, dtype=torch.int16)


def _export(
    folder: Path, trained: Networks, vae: AutoencoderKL, clip_words: CLIPTokenizer, t5_words: T5TokenizerFast
) -> None:
    """Write the folder in bf16, replacing it whole."""
    pipe = FluxPipeline(
        scheduler=networks.scheduler(),
        vae=_copy(networks.autoencoder(), vae),
        text_encoder=_copy(networks.clip_encoder(clip_words), trained.clip),
        tokenizer=clip_words,
        text_encoder_2=_copy(networks.t5_encoder(t5_words), trained.t5),
        tokenizer_2=t5_words,
        transformer=_copy(networks.transformer(), trained.transformer),
    )
    fresh = folder.with_suffix(".new")
    pipe.save_pretrained(fresh)
    shutil.copy(SETTINGS, fresh / "autoflux.json")
    for part in ("text_encoder", "text_encoder_2"):
        _compute_in_float32(fresh / part / "config.json")
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    print(f"wrote {folder}: {size:,} bytes of weights", flush=True)


def _compute_in_float32(config: Path) -> None:
    # Without a wish transformers takes the type named here and diffusers takes float32: let them agree.
    config.write_text(config.read_text().replace('"dtype": "bfloat16"', '"dtype": "float32"'))


def _copy(fresh: torch.nn.Module, trained: torch.nn.Module) -> torch.nn.Module:
    fresh.load_state_dict({name: tensor.cpu() for name, tensor in trained.state_dict().items()})
    return fresh.to(torch.bfloat16).eval()


if __name__ == "__main__":
    main()
