"""The four networks in miniature. Together they have 7.3 million parameters, 14.6 MB in bf16."""

from __future__ import annotations

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from tools.sample_model.latents import CHANNELS

TEXT_WIDTH, POOLED_WIDTH = 128, 96
LATENT_CHANNELS = CHANNELS
SHIFT = 3.0
"""Of the noise schedule: more of the steps go to high noise, where it is decided what stands where."""


def autoencoder() -> AutoencoderKL:
    """Eight pixels to one latent; narrow at full resolution, where a CPU spends its time."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 32, 64, 96),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=256,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def transformer() -> FluxTransformer2DModel:
    """Two double and seven single blocks, five heads of 32."""
    return FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=7,
        attention_head_dim=32,
        num_attention_heads=5,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        axes_dims_rope=(8, 12, 12),
        guidance_embeds=True,
    )


def clip_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers; its output at the end mark is the pooled prompt."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=POOLED_WIDTH,
            projection_dim=POOLED_WIDTH,
            intermediate_size=4 * POOLED_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=3,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def t5_encoder(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """Three layers."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=2 * TEXT_WIDTH,
            num_layers=3,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The sampler's settings, which training shares."""
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)
