"""Training the autoencoder: its encoder to find the latents that `latents.py` defines, its decoder to draw them."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from tools.sample_model.average import MasterWeights, MovingAverage
from tools.sample_model.drawing import draw
from tools.sample_model.latents import latents_of
from tools.sample_model.networks import autoencoder
from tools.sample_model.ranks import Clock
from tools.sample_model.replay import Replayed

LATENT_NOISE = 0.12
"""Largest standard deviation of what is added to latents in training, so that what the transformer gets a little wrong
still decodes well."""
EDGE_WEIGHT = 1.0
SURE = -8.0
"""Logarithm of the variance that the encoder is to report: a sample of its latents is as good as their mean."""
PEAK_RATE = 1.5e-3


def train_vae(
    rows: Tensor, device: torch.device, *, minutes: float, batch: int, start: AutoencoderKL | None = None
) -> AutoencoderKL:
    """Train for that long on scenes drawn anew; returns the averaged weights."""
    vae = (start or autoencoder()).to(device).requires_grad_().train()
    torch.backends.cudnn.benchmark = True
    rows = rows.to(device)
    weights = MasterWeights(vae, PEAK_RATE, weight_decay=1e-4)
    average = MovingAverage(weights.master, 0.998)

    def step() -> Tensor:
        loss = _loss(vae, draw(rows[torch.randint(len(rows), (batch,), device=device)]))
        weights.step(loss)
        return loss.detach()

    advance = Replayed(step)
    clock, share = Clock(minutes), 0.0
    while share < 1:
        share = clock.share()
        weights.schedule(share)
        loss = advance()
        average.update(weights.master)
        if weights.steps % 500 == 1:
            print(f"vae step {weights.steps} share {share:.2f} loss {loss.item():.4f}", flush=True)
    weights.show(average.values)
    return vae.eval().requires_grad_(requires_grad=False)


@torch.inference_mode()
def reconstruction_psnr(vae: AutoencoderKL, rows: Tensor, device: torch.device) -> float:
    """Mean over pictures, in dB, of 8-bit values."""
    pictures = draw(rows.to(device))
    again = vae.decode(vae.encode(pictures).latent_dist.mode()).sample.clamp(-1, 1)
    error = ((again - pictures) / 2).square().mean(dim=(1, 2, 3))
    return (-10 * torch.log10(error)).mean().item()


def _loss(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    latents = latents_of(pictures)
    spread = LATENT_NOISE * torch.rand(len(latents), 1, 1, 1, device=latents.device)
    with torch.autocast(pictures.device.type, torch.bfloat16):
        found = vae.encode(pictures).latent_dist
        again = vae.decode(latents + spread * torch.randn_like(latents)).sample
    again = again.float()
    edges = sum(
        (nn.functional.l1_loss(again.diff(dim=axis), pictures.diff(dim=axis)) for axis in (2, 3)),
        start=torch.zeros((), device=again.device),
    )
    pixels = nn.functional.l1_loss(again, pictures) + 2 * nn.functional.mse_loss(again, pictures)
    encoded = nn.functional.mse_loss(found.mean.float(), latents) + 1e-3 * (found.logvar.float() - SURE).square().mean()
    total: Tensor = pixels + EDGE_WEIGHT * edges + encoded
    return total
