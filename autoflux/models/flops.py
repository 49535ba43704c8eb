"""Arithmetic of a FLUX pipeline, counted in floating-point operations (a multiply-add is two)."""

from __future__ import annotations

from autoflux.models.values import Architecture


def image_tokens(architecture: Architecture, width: int, height: int) -> int:
    """Tokens of a picture of that many pixels."""
    return (width // architecture.patch_pixels) * (height // architecture.patch_pixels)


def step_flop(architecture: Architecture, tokens: int) -> float:
    """One denoise step over `tokens` text and image tokens together, one picture.

    A block multiplies each token by 12 h^2 weights (q, k, v, out and a feed-forward of factor 4; a single block has
    the same in two matrices), and attends with 4 h N^2. Counted on FLUX.1-dev: 74.4 TFLOP at 1024x1024 with 512 text
    tokens.
    """
    blocks = architecture.double_blocks + architecture.single_blocks
    hidden = architecture.hidden_size
    return blocks * (24.0 * hidden**2 * tokens + 4.0 * hidden * tokens**2)


def encode_flop(architecture: Architecture, text_tokens: int) -> float:
    """Both text encoders, one prompt; the T5 encoder is all but a per cent of it."""
    attention = 4.0 * architecture.text_hidden_size * text_tokens**2 * architecture.text_layers
    return 2.0 * architecture.text_parameters * text_tokens + attention


def decode_flop(architecture: Architecture, width: int, height: int) -> float:
    """The VAE decoder, one picture.

    Level k (0 is full resolution) runs `vae_layers + 1` residual blocks of two 3x3 convolutions at 4^-k of the pixels
    with its channels, the first of them coming from the level below, and an upsampling convolution; the middle adds
    two residual blocks and attention over all latent positions. For FLUX.1's VAE this gives 10.3 TFLOP at 1024x1024
    (a hook on every layer counted 10.5).
    """
    channels = architecture.vae_channels
    top = len(channels) - 1
    total: float = 4.0 * 18 * channels[top] ** 2 / 4**top
    for level, width_out in enumerate(channels):
        width_in = channels[min(level + 1, top)]
        convolutions = width_in * width_out + (2 * architecture.vae_layers + 1) * width_out**2
        total += 18.0 * convolutions / 4**level
        if level > 0:
            total += 18.0 * width_out**2 / 4 ** (level - 1)
    positions: float = width * height / 4**top
    return total * width * height + 4.0 * channels[top] * positions**2
