"""The layouts in which FLUX files are published, made from the weights of a diffusers folder.

Names are those of the real files: `flux1-dev.safetensors` and `ae.safetensors` of Black Forest Labs, and the
all-in-one files of ComfyUI.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path

from autoflux.models.configs import CLASSES, FLUX_DEV, SCHEDULERS
from autoflux.models.shapes import weights_of

DOUBLE = {
    "img_attn.norm.key_norm.scale": ["attn.norm_k.weight"],
    "img_attn.norm.query_norm.scale": ["attn.norm_q.weight"],
    "txt_attn.norm.key_norm.scale": ["attn.norm_added_k.weight"],
    "txt_attn.norm.query_norm.scale": ["attn.norm_added_q.weight"],
}
SINGLE = {"norm.key_norm.scale": ["attn.norm_k.weight"], "norm.query_norm.scale": ["attn.norm_q.weight"]}
REST = {}
for _kind in ("weight", "bias"):
    DOUBLE |= {
        f"img_attn.proj.{_kind}": [f"attn.to_out.0.{_kind}"],
        f"img_attn.qkv.{_kind}": [f"attn.to_{part}.{_kind}" for part in "qkv"],
        f"img_mlp.0.{_kind}": [f"ff.net.0.proj.{_kind}"],
        f"img_mlp.2.{_kind}": [f"ff.net.2.{_kind}"],
        f"img_mod.lin.{_kind}": [f"norm1.linear.{_kind}"],
        f"txt_attn.proj.{_kind}": [f"attn.to_add_out.{_kind}"],
        f"txt_attn.qkv.{_kind}": [f"attn.add_{part}_proj.{_kind}" for part in "qkv"],
        f"txt_mlp.0.{_kind}": [f"ff_context.net.0.proj.{_kind}"],
        f"txt_mlp.2.{_kind}": [f"ff_context.net.2.{_kind}"],
        f"txt_mod.lin.{_kind}": [f"norm1_context.linear.{_kind}"],
    }
    SINGLE |= {
        f"linear1.{_kind}": [*(f"attn.to_{part}.{_kind}" for part in "qkv"), f"proj_mlp.{_kind}"],
        f"linear2.{_kind}": [f"proj_out.{_kind}"],
        f"modulation.lin.{_kind}": [f"norm.linear.{_kind}"],
    }
    REST |= {
        f"final_layer.adaLN_modulation.1.{_kind}": [f"norm_out.linear.{_kind}"],
        f"final_layer.linear.{_kind}": [f"proj_out.{_kind}"],
        f"img_in.{_kind}": [f"x_embedder.{_kind}"],
        f"txt_in.{_kind}": [f"context_embedder.{_kind}"],
    }
    for _layer, _ours in (("in_layer", "linear_1"), ("out_layer", "linear_2")):
        REST |= {
            f"guidance_in.{_layer}.{_kind}": [f"time_text_embed.guidance_embedder.{_ours}.{_kind}"],
            f"time_in.{_layer}.{_kind}": [f"time_text_embed.timestep_embedder.{_ours}.{_kind}"],
            f"vector_in.{_layer}.{_kind}": [f"time_text_embed.text_embedder.{_ours}.{_kind}"],
        }


def bfl_names(names: Iterable[str]) -> dict[str, list[str]]:
    """Keys of a Black Forest Labs file, and the weights of diffusers that each is made of."""
    held = set(names)
    blocks = {match[0] for name in held if (match := re.match(r"(single_)?transformer_blocks\.\d+\.", name))}
    found = dict(REST)
    for block in blocks:
        single = block.startswith("single")
        path = block.replace("single_transformer_blocks", "single_blocks").replace(
            "transformer_blocks", "double_blocks"
        )
        for key, parts in (SINGLE if single else DOUBLE).items():
            found[path + key] = [block + part for part in parts]
    return {key: parts for key, parts in sorted(found.items()) if set(parts) <= held}


def to_bfl(weights: Mapping[str, object], join: Callable) -> dict[str, object]:
    """The weights in the layout of a Black Forest Labs file; `join(parts, swap=)` puts some one above the other."""
    return {
        key: join([weights[part] for part in parts], swap=key.startswith("final_layer.adaLN_modulation"))
        for key, parts in bfl_names(weights).items()
    }


def join_tensors(parts: list, *, swap: bool):
    """Stack tensors, or change the halves of one."""
    import torch

    return torch.cat(list(reversed(parts[0].chunk(2)))) if swap else torch.cat(parts) if len(parts) > 1 else parts[0]


def join_shapes(parts: list[tuple[int, ...]], *, swap: bool) -> tuple[int, ...]:
    return (sum(part[0] for part in parts), *parts[0][1:])


def ldm_name(name: str, levels: int) -> str:
    """diffusers' name of a weight of the autoencoder in the words of `ae.safetensors`."""
    match = re.match(r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.", name)
    if match:
        level = int(match[3]) if match[2] == "down" else levels - 1 - int(match[3])
        name = f"{match[1]}.{match[2]}.{level}." + name.removeprefix(match[0])
    for ours, theirs in (
        (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
        (r"resnets\.(\d)", r"block.\1"),
        (r"(down|up)samplers\.0", r"\1sample"),
        ("conv_shortcut", "nin_shortcut"),
        ("conv_norm_out", "norm_out"),
    ):
        name = re.sub(ours, theirs, name)
    return name


def to_ldm(weights: Mapping[str, object], reshape: Callable) -> dict[str, object]:
    """The autoencoder's weights as `ae.safetensors` has them, whose attention is made of convolutions."""
    levels = 1 + max(int(m[1]) for name in weights if (m := re.match(r"decoder\.up_blocks\.(\d+)", name)))
    found = {}
    for name, weight in weights.items():
        linear = ".attentions." in name and name.endswith("weight") and "norm" not in name
        found[ldm_name(name, levels)] = reshape(weight) if linear else weight
    return found


def to_all_in_one(parts: Mapping[str, Mapping[str, object]], join: Callable, reshape: Callable) -> dict[str, object]:
    """Everything in one file, as ComfyUI writes it; `parts` are the components' weights."""
    clip = {f"text_model.{name.removeprefix('text_model.')}": w for name, w in parts["text_encoder"].items()}
    prefixed = {
        "model.diffusion_model.": to_bfl(parts["transformer"], join),
        "text_encoders.clip_l.transformer.": clip,
        "text_encoders.t5xxl.transformer.": parts["text_encoder_2"],
        "vae.": to_ldm(parts["vae"], reshape),
    }
    return {prefix + name: weight for prefix, held in prefixed.items() for name, weight in held.items()}


def write_sparse(file: Path, tensors: Mapping[str, tuple[tuple[int, ...], str]], item_bytes: Mapping[str, int]) -> Path:
    """A safetensors file of these shapes and formats whose data takes no room on the disk."""
    header, end = {}, 0
    for name, (shape, form) in tensors.items():
        size = item_bytes[form] * prod(shape)
        header[name] = {"dtype": form, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        opened.truncate(8 + len(text) + end)
    return file


def write_gguf(file: Path, tensors: Mapping[str, object], kind: Callable[[str, object], object]) -> Path:
    """A GGUF file by the format's own library; `kind(name, array)` is the format of each tensor."""
    import gguf

    writer = gguf.GGUFWriter(str(file), "flux")
    for name, array in tensors.items():
        form = kind(name, array)
        data = gguf.quants.quantize(array, form)
        writer.add_tensor(name, data, raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write_sparse_gguf(file: Path, tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> Path:
    """A GGUF file of these shapes and formats whose data takes no room on the disk."""
    import gguf

    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text)) + text.encode()

    head, end = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), 1)], 0
    head.append(string("general.architecture") + struct.pack("<I", 8) + string("flux"))
    for name, (shape, form) in tensors.items():
        kind = gguf.GGMLQuantizationType[form]
        items, size = gguf.GGML_QUANT_SIZES[kind]
        head.append(string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, end))
        end += -(-prod(shape) // items * size // 32) * 32
    text = b"".join(head)
    with file.open("wb") as opened:
        opened.write(text + bytes(-len(text) % 32))
        opened.truncate(len(text) + -len(text) % 32 + end)
    return file


def write_full_size(folder: Path) -> dict[str, Path]:
    """FLUX.1-dev's headers in every layout, with sparse data: 33.7 GB and more in each that take some MB."""
    parts = {name: weights_of(name, config) for name, config in FLUX_DEV.items()}
    bytes_of = {"BF16": 2, "F8_E4M3": 1, "F32": 4}
    made = {"diffusers folder": _full_folder(folder / "folder", parts, bytes_of)}
    bfl = to_bfl(parts["transformer"], join_shapes)
    made["Black Forest Labs file"] = write_sparse(
        folder / "flux1-dev.safetensors", {name: (shape, "BF16") for name, shape in bfl.items()}, bytes_of
    )
    made["float8 file with scales"] = write_sparse(folder / "fp8.safetensors", _scaled(bfl), bytes_of)
    whole = to_all_in_one(parts, join_shapes, lambda shape: (*shape, 1, 1))
    narrow = {name: (shape, "F8_E4M3" if len(shape) == 2 else "BF16") for name, shape in whole.items()}
    made["all-in-one file"] = write_sparse(folder / "all.safetensors", narrow, bytes_of)
    quantized = {
        name: (shape, "Q4_K" if len(shape) == 2 and shape[1] % 256 == 0 else "F32") for name, shape in bfl.items()
    }
    made["GGUF file"] = write_sparse_gguf(folder / "flux1-dev-Q4_K.gguf", quantized)
    return made


def _scaled(weights: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[tuple[int, ...], str]]:
    found: dict[str, tuple[tuple[int, ...], str]] = {"scaled_fp8": ((2,), "F8_E4M3")}
    for name, shape in weights.items():
        found[name] = (shape, "F8_E4M3" if len(shape) == 2 else "BF16")
        if len(shape) == 2:
            found[name.replace(".weight", ".scale_weight")] = ((), "F32")
    return found


def _full_folder(folder: Path, parts: Mapping[str, Mapping[str, tuple[int, ...]]], bytes_of: Mapping[str, int]) -> Path:
    """In the shards in which Hugging Face has them: three of the transformer, two of T5."""
    libraries = {"transformer": "diffusers", "vae": "diffusers"}
    index = {name: [libraries.get(name, "transformers"), CLASSES[name]] for name in parts}
    write_json(folder / "model_index.json", index | {"_class_name": "FluxPipeline"})
    write_json(
        folder / "scheduler" / "scheduler_config.json",
        SCHEDULERS[True] | {"_class_name": "FlowMatchEulerDiscreteScheduler"},
    )
    for name in ("tokenizer", "tokenizer_2"):
        write_json(folder / name / "tokenizer.json", {})
    shards = {"transformer": 3, "text_encoder_2": 2}
    for name, weights in parts.items():
        write_json(folder / name / "config.json", FLUX_DEV[name])
        stem = "diffusion_pytorch_model" if name in libraries else "model"
        count, keys, where = shards.get(name, 1), list(weights), {}
        for i in range(count):
            file = folder / name / (f"{stem}-{i + 1:05}-of-{count:05}" if count > 1 else stem)
            held = {key: (weights[key], "BF16") for key in keys[i::count]}
            write_sparse(file.with_suffix(".safetensors"), held, bytes_of)
            where |= dict.fromkeys(held, f"{file.name}.safetensors")
        if count > 1:
            write_json(folder / name / f"{stem}.safetensors.index.json", {"weight_map": where})
    return folder


def write_json(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
