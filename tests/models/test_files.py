"""Single files, sound and broken: recognised by their headers, refused with what to do."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from autoflux.errors import (
    AutofluxError,
    ContradictoryWishes,
    DamagedCheckpoint,
    ModelNotFound,
    UnknownName,
    UnsafeCheckpoint,
    UnsupportedModel,
    UsageError,
)
from autoflux.models.finding import find
from autoflux.models.layouts import recognise
from tests.layouts import join_tensors, to_bfl

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="session")
def bfl(tiny_model: Path) -> dict[str, torch.Tensor]:
    held = load_file(tiny_model / "transformer" / WEIGHTS)
    return {name: tensor.contiguous() for name, tensor in to_bfl(held, join_tensors).items()}


@pytest.fixture
def file(bfl, tmp_path: Path) -> Path:
    save_file(bfl, tmp_path / "flux.safetensors")
    return tmp_path / "flux.safetensors"


def _header(content: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _written(header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _edited(change: Callable[[dict], None]) -> Callable[[bytes], bytes]:
    def damage(content: bytes) -> bytes:
        header, data = _header(content)
        change(header)
        return _written(header, data)

    return damage


def _overlap(header: dict) -> None:
    first, second = [name for name in header if name != "__metadata__"][:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]


def _outside(header: dict) -> None:
    last = max(header, key=lambda name: header[name]["data_offsets"][1])
    header[last]["data_offsets"] = [begin + 10**12 for begin in header[last]["data_offsets"]]


def _backwards(header: dict) -> None:
    name = next(iter(header))
    header[name]["data_offsets"] = header[name]["data_offsets"][::-1]


def _unknown_dtype(header: dict) -> None:
    header[next(iter(header))]["dtype"] = "F7"


def _shape_lies(header: dict) -> None:
    name = next(iter(header))
    header[name]["shape"][0] *= 2


def _nested(_: bytes) -> bytes:
    """Deeper than Python's own stack."""
    text = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    return struct.pack("<Q", len(text)) + text


BROKEN = {
    "empty": (lambda _: b"", DamagedCheckpoint, "is empty"),
    "a few bytes": (lambda content: content[:7], DamagedCheckpoint, "is too short: 7 of the 8 bytes"),
    "truncated in the data": (lambda content: content[:-100], DamagedCheckpoint, "truncated: .* bytes are there"),
    "truncated in the header": (lambda content: content[:200], DamagedCheckpoint, "truncated within its header"),
    "trailing bytes": (lambda content: content + b"xyz", DamagedCheckpoint, "for 3 bytes after the last tensor"),
    "a trailing byte": (lambda content: content + b"x", DamagedCheckpoint, "for 1 byte after the last tensor"),
    "web page": (lambda _: b"<!DOCTYPE html><html>log in</html>", DamagedCheckpoint, "web page"),
    "web page with a mark": (lambda _: b"\xef\xbb\xbf<!DOCTYPE html><html>", DamagedCheckpoint, "web page"),
    "a hub's error": (lambda _: b'{"error":"Repository not found"}', DamagedCheckpoint, "is JSON"),
    "a hub's error in braces": (lambda _: b'{"data":{"status":404}}', DamagedCheckpoint, "is JSON"),
    "a hub's words": (lambda _: b"Entry not\nfound\n", DamagedCheckpoint, "is text, .* 'Entry not found'"),
    "git-lfs pointer": (lambda _: b"version https://git-lfs.github.com/spec/v1\noid", DamagedCheckpoint, "git-lfs"),
    "oversized header": (lambda _: struct.pack("<Q", 2**62) + b"{" * 64, DamagedCheckpoint, "are the most"),
    "overlapping": (_edited(_overlap), DamagedCheckpoint, "cannot be read"),
    "outside the file": (_edited(_outside), DamagedCheckpoint, "truncated|cannot be read"),
    "offsets backwards": (_edited(_backwards), DamagedCheckpoint, "cannot be read"),
    "unknown dtype": (_edited(_unknown_dtype), DamagedCheckpoint, "F7"),
    "shape against bytes": (_edited(_shape_lies), DamagedCheckpoint, "cannot be read"),
    "a pickle": (lambda _: pickle.dumps([1] * 9), UnsafeCheckpoint, "pickle"),
    "a zip": (lambda _: b"PK\x03\x04" + bytes(64), UnsafeCheckpoint, "pickle"),
    "nested without end": (_nested, DamagedCheckpoint, "cannot be read as safetensors"),
    "not JSON": (lambda _: struct.pack("<Q", 8) + b"{nothing", DamagedCheckpoint, "cannot be read"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named_with_what_to_do(file, tiny_model, case):
    damage, kind, words = BROKEN[case]
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(kind, match=words) as caught:
        find(str(file), {}, str(tiny_model))
    assert type(caught.value) is kind
    assert caught.value.hint
    assert file.name in caught.value.message


CHANGED = {
    "a weight missing": (lambda held: held.pop("single_blocks.2.linear2.bias"), DamagedCheckpoint, "proj_out.bias"),
    "a block missing": (
        lambda held: [held.pop(name) for name in list(held) if name.startswith("single_blocks.1.")],
        DamagedCheckpoint,
        "weights are missing",
    ),
    "the first block missing": (
        lambda held: [held.pop(name) for name in list(held) if name.startswith("double_blocks.0.")],
        DamagedCheckpoint,
        "missing",
    ),
    "the embedding missing": (lambda held: held.pop("img_in.weight"), DamagedCheckpoint, "x_embedder"),
    "rows that cannot be cut": (
        lambda held: held.update({"single_blocks.0.linear1.weight": torch.zeros(225, 32)}),
        DamagedCheckpoint,
        "225 rows",
    ),
    "wrong shape": (
        lambda held: held.update({"double_blocks.1.img_mlp.0.weight": torch.zeros(128, 33)}),
        DamagedCheckpoint,
        "shape",
    ),
    "a scalar": (lambda held: held.update({"txt_in.weight": torch.zeros(())}), DamagedCheckpoint, "lacks or misshapes"),
    "a block of another number": (
        lambda held: held.update(
            {"double_blocks.99999999.img_attn.proj.weight": held.pop("double_blocks.1.img_attn.proj.weight")}
        ),
        DamagedCheckpoint,
        "'transformer_blocks.1.attn.to_out.0.weight'",
    ),
    "a weight too many": (
        lambda held: held.update({"double_blocks.0.ip_adapter.weight": torch.zeros(1)}),
        UnsupportedModel,
        "holds 1 weight that",
    ),
    "foreign weights": (
        lambda held: held.update({"double_blocks.0.ip_adapter.weight": torch.zeros(1)}),
        UnsupportedModel,
        "ip_adapter",
    ),
    "integers": (
        lambda held: held.update({"txt_in.weight": held["txt_in.weight"].to(torch.int64)}),
        UnsupportedModel,
        "I64",
    ),
    "scales of blocks": (
        lambda held: held.update({"txt_in.scale_weight": torch.zeros(2, 2)}),
        UnsupportedModel,
        "scales",
    ),
    "no rows": (
        lambda held: held.update({"img_in.weight": torch.zeros(0, 64)}),
        DamagedCheckpoint,
        r"'img_in.weight' of shape \(0, 64\) holds no numbers",
    ),
    "scales in whole numbers": (
        lambda held: held.update({"txt_in.scale_weight": torch.ones(1, dtype=torch.uint8)}),
        UnsupportedModel,
        r"scales .* are U8, of 'context_embedder.weight'",
    ),
    "scales that are too wide": (
        lambda held: held.update({"txt_in.scale_weight": torch.ones(1, dtype=torch.float64)}),
        UnsupportedModel,
        r"scales .* are F64",
    ),
    "whole numbers without scales": (
        lambda held: held.update({"txt_in.weight": held["txt_in.weight"].to(torch.int8)}),
        UnsupportedModel,
        "I8 without scales, such as 'context_embedder.weight'",
    ),
    "no channels known": (
        lambda held: held.update({"img_in.weight": torch.zeros(32, 128)}),
        UnsupportedModel,
        "128 channels",
    ),
}


@pytest.mark.parametrize("case", CHANGED)
def test_weights_that_are_not_a_flux_are_refused(bfl, tiny_model, tmp_path, case):
    change, kind, words = CHANGED[case]
    held = dict(bfl)
    change(held)
    save_file(held, tmp_path / "flux.safetensors")
    with pytest.raises(kind, match=words) as caught:
        find(str(tmp_path / "flux.safetensors"), {}, str(tiny_model))
    assert caught.value.hint


OTHERS = {
    "Stable Diffusion 1": ["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.x"],
    "Stable Diffusion XL": ["model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.transformer.x"],
    "Stable Diffusion 3": ["model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight"],
    "Wan": ["blocks.0.cross_attn.k.weight", "patch_embedding.weight"],
    "Qwen-Image": ["transformer_blocks.0.img_mod.1.weight", "txt_norm.weight"],
    "Chroma": ["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight", "distilled_guidance_layer.x"],
    "HunyuanVideo": ["single_blocks.0.linear1.weight", "double_blocks.0.img_attn_qkv.weight"],
    "FLUX.2": ["single_blocks.0.linear1.weight", "double_stream_modulation_img.lin.weight"],
    "a LoRA": ["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"],
    "bitsandbytes": ["single_blocks.0.linear1.weight", "single_blocks.0.linear1.weight.quant_state.bitsandbytes__nf4"],
    "SVDQuant": ["single_transformer_blocks.0.mlp_fc1.qweight"],
    "T5 text encoder": ["encoder.block.0.layer.0.SelfAttention.q.weight"],
    "autoencoder": ["decoder.up.0.block.0.conv1.weight"],
    "no FLUX transformer": ["something.else"],
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_model_is_named(tmp_path, tiny_model, what):
    save_file({name: torch.zeros(1) for name in OTHERS[what]}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=what) as caught:
        find(str(tmp_path / "model.safetensors"), {}, str(tiny_model))
    assert caught.value.hint


def test_a_file_without_tensors_is_refused(tmp_path):
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModel, match="holds no tensors"):
        find(str(tmp_path / "model.safetensors"), {})


@pytest.mark.parametrize("suffix", ["bin", "pt", "ckpt", "pth", "CKPT"])
def test_pickles_are_refused_by_name_too(tmp_path, suffix):
    (tmp_path / f"model.{suffix}").write_bytes(b"anything")
    with pytest.raises(UnsafeCheckpoint, match="pickle"):
        find(str(tmp_path / f"model.{suffix}"), {})


def test_without_a_base_it_says_how_to_give_one(file, tmp_path, monkeypatch):
    for variable in ("HF_HUB_CACHE", "MODELSCOPE_CACHE"):
        monkeypatch.setenv(variable, str(tmp_path / "none"))
    with pytest.raises(ModelNotFound, match="lacks tokenizers") as caught:
        find(str(file), {})
    assert "--base" in caught.value.hint
    with pytest.raises(ModelNotFound, match="neither a folder"):
        find(str(file), {}, "nonsense")
    with pytest.raises(UsageError, match="base is empty"):
        find(str(file), {}, "")
    with pytest.raises(ModelNotFound, match="is a file, and a folder is needed"):
        find(str(file), {}, str(file))
    with pytest.raises(ModelNotFound, match="not on this machine") as caught:
        find(str(file), {}, "flux.1-dev")
    assert caught.value.hint == "autoflux models pull flux.1-dev"


def test_a_base_for_what_lacks_nothing_is_refused_but_not_that_of_the_environment(tiny_model, monkeypatch):
    for model, registered in ((str(tiny_model), {}), ("mine", {"mine": str(tiny_model)}), ("flux.1-dev", {})):
        with pytest.raises(ContradictoryWishes, match="has all its parts") as caught:
            find(model, registered, "flux.1-schnell")
        assert caught.value.hint == "drop --base"
    monkeypatch.setenv("AUTOFLUX_BASE", "nonsense")
    assert find(str(tiny_model), {}).path == str(tiny_model)


def test_the_environment_names_the_base_of_what_needs_one(file, tiny_copy, monkeypatch):
    monkeypatch.setenv("AUTOFLUX_BASE", str(tiny_copy))
    assert find(str(file), {}).base_path == str(tiny_copy)
    monkeypatch.setenv("AUTOFLUX_BASE", "nonsense")
    with pytest.raises(ModelNotFound, match="'nonsense' is neither a folder"):
        find(str(file), {})


def test_a_base_without_its_parts_is_refused(file, tiny_copy):
    (tiny_copy / "text_encoder_2" / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match="text_encoder_2"):
        find(str(file), {}, str(tiny_copy))


def test_sizes_that_no_configuration_tells_are_refused(file, tiny_copy):
    (tiny_copy / "transformer" / "config.json").unlink()
    with pytest.raises(UnsupportedModel, match="attention_head_dim is 16"):
        find(str(file), {}, str(tiny_copy))


def test_names_are_told_from_paths():
    with pytest.raises(UnknownName, match="no model named") as caught:
        find("flux.1-deb", {"sample": "x"})
    assert caught.value.hint == "did you mean 'flux.1-dev'?"
    with pytest.raises(ModelNotFound, match="no model at"):
        find("missing.safetensors", {})
    assert find("FLUX.1-Krea".lower(), {}).name == "flux.1-krea-dev"


@pytest.mark.parametrize("path", ["~nosuchuser/x", "~nosuchuser/x.safetensors", "a" * 300 + "/x", "a" * 300 + ".gguf"])
def test_what_cannot_be_a_path_is_no_model(file, path):
    with pytest.raises(ModelNotFound):
        find(path, {})
    with pytest.raises(ModelNotFound, match="neither a folder"):
        find(str(file), {}, path)


def test_names_for_diffusers_are_checked_as_those_of_black_forest_labs(tiny_model, tmp_path):
    held = load_file(tiny_model / "transformer" / WEIGHTS)
    save_file(held | {"transformer_blocks.0.ip_adapter.weight": torch.zeros(1)}, tmp_path / "flux.safetensors")
    with pytest.raises(UnsupportedModel, match="ip_adapter"):
        find(str(tmp_path / "flux.safetensors"), {}, str(tiny_model))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_damaged_header_is_one_of_our_errors_or_a_model(small_file, tiny_model, data):
    """Bytes of the header changed, dropped or doubled anywhere: never another exception."""
    content = bytearray(small_file.read_bytes())
    length = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, length - 1))
        content[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    target = small_file.with_name("damaged.safetensors")
    target.write_bytes(content)
    try:
        find(str(target), {}, str(tiny_model))
    except AutofluxError as error:
        assert error.message  # noqa: PT017 — either outcome is right


@pytest.fixture(scope="module")
def small_file(bfl, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("damage") / "flux.safetensors"
    save_file(bfl, target)
    return target


@given(st.sets(st.text(min_size=1, max_size=40), max_size=5))
def test_any_names_are_refused_by_our_error(names):
    with pytest.raises(UnsupportedModel):
        recognise(names, "x")
