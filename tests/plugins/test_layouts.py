"""Every layout draws what the diffusers folder draws that it was made from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import autoflux
from autoflux import Family, Layout, Offload, Placement, UnsupportedModel, Waiting, Wishes
from autoflux.models.finding import find
from autoflux.models.inventory import COMPONENTS
from autoflux.models.values import Model
from tests.layouts import join_tensors, to_all_in_one, to_bfl, write_gguf
from tests.tiny_model import TRANSFORMER, write_tiny_flux

FLOAT8 = torch.float8_e4m3fn
PROMPT = "a red circle"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def _file(folder: Path, part: str) -> Path:
    return folder / part / (WEIGHTS if part in ("transformer", "vae") else "model.safetensors")


def weights(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {part: load_file(_file(folder, part)) for part in COMPONENTS}


def replace_weights(folder: Path, part: str, changed: dict[str, torch.Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in changed.items()}, _file(folder, part))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A diffusers folder in bfloat16."""
    made = write_tiny_flux(tmp_path_factory.mktemp("layouts") / "folder", seed=3)
    for part, held in weights(made).items():
        replace_weights(made, part, {name: tensor.bfloat16() for name, tensor in held.items()})
    return made


def picture(model: Path, base: Path | None = None, **wishes: object) -> np.ndarray:
    wanted = Wishes(device="cpu", **wishes)
    with autoflux.load(str(model), base=base and str(base), wishes=wanted) as session:
        return np.asarray(session.generate(PROMPT, seed=5, steps=2)[0].image)


def stock(model: Path, base: Path | None = None) -> Model:
    return find(str(model), {}, base and str(base))


def stored(tensors: dict[str, torch.Tensor], file: Path, **metadata: str) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata or None)
    return file


def counts(model: Model) -> list:
    return [(c.name, c.block_lists, c.rest, c.disk_precision, c.formats, c.class_name) for c in model.components]


@pytest.fixture(scope="module")
def drawn(folder) -> np.ndarray:
    return picture(folder)


def write_bfl(folder: Path, file: Path) -> Path:
    return stored(to_bfl(weights(folder)["transformer"], join_tensors), file)


def write_diffusers_file(folder: Path, file: Path) -> Path:
    return stored(weights(folder)["transformer"], file)


def write_all_in_one(folder: Path, file: Path) -> Path:
    return stored(to_all_in_one(weights(folder), join_tensors, lambda w: w[..., None, None]), file)


def write_bfl_gguf(folder: Path, file: Path) -> Path:
    held = to_bfl(weights(folder)["transformer"], join_tensors)
    arrays = {name: tensor.float().numpy() for name, tensor in held.items()}
    return write_gguf(file, arrays, lambda _name, _array: gguf.GGMLQuantizationType.BF16)


@pytest.mark.parametrize(
    ("write", "layout"),
    [
        (write_bfl, Layout.TRANSFORMER_FILE),
        (write_diffusers_file, Layout.TRANSFORMER_FILE),
        (write_all_in_one, Layout.ALL_IN_ONE),
        (write_bfl_gguf, Layout.GGUF),
    ],
)
def test_a_bfloat16_file_draws_the_same_picture_and_counts_the_same(folder, drawn, tmp_path, write, layout):
    # The name says nothing: recognised is what the header says.
    file = write(folder, tmp_path / "weights.data")
    model = stock(file, folder)
    assert model.layout == layout
    assert counts(model) == counts(stock(folder))
    assert model.architecture == stock(folder).architecture
    assert model.family == Family.DEV_LIKE
    assert Model.from_json(model.to_json()) == model
    assert np.array_equal(picture(file, folder), drawn)


@pytest.mark.parametrize("write", [write_bfl, write_diffusers_file])
def test_diffsynth_draws_the_same_from_a_file_as_from_a_folder(folder, tmp_path, write):
    """The file does not say how rotary embeddings are split; the base does, and theirs is not that of FLUX.1."""
    pytest.importorskip("diffsynth")
    wanted = picture(folder, backend="diffsynth")
    assert np.array_equal(picture(write(folder, tmp_path / "flux.safetensors"), folder, backend="diffsynth"), wanted)


@pytest.mark.parametrize("write", [write_bfl, write_all_in_one, write_bfl_gguf])
@pytest.mark.parametrize("waiting", [Waiting.PINNED, Waiting.DISK])
def test_streamed_from_a_file_it_draws_the_same(folder, drawn, tmp_path, write, waiting):
    file = write(folder, tmp_path / "model.safetensors")
    model = stock(file, folder)
    with autoflux.load(str(folder), wishes=Wishes(device="cpu")) as session:
        plan = session.plan
    parts = tuple(c.replace(placement=Placement.STREAMED, waiting=waiting) for c in plan.components)
    plan = plan.replace(
        model_path=model.path,
        model_revision=model.revision,
        offload=Offload.STREAM,
        components=parts,
        ring_bytes=400_000,
    )
    with autoflux.load(str(file), base=str(folder), plan=plan) as session:
        assert np.array_equal(np.asarray(session.generate(PROMPT, seed=5, steps=2)[0].image), drawn)


def _float8(tensors: dict[str, torch.Tensor], scales: str | None, *, rows: bool = False) -> dict[str, torch.Tensor]:
    """Matrices in float8, each with its scale if `scales` names it, as ComfyUI writes them."""
    found = {}
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or not name.endswith("weight"):
            found[name] = tensor
        elif scales is None:
            found[name] = tensor.to(FLOAT8)
        else:
            largest = tensor.float().abs().amax(dim=1, keepdim=True) if rows else tensor.float().abs().max()
            scale = largest / 448
            found[name] = (tensor.float() / scale).to(FLOAT8)
            found[name.replace(".weight", f".{scales}")] = scale
    return found


def _widened(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What float8 tensors with scales stand for, in float32."""
    found = {}
    for name, tensor in tensors.items():
        scale = next(
            (tensors[key] for end in ("scale_weight", "weight_scale") if (key := name.replace("weight", end)) in tensors
             and name.endswith("weight")),
            None,
        )  # fmt: skip
        if tensor.dtype == FLOAT8:
            found[name] = tensor.float() * (1.0 if scale is None else scale)
        elif not name.endswith(("scale_weight", "weight_scale")):
            found[name] = tensor.float()
    return found


@pytest.mark.parametrize(
    ("scales", "rows"), [(None, False), ("scale_weight", False), ("weight_scale", False), ("weight_scale", True)]
)
def test_float8_draws_what_its_numbers_times_their_scales_draw(folder, tmp_path, scales, rows):
    narrow = _float8(to_bfl(weights(folder)["transformer"], join_tensors), scales, rows=rows)
    file = stored(
        narrow | ({"scaled_fp8": torch.zeros(2, dtype=FLOAT8)} if scales else {}), tmp_path / "flux.safetensors"
    )
    # The same numbers, widened, in a file of float32: that layout was compared with the folder above.
    wide = stored(_widened(narrow), tmp_path / "wide.safetensors")
    model = stock(file, folder)
    transformer = model.component("transformer")
    assert transformer.disk_precision == autoflux.Precision.FLOAT8
    assert transformer.scaled == bool(scales)
    assert transformer.parameter_count == stock(folder).component("transformer").parameter_count
    expected = picture(wide, folder)
    assert np.array_equal(picture(file, folder), expected)


def test_an_all_in_one_in_float8_is_widened_in_every_part(folder, tmp_path):
    whole = to_all_in_one(weights(folder), join_tensors, lambda w: w[..., None, None])
    narrow = _float8({k: w for k, w in whole.items() if not k.startswith("vae.")}, "scale_weight")
    narrow |= {k: w for k, w in whole.items() if k.startswith("vae.")}
    marks = {f"{part}.scaled_fp8": torch.zeros(0, dtype=FLOAT8) for part in ("model.diffusion_model",)}
    marks["text_encoders.t5xxl.logit_scale"] = torch.ones(())
    file = stored(narrow | marks, tmp_path / "flux-fp8.safetensors")
    wide = stored(_widened(narrow), tmp_path / "wide.safetensors")
    assert all(c.scaled == (c.name != "vae") for c in stock(file, folder).components)
    assert np.array_equal(picture(file, folder), picture(wide, folder))


def test_a_quantized_gguf_draws_what_its_own_library_widens_it_to(tmp_path):
    folder = write_wide_flux(tmp_path / "wide")
    held = to_bfl(weights(folder)["transformer"], join_tensors)
    arrays = {name: tensor.float().numpy() for name, tensor in held.items()}
    kinds = {"linear1": "Q8_0", "linear2": "Q5_1", "qkv": "Q4_0", "mlp": "Q4_1", "proj": "Q5_0", "txt_in": "F16"}

    def kind(name: str, array: np.ndarray) -> gguf.GGMLQuantizationType:
        found = next((form for part, form in kinds.items() if part in name), "F32")
        return gguf.GGMLQuantizationType[found if array.ndim == 2 and array.shape[1] % 32 == 0 else "F32"]

    file = write_gguf(tmp_path / "flux.gguf", arrays, kind)
    reader = gguf.GGUFReader(str(file))
    widened = {
        t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type).reshape(arrays[t.name].shape))
        for t in reader.tensors
    }
    wide = stored(widened, tmp_path / "widened.safetensors")
    assert set(stock(file, folder).component("transformer").formats) >= {"Q8_0", "Q5_1", "Q4_0", "Q4_1", "Q5_0", "F32"}
    assert np.array_equal(picture(file, folder), picture(wide, folder))


def write_wide_flux(folder: Path) -> Path:
    """A tiny FLUX of hidden size 64, whose rows are whole blocks of GGUF."""
    write_tiny_flux(folder)
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    sizes = TRANSFORMER | {"attention_head_dim": 32, "axes_dims_rope": (8, 12, 12), "guidance_embeds": True}
    FluxTransformer2DModel(**sizes).save_pretrained(folder / "transformer")
    return folder


def test_a_file_beside_the_folders_of_its_repository_needs_no_base(folder, drawn, tmp_path):
    link = tmp_path / "repository"
    link.mkdir()
    for part in folder.iterdir():
        (link / part.name).symlink_to(part)
    file = write_bfl(folder, link / "flux1-dev.safetensors")
    assert stock(file).base_path == str(link.resolve())
    assert np.array_equal(picture(file), drawn)


def test_the_base_is_found_in_the_cache_of_a_hub(folder, drawn, tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--black-forest-labs--FLUX.1-dev" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(folder)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "none"))
    (tmp_path / "elsewhere").mkdir()
    file = write_bfl(folder, tmp_path / "elsewhere" / "majicflus.safetensors")
    assert np.array_equal(picture(file), drawn)
    assert np.array_equal(picture(file, Path("flux.1-dev")), drawn)
    named = find("flux.1-dev", {})
    assert (named.family, named.layout, named.name) == (Family.DEV, Layout.FOLDER, "flux.1-dev")


def test_a_transformer_without_guidance_gets_the_scheduler_of_its_family(tmp_path):
    schnell = write_tiny_flux(tmp_path / "schnell", guidance=False)
    dev = Path(shutil.copytree(schnell, tmp_path / "dev"))
    changes = {
        "scheduler/scheduler_config.json": {"use_dynamic_shifting": True, "shift": 3.0},
        "transformer/config.json": {"guidance_embeds": True},
    }
    for name, changed in changes.items():
        (dev / name).write_text(json.dumps(json.loads((dev / name).read_text()) | changed))
    file = write_bfl(schnell, tmp_path / "schnell.safetensors")
    model = stock(file, dev)
    assert model.family == Family.SCHNELL
    assert not model.scheduler["use_dynamic_shifting"]
    assert np.array_equal(picture(file, dev), picture(file, schnell))


def test_fill_is_recognised_and_says_that_it_cannot_draw_from_a_prompt(folder, tmp_path):
    held = weights(folder)["transformer"]
    held["x_embedder.weight"] = torch.zeros(held["x_embedder.weight"].shape[0], 384, dtype=torch.bfloat16)
    file = stored(to_bfl(held, join_tensors), tmp_path / "fill.safetensors")
    assert stock(file, folder).family == Family.FILL
    with pytest.raises(UnsupportedModel, match="fills in parts"):
        picture(file, folder)


@pytest.mark.parametrize(
    ("metadata", "family"),
    [
        ({"modelspec.architecture": "Flux.1-Krea-dev"}, Family.KREA),
        ({"modelspec.title": "flux-1-kontext-dev"}, Family.KONTEXT),
        ({"modelspec.architecture": "flux-1-dev"}, Family.DEV),
        ({"modelspec.title": "my flux"}, Family.DEV_LIKE),
        ({}, Family.DEV_LIKE),
    ],
)
def test_dev_and_its_kin_are_told_apart_by_what_the_file_says(folder, tmp_path, metadata, family):
    held = to_bfl(weights(folder)["transformer"], join_tensors)
    assert stock(stored(held, tmp_path / "a.safetensors", **metadata), folder).family == family


def test_the_class_in_the_index_tells_kontext(tiny_copy):
    index = tiny_copy / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "FluxKontextPipeline"}))
    assert stock(tiny_copy).family == Family.KONTEXT


def test_a_folder_in_the_cache_of_a_hub_tells_which_it_is(tiny_copy, tmp_path):
    for place, family in (
        ("models--black-forest-labs--FLUX.1-Krea-dev/snapshots/abc", Family.KREA),
        ("AI-ModelScope/FLUX___1-dev", Family.DEV),
        ("FLUX.1-dev", Family.DEV_LIKE),
    ):
        folder = tmp_path / place
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(tiny_copy, folder)
        assert stock(folder).family == family


def test_scales_in_a_diffusers_folder_are_used(folder, tmp_path):
    narrow = _float8(weights(folder)["transformer"], "weight_scale")
    scaled, wide = (Path(shutil.copytree(folder, tmp_path / name)) for name in ("scaled", "wide"))
    replace_weights(scaled, "transformer", narrow)
    replace_weights(wide, "transformer", _widened(narrow))
    assert np.abs(picture(scaled).astype(int) - picture(wide)).max() <= 1


def test_a_folder_quantized_by_a_library_is_refused(tiny_copy):
    config = tiny_copy / "transformer" / "config.json"
    changed = json.loads(config.read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    config.write_text(json.dumps(changed))
    with pytest.raises(UnsupportedModel, match="bitsandbytes"):
        stock(tiny_copy)
