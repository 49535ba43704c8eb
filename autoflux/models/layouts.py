"""What a single weight file holds, told by the names in its header and never by the name of the file."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

from autoflux.errors import UnsupportedModel
from autoflux.models.values import Naming
from autoflux.units import counted


class Place(NamedTuple):
    """How the names of a component's weights are spelled in a file."""

    naming: Naming
    prefix: str


_BFL, _DIFFUSERS, _LDM = Naming.BFL, Naming.DIFFUSERS, Naming.LDM

_SIGNS: dict[str, tuple[tuple[str, ...], tuple[tuple[Naming, str], ...]]] = {
    "transformer": (
        ("model.diffusion_model.", "diffusion_model.", "transformer.", ""),
        ((_BFL, "single_blocks.0.linear1.weight"), (_DIFFUSERS, "single_transformer_blocks.0.proj_mlp.weight")),
    ),
    "text_encoder": (
        ("text_encoders.clip_l.transformer.", "text_encoders.clip_l.", "text_encoder."),
        (
            (_DIFFUSERS, "text_model.embeddings.token_embedding.weight"),
            (_DIFFUSERS, "embeddings.token_embedding.weight"),
        ),
    ),
    "text_encoder_2": (
        ("text_encoders.t5xxl.transformer.", "text_encoders.t5xxl.", "text_encoder_2."),
        ((_DIFFUSERS, "encoder.block.0.layer.0.SelfAttention.q.weight"),),
    ),
    "vae": (
        ("vae.", "first_stage_model."),
        ((_LDM, "decoder.up.0.block.0.conv1.weight"), (_DIFFUSERS, "decoder.up_blocks.0.resnets.0.conv1.weight")),
    ),
}
"""For each component the prefixes it goes under, and a weight that only it has, in each naming."""

Test = Callable[[str], bool]


def _starts(*beginnings: str) -> Test:
    return lambda key: key.removeprefix("model.diffusion_model.").startswith(beginnings)


def _has(*middles: str) -> Test:
    return lambda key: any(middle in key for middle in middles)


_LANGUAGE_MODEL = "a language model; autoflux runs image models of the FLUX family"
_FOREIGN: tuple[tuple[Test, str, str], ...] = (
    (_has(".lora_A.", ".lora_B.", ".lora_up.", ".lora_down.", "lora_unet_"), "a LoRA", "give the model it belongs to"),
    (_has("controlnet_blocks.", "controlnet_x_embedder.", "control_model."), "a ControlNet", ""),
    (_has(".quant_state.bitsandbytes__", ".absmax"), "weights quantized by bitsandbytes (nf4)", "GGUF"),
    (_has(".qweight", ".wscales", ".qzeros"), "weights quantized by SVDQuant or GPTQ", "GGUF"),
    (_starts("distilled_guidance_layer."), "Chroma", ""),
    (_starts("double_stream_modulation_img.", "single_stream_modulation."), "FLUX.2", ""),
    (_starts("txt_in.individual_token_refiner.", "double_blocks.0.img_attn_qkv."), "HunyuanVideo", ""),
    (_starts("conditioner.embedders.", "label_emb."), "Stable Diffusion XL", ""),
    (_starts("input_blocks.", "output_blocks.", "cond_stage_model."), "Stable Diffusion 1 or 2", ""),
    (_starts("joint_blocks."), "Stable Diffusion 3", ""),
    (_starts("blocks.0.cross_attn.", "patch_embedding."), "Wan", ""),
    (_starts("transformer_blocks.0.img_mod.1.", "txt_norm."), "Qwen-Image", ""),
    (_starts("noise_refiner.", "cap_embedder."), "Lumina or Z-Image", ""),
    (_starts("encoder.block.0.layer.0.SelfAttention."), "a T5 text encoder alone", "the transformer"),
    (_starts("text_model.embeddings."), "a CLIP text encoder alone", "the transformer"),
    (_starts("decoder.up.0.", "decoder.up_blocks.0."), "an autoencoder alone", "the transformer"),
    (_starts("blk.0.", "model.layers.0.", "token_embd."), _LANGUAGE_MODEL, ""),
)
"""Other models by a name that FLUX.1 has not, what to call them, and what to give instead."""

_ADVICE = {
    "": "autoflux runs models of the FLUX.1 family",
    "GGUF": "use the GGUF, float8 or bfloat16 version of the model",
    "the transformer": "give the file of the transformer, and the folder with this part as --base",
}


def recognise(keys: Collection[str], origin: str) -> dict[str, Place]:
    """Which components a file holds whose tensors have these names; the transformer is always among them.

    Raises:
        UnsupportedModel: it holds another model, named if it is known, or no transformer.
    """
    held = frozenset(keys)
    found = {name: place for name in _SIGNS if (place := _find(name, held))}
    foreign = [(what, advice) for test, what, advice in _FOREIGN if any(map(test, _outside(held, found)))]
    if foreign and ("transformer" not in found or foreign[0][1] != "the transformer"):
        what, advice = foreign[0]
        raise UnsupportedModel(f"{origin!r} holds {what}", hint=_ADVICE.get(advice, advice))
    if not held:
        raise UnsupportedModel(f"{origin!r} holds no tensors", hint=_ADVICE[""])
    if "transformer" not in found:
        raise UnsupportedModel(
            f"{origin!r} holds no FLUX transformer, but {counted(len(held), 'tensor')} by other names, such as "
            f"{min(held)!r}",
            hint=_ADVICE[""],
        )
    return found


def _find(component: str, held: frozenset[str]) -> Place | None:
    prefixes, signs = _SIGNS[component]
    places = (Place(naming, prefix) for prefix in prefixes for naming, sign in signs if prefix + sign in held)
    return next(places, None)


def _outside(held: frozenset[str], found: dict[str, Place]) -> Collection[str]:
    """The names that do not belong to a component with a prefix of its own."""
    prefixes = tuple(place.prefix for name, place in found.items() if place.prefix and name != "transformer")
    return [key for key in held if not key.startswith(prefixes)] if prefixes else held
