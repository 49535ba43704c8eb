"""Taking stock of model folders, sound and broken."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from autoflux.errors import (
    AutofluxError,
    DamagedCheckpoint,
    DamagedFile,
    ModelNotFound,
    UnsafeCheckpoint,
    UnsupportedModel,
)
from autoflux.models.config_values import ACTIVATIONS
from autoflux.models.flops import decode_flop, image_tokens, step_flop
from autoflux.models.inventory import take_stock
from autoflux.models.values import Model, Precision
from tests.conftest import FLUX_DEV

WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_the_inventory_counts_what_torch_counts(tiny_model: Path):
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(tiny_model)
    model = take_stock(tiny_model)
    for component in model.components:
        network = getattr(pipe, component.name)
        assert component.parameter_count == sum(p.numel() for p in network.parameters())
        assert component.disk_bytes == 4 * component.parameter_count
        assert component.disk_precision == Precision.FLOAT32
        assert component.class_name == type(network).__name__
    transformer = model.component("transformer")
    assert [(b.path, len(b.blocks)) for b in transformer.block_lists] == [
        ("transformer_blocks", 2),
        ("single_transformer_blocks", 3),
    ]
    for blocks in transformer.block_lists:
        for block, module in zip(blocks.blocks, getattr(pipe.transformer, blocks.path), strict=True):
            assert block.parameters.total == sum(p.numel() for p in module.parameters())
            modulation = [p for n, p in module.named_parameters() if "norm" in n and n.endswith("linear.weight")]
            assert block.parameters.modulation == sum(p.numel() for p in modulation) > 0
    assert [b.path for b in model.component("text_encoder_2").block_lists] == ["encoder.block"]


def test_a_model_survives_json(tiny_model: Path):
    model = take_stock(tiny_model)
    assert Model.from_json(model.to_json()) == model
    assert model.name == "tiny"
    assert model.defaults.width == 64
    assert model.architecture.patch_pixels == 16


def test_shards_are_read_through_their_index(tiny_model: Path, tiny_copy: Path):
    whole = load_file(tiny_copy / "transformer" / WEIGHTS)
    (tiny_copy / "transformer" / WEIGHTS).unlink()
    names = sorted(whole)
    parts = {f"model-{i}.safetensors": names[i::2] for i in range(2)}
    for file, members in parts.items():
        save_file({n: whole[n] for n in members}, tiny_copy / "transformer" / file)
    index = {"weight_map": {n: file for file, members in parts.items() for n in members}}
    (tiny_copy / "transformer" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    sharded, single = (take_stock(folder).component("transformer") for folder in (tiny_copy, tiny_model))
    assert [Path(file).name for file in sharded.files] == sorted(parts)
    assert sharded.replace(files=(), folder="") == single.replace(files=(), folder="")
    (tiny_copy / "transformer" / "model-1.safetensors").unlink()
    with pytest.raises(ModelNotFound, match="model-1"):
        take_stock(tiny_copy)


def test_the_revision_follows_the_weights_layout_and_the_configuration(tiny_model: Path, tiny_copy: Path):
    before = take_stock(tiny_model).revision
    assert take_stock(tiny_copy).revision == before
    config = tiny_copy / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text())
    transformer = tiny_copy / "transformer" / WEIGHTS
    save_file({n: t.bfloat16() for n, t in load_file(transformer).items()}, transformer)
    model = take_stock(tiny_copy)
    assert model.revision != before
    assert model.component("transformer").disk_precision == Precision.BFLOAT16


def test_without_settings_the_model_family_decides(tiny_copy: Path):
    (tiny_copy / "autoflux.json").unlink()
    assert take_stock(tiny_copy).defaults.steps == 28
    _edit_json("transformer/config.json", guidance_embeds=False)(tiny_copy)
    transformer = tiny_copy / "transformer" / WEIGHTS
    save_file({n: t for n, t in load_file(transformer).items() if ".guidance_embedder." not in n}, transformer)
    assert take_stock(tiny_copy).defaults.steps == 4


def _remove(path: str):
    def damage(folder: Path) -> None:
        target = folder / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    return damage


def _write(path: str, content: bytes):
    return lambda folder: (folder / path).write_bytes(content)


def _rename(path: str, name: str):
    return lambda folder: (folder / path).rename((folder / path).with_name(name))


def _truncate(path: str, keep: int):
    def damage(folder: Path) -> None:
        (folder / path).write_bytes((folder / path).read_bytes()[:keep])

    return damage


def _to_pickle(folder: Path) -> None:
    tensors = load_file(folder / "vae" / WEIGHTS)
    (folder / "vae" / WEIGHTS).unlink()
    torch.save(tensors, folder / "vae" / "diffusion_pytorch_model.BIN")


def _torch_zip(folder: Path) -> None:
    torch.save({"a": torch.zeros(2)}, folder / "vae" / WEIGHTS)


def _loop(path: str):
    def damage(folder: Path) -> None:
        (folder / path).unlink()
        (folder / path).symlink_to((folder / path).name)

    return damage


def _add_weight(folder: Path) -> None:
    file = folder / "transformer" / WEIGHTS
    save_file(load_file(file) | {"transformer_blocks.0.ip_adapter.weight": torch.zeros(1)}, file)


def _index_outside(folder: Path) -> None:
    (folder / "vae" / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"a": "../../../etc/passwd"}}')


def _edit_json(path: str, **changes: object):
    def damage(folder: Path) -> None:
        file = folder / path
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


BROKEN = {
    "index missing": (_remove("model_index.json"), ModelNotFound, "model_index.json"),
    "index empty": (_write("model_index.json", b""), DamagedCheckpoint, "model_index.json"),
    "index not an object": (_write("model_index.json", b"[1]"), DamagedCheckpoint, "not a JSON object"),
    "index not utf-8": (_write("model_index.json", b'{"a": "\xff"}'), DamagedCheckpoint, "model_index.json"),
    "another pipeline": (
        _edit_json("model_index.json", _class_name="StableDiffusionPipeline"),
        UnsupportedModel,
        "Stable",
    ),
    "a list for a pipeline": (_edit_json("model_index.json", _class_name=["a"]), UnsupportedModel, "known are"),
    "custom code": (_edit_json("model_index.json", vae=["my_code", "Vae"]), UnsupportedModel, "my_code"),
    "no encoder": (_edit_json("model_index.json", text_encoder_2=[None, None]), UnsupportedModel, "text_encoder_2"),
    "component missing": (_remove("vae"), ModelNotFound, "vae"),
    "config missing": (_remove("transformer/config.json"), ModelNotFound, "config.json"),
    "config lacks a size": (_write("transformer/config.json", b"{}"), DamagedCheckpoint, "num_attention_heads"),
    "config without end": (_write("vae/config.json", b"[" * 100_000), DamagedCheckpoint, "cannot be read"),
    "config is a loop": (
        _loop("vae/config.json"),
        DamagedCheckpoint,
        "config.json' cannot be read: Too many levels of symbolic links$",
    ),
    "weights are a loop": (_loop(f"vae/{WEIGHTS}"), DamagedCheckpoint, "cannot be read: Too many levels"),
    "a weight too many": (_add_weight, UnsupportedModel, "ip_adapter"),
    "tokenizer truncated": (_truncate("tokenizer/tokenizer.json", 100), DamagedCheckpoint, "tokenizer.json' cannot be"),
    "settings of a tokenizer cut off": (
        _write("tokenizer/tokenizer_config.json", b"["),
        DamagedCheckpoint,
        "cannot be",
    ),
    "tokenizer missing": (_remove("tokenizer/tokenizer.json"), ModelNotFound, "tokenizer.json or vocab.json"),
    "words without merges": (
        _rename("tokenizer/tokenizer.json", "vocab.json"),
        ModelNotFound,
        "vocab.json with merges",
    ),
    "second tokenizer missing": (_remove("tokenizer_2"), ModelNotFound, "spiece.model"),
    "scheduler missing": (_remove("scheduler"), ModelNotFound, "scheduler_config.json"),
    "scheduler empty": (_write("scheduler/scheduler_config.json", b"{}"), UnsupportedModel, "FlowMatch"),
    "weights missing": (_remove(f"vae/{WEIGHTS}"), ModelNotFound, "no safetensors"),
    "weights empty": (_write(f"vae/{WEIGHTS}", b""), DamagedCheckpoint, "is empty"),
    "weights truncated": (_truncate(f"vae/{WEIGHTS}", -100), DamagedCheckpoint, "cannot be read"),
    "header truncated": (_truncate(f"vae/{WEIGHTS}", 100), DamagedCheckpoint, "cannot be read"),
    "header length absurd": (_write(f"vae/{WEIGHTS}", b"\xff" * 7 + b"\x7f{}"), DamagedCheckpoint, "cannot be read"),
    "trailing bytes": (
        lambda f: (f / "vae" / WEIGHTS).write_bytes((f / "vae" / WEIGHTS).read_bytes() + b"x"),
        DamagedCheckpoint,
        "cannot be read",
    ),
    "web page": (_write(f"vae/{WEIGHTS}", b"<!DOCTYPE html><html></html>"), DamagedCheckpoint, "web page"),
    "lfs pointer": (
        _write(f"vae/{WEIGHTS}", b"version https://git-lfs.github.com/spec/v1\n"),
        DamagedCheckpoint,
        "git-lfs",
    ),
    "pickle only": (_to_pickle, UnsafeCheckpoint, "is a pickle file"),
    "torch file under a false name": (_torch_zip, UnsafeCheckpoint, "pickle"),
    "bare pickle under a false name": (_write(f"vae/{WEIGHTS}", pickle.dumps([1] * 9)), UnsafeCheckpoint, "pickle"),
    "index names a file outside": (_index_outside, DamagedCheckpoint, "not a weight file beside it"),
    "index names what no name can be": (
        _write(f"vae/{WEIGHTS}.index.json", json.dumps({"weight_map": {"a": "a" * 300 + ".safetensors"}}).encode()),
        ModelNotFound,
        "the shard .* is missing",
    ),
    "index is rubbish": (_write(f"vae/{WEIGHTS}.index.json", b"{}"), DamagedCheckpoint, "index.json"),
    "settings with an unknown key": (_write("autoflux.json", b'{"default": {}}'), DamagedFile, "default"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_model_is_named_with_what_to_do(tiny_copy: Path, case: str):
    damage, kind, words = BROKEN[case]
    damage(tiny_copy)
    with pytest.raises(kind, match=words) as caught:
        take_stock(tiny_copy)
    assert type(caught.value) is kind
    assert caught.value.hint


def _device(file: Path) -> None:
    file.symlink_to(os.devnull)


def _pipe(file: Path) -> None:
    os.mkfifo(file)


@pytest.mark.skipif(os.name == "nt", reason="there are no such files")
@pytest.mark.parametrize("put", [_device, _pipe])
@pytest.mark.parametrize(
    "path",
    [
        "autoflux.json",
        "model_index.json",
        "tokenizer/tokenizer.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "tokenizer/tokenizer_config.json",
        f"transformer/{WEIGHTS}.index.json",
        f"vae/{WEIGHTS}",
    ],
)
def test_what_has_no_end_is_named_and_not_waited_for(tiny_copy: Path, path: str, put):
    (tiny_copy / path).unlink(missing_ok=True)
    put(tiny_copy / path)
    with pytest.raises(DamagedCheckpoint, match=f"{path}' is no regular file") as caught:
        take_stock(tiny_copy)
    assert caught.value.hint


MISSTATED = [
    ("transformer", "num_layers", 1),  # the libraries would leave the other out
    ("transformer", "num_layers", -1),
    ("transformer", "num_layers", 10**8),
    ("transformer", "num_layers", "2"),
    ("transformer", "num_layers", 2.5),
    ("transformer", "num_single_layers", True),
    ("transformer", "guidance_embeds", False),
    ("transformer", "axes_dims_rope", [4, 4, 4]),
    ("transformer", "axes_dims_rope", [5, 5, 6]),
    ("transformer", "axes_dims_rope", 16),
    ("text_encoder", "num_hidden_layers", 1),
    ("text_encoder", "num_attention_heads", 5),
    ("text_encoder", "num_attention_heads", 0),
    ("text_encoder", "hidden_act", "evil"),
    ("text_encoder", "hidden_act", []),
    ("text_encoder_2", "num_layers", 1),
    ("text_encoder_2", "feed_forward_proj", "gated-evil"),
    ("text_encoder_2", "num_heads", 4),
    ("vae", "layers_per_block", 0),
    ("vae", "block_out_channels", [8, 8, 16]),
    ("vae", "block_out_channels", [8, 8, "16", 16]),
    ("vae", "mid_block_add_attention", False),
    ("vae", "norm_num_groups", 7),
    ("vae", "scaling_factor", 0),
    ("vae", "scaling_factor", "x"),
    ("vae", "shift_factor", []),
    ("tokenizer", "model_max_length", -1),
    ("tokenizer", "model_max_length", "x"),
    ("scheduler", "num_train_timesteps", 10**9),
    ("scheduler", "shift", "x"),
    ("scheduler", "base_shift", "x"),
]


@pytest.mark.parametrize(("part", "key", "value"), MISSTATED, ids=str)
def test_a_configuration_that_cannot_be_is_named_with_the_key(tiny_copy: Path, part: str, key: str, value: object):
    file = f"{part}_config.json" if part in ("scheduler", "tokenizer") else "config.json"
    _edit_json(f"{part}/{file}", **{key: value})(tiny_copy)
    with pytest.raises(DamagedCheckpoint) as caught:
        take_stock(tiny_copy)
    for words in (f"/{part}", "config.json", repr(key), repr(value)):
        assert words in caught.value.message
    assert caught.value.hint


def test_all_functions_that_are_taken_are_known_to_transformers():
    from transformers.activations import ACT2FN

    known = {name for name in ACT2FN if not list(ACT2FN[name].parameters())}
    assert known >= ACTIVATIONS
    assert {"quick_gelu", "gelu", "gelu_new", "relu", "silu"} <= ACTIVATIONS


def test_a_value_that_is_left_out_is_told_with_what_it_is_then(tiny_copy: Path):
    file = tiny_copy / "text_encoder" / "config.json"
    config = json.loads(file.read_text())
    del config["num_attention_heads"]
    file.write_text(json.dumps(config))
    with pytest.raises(DamagedCheckpoint, match="'num_attention_heads' is left out, and then 12"):
        take_stock(tiny_copy)


def test_what_published_folders_hold_beside_the_weights_is_no_fault(tiny_copy: Path):
    """Tables that newer libraries compute, a projection that only whole CLIPs use, and T5's table by its other name."""
    clip, t5 = (tiny_copy / part / "model.safetensors" for part in ("text_encoder", "text_encoder_2"))
    before = take_stock(tiny_copy)
    old = {f"text_model.{name}": tensor for name, tensor in load_file(clip).items()}
    more = {"text_model.embeddings.position_ids": torch.arange(77), "text_projection.weight": torch.ones(32, 32)}
    save_file(old | more, clip)
    held = load_file(t5)
    save_file(held | {"encoder.embed_tokens.weight": held["shared.weight"].clone()}, t5)
    assert [c.parameter_count for c in take_stock(tiny_copy).components] == [
        c.parameter_count for c in before.components
    ]


def test_what_is_no_folder_is_refused(tmp_path: Path):
    with pytest.raises(ModelNotFound, match="no model at"):
        take_stock(tmp_path / "nothing")
    with pytest.raises(ModelNotFound, match="model_index"):
        take_stock(tmp_path)
    for name, kind in (("model.ckpt", UnsafeCheckpoint), ("model.safetensors", DamagedCheckpoint)):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(kind):
            take_stock(tmp_path / name)


def test_every_refusal_is_one_of_ours(tiny_copy: Path):
    """Any single byte of the header changed: a model or one of our errors, never another exception."""
    file = tiny_copy / "text_encoder" / "model.safetensors"
    content = bytearray(file.read_bytes())
    for position in range(0, 400, 7):
        changed = bytearray(content)
        changed[position] ^= 0x55
        file.write_bytes(changed)
        try:
            take_stock(tiny_copy)
        except AutofluxError as error:
            assert error.message  # noqa: PT017 — either outcome is right


def test_arithmetic_of_flux_dev_is_what_was_counted():
    tokens = 512 + image_tokens(FLUX_DEV, 1024, 1024)
    assert tokens == 4608
    assert step_flop(FLUX_DEV, tokens) / 1e12 == pytest.approx(74.4, rel=0.005)
    assert decode_flop(FLUX_DEV, 1024, 1024) / 1e12 == pytest.approx(10.5, rel=0.03)
