"""The backend on DiffSynth against the one on diffusers: same weights, same noise, same pictures."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import autoflux
from autoflux import (
    HOISTED_STEPS,
    DamagedCheckpoint,
    MissingExtra,
    Offload,
    Order,
    PluginFailure,
    Precision,
    UnsupportedModel,
    Wishes,
)
from autoflux.api import find_model
from autoflux.models.request import make_requests
from autoflux.models.weights import weight_shapes
from autoflux.plugin_manager import load_plugins
from autoflux.runtime.streaming import Holding, StreamedTransformer, arena_for
from tests.hardware.test_rotation import rotated
from tests.plugins.plans import STREAMED_WAYS, streamed
from tests.runtime.fakes import CPU, hooks_of, tiny_inputs, tiny_transformer
from tests.tiny_model import TRANSFORMER, write_tiny_flux

pytest.importorskip("diffsynth", reason="needs the extra: pip install 'autoflux[diffsynth]'")

from autoflux.plugins import diffsynth_transformer
from autoflux.plugins.diffsynth_backend import INSTALL, DiffSynthBackend
from autoflux.plugins.diffsynth_pipeline import model_fn_flux_image
from autoflux.plugins.diffsynth_transformer import (
    BLOCK_LISTS,
    Conditioned,
    SizedDiT,
    Sizes,
    embedding_of,
    joined_weights,
    load_transformer,
    open_transformer,
)
from diffsynth.models.flux_dit import (
    FluxJointAttention,
    FluxJointTransformerBlock,
    FluxSingleTransformerBlock,
    RoPEEmbedding,
)

PROMPTS = ("a red circle", "two large green squares above the small yellow star")
CONFIG = {"axes_dims_rope": TRANSFORMER["axes_dims_rope"]}
WISHES = {name: Wishes(device="cpu", backend=name) for name in ("diffusers", "diffsynth")}


@pytest.fixture(scope="module")
def sessions(tiny_model: Path):
    """The same model through both backends."""
    with (
        autoflux.load(str(tiny_model), wishes=WISHES["diffusers"]) as theirs,
        autoflux.load(str(tiny_model), wishes=WISHES["diffsynth"]) as ours,
    ):
        yield theirs, ours


@pytest.fixture(scope="module")
def session(sessions):
    return sessions[1]


def pixels(picture) -> np.ndarray:
    return np.asarray(picture.image).astype(int)


def saved(folder: Path) -> Path:
    tiny_transformer().save_pretrained(folder)
    return folder


def velocity_of(dit, inputs) -> torch.Tensor:
    """DiffSynth's step function with the arguments of diffusers' forward, packed like its output."""
    batch, dtype = len(inputs["hidden_states"]), inputs["hidden_states"].dtype
    times, guidance = inputs["timestep"].to(dtype) * 1000, inputs["guidance"].to(dtype) * 1000
    with torch.no_grad():
        velocity = model_fn_flux_image(
            dit=Conditioned(dit, embedding_of(dit, times, inputs["pooled_projections"], guidance)),
            latents=dit.unpatchify(inputs["hidden_states"], 6, 8),
            timestep=times,
            prompt_emb=inputs["encoder_hidden_states"],
            pooled_prompt_emb=inputs["pooled_projections"],
            text_ids=inputs["txt_ids"].expand(batch, -1, -1),
            image_ids=inputs["img_ids"].expand(batch, -1, -1),
        )
    return dit.patchify(velocity)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_a_step_agrees_with_diffusers_up_to_rounding(tmp_path, dtype, error):
    model = tiny_transformer(dtype=dtype)
    dit, _ = load_transformer(saved(tmp_path), CONFIG, dtype)
    inputs = tiny_inputs(3, dtype=dtype)
    with torch.no_grad():
        wanted = model(**inputs)[0].float()
    found = velocity_of(dit, inputs).float()
    assert (found - wanted).norm() <= error * wanted.norm()
    assert torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) >= 0.9999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_modulate_by_the_same_bits_as_in_diffusers(tmp_path, dtype):
    """Its own sum is another one in bfloat16, and a step multiplies the difference."""
    model, (dit, _) = tiny_transformer(dtype=dtype), load_transformer(saved(tmp_path), CONFIG, dtype)
    times, guidance = torch.tensor([0.3, 999.0], dtype=dtype), torch.full((2,), 3500.0, dtype=dtype)
    pooled = tiny_inputs(2, dtype=dtype)["pooled_projections"]
    with torch.no_grad():
        wanted = model.time_text_embed(times, guidance, pooled)
        assert torch.equal(embedding_of(dit, times, pooled, guidance), wanted)
        own = dit.time_embedder(times, dtype) + dit.pooled_text_embedder(pooled)
        other = own + dit.guidance_embedder(guidance, dtype)
    assert not torch.equal(other, wanted)


def test_a_wrong_time_would_show(tmp_path):
    model, (dit, _) = tiny_transformer(), load_transformer(saved(tmp_path), CONFIG, torch.float32)
    with torch.no_grad():
        wanted = model(**tiny_inputs(2))[0]
    assert (velocity_of(dit, tiny_inputs(2, times=(0.3, 0.7))) - wanted).norm() > 1e-3 * wanted.norm()


def test_norms_are_torch_s_and_as_exact_as_diffsynth_s(tmp_path):
    from diffsynth.models.general_modules import RMSNorm

    dit, _ = load_transformer(saved(tmp_path), CONFIG, torch.bfloat16)
    norms = [module for name, module in dit.named_modules() if name.split(".")[-1].startswith(("norm_q", "norm_k"))]
    assert norms
    for norm in norms:
        assert isinstance(norm, torch.nn.RMSNorm)
        theirs = RMSNorm(*norm.weight.shape, eps=norm.eps)
        theirs.weight = norm.weight
        x = torch.randn(200, *norm.weight.shape, dtype=torch.bfloat16)
        scale = norm.weight.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + norm.eps)
        errors = [(made(x).double() - x.double() * scale).norm() for made in (norm, theirs)]
        assert errors[0] <= errors[1]


def full_size_shapes() -> dict[str, tuple[int, ...]]:
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}


def test_in_full_size_it_is_diffsynth_s_own_transformer():
    from diffsynth.models.flux_dit import FluxDiT

    sizes = Sizes.of(joined_weights(full_size_shapes()), (16, 56, 56))
    with torch.device("meta"):
        wanted, found = FluxDiT(), SizedDiT(sizes)
    told = re.sub(r"RMSNorm\(.*\)", "RMSNorm()", repr(found))  # torch's
    theirs = {
        "SizedDiT": "FluxDiT",
        "JointAttention": "FluxJointAttention",
        "SingleBlock": "FluxSingleTransformerBlock",
    }
    told = re.sub(r"\b(SizedDiT|JointAttention|SingleBlock)\b", lambda ours: theirs[ours[0]], told)
    assert told == repr(wanted)
    assert [(n, w.shape) for n, w in found.named_parameters()] == [(n, w.shape) for n, w in wanted.named_parameters()]
    assert vars(found.pos_embedder)["axes_dim"] == vars(wanted.pos_embedder)["axes_dim"]
    assert vars(found.pos_embedder)["theta"] == vars(wanted.pos_embedder)["theta"]


def test_weights_in_full_size_are_joined_as_diffsynth_s_converter_does():
    """Compared by two numbers for each row, in FLUX.1's width, which the converter knows."""
    from diffsynth.utils.state_dict_converters.flux_dit import FluxDiTStateDictConverterFromDiffusers

    shapes = full_size_shapes()
    rows = {
        name: torch.stack([torch.full((shape[0],), i), torch.arange(shape[0])], dim=1)
        for i, (name, shape) in enumerate(shapes.items())
    }
    wanted = FluxDiTStateDictConverterFromDiffusers(dict(rows))
    found = {
        name: torch.cat([rows[part.name][part.start : part.stop] for part in joined.rows])
        for name, joined in joined_weights(shapes).items()
    }
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


DOUBLE = {
    "{}_mod.lin": "norm1_{}.linear",
    "{}_attn.qkv": "attn.{}_to_qkv",
    "{}_attn.proj": "attn.{}_to_out",
    "{}_mlp.0": "ff_{}.0",
    "{}_mlp.2": "ff_{}.2",
}
SINGLE = {"linear1": "to_qkv_mlp", "linear2": "proj_out", "modulation.lin": "norm.linear"}
OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_embedder.timestep_embedder.0",
    "time_in.out_layer": "time_embedder.timestep_embedder.2",
    "guidance_in.in_layer": "guidance_embedder.timestep_embedder.0",
    "guidance_in.out_layer": "guidance_embedder.timestep_embedder.2",
    "vector_in.in_layer": "pooled_text_embedder.0",
    "vector_in.out_layer": "pooled_text_embedder.2",
    "final_layer.adaLN_modulation.1": "final_norm_out.linear",
    "final_layer.linear": "final_proj_out",
}


def in_black_forest_layout(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """DiffSynth's tensors under the names of Black Forest Labs' files."""
    names = {f"{ours}.{end}": f"{theirs}.{end}" for ours, theirs in OUTSIDE.items() for end in ("weight", "bias")}
    for i in range(2):
        for stream, letter in (("img", "a"), ("txt", "b")):
            for ours, theirs in DOUBLE.items():
                for end in ("weight", "bias"):
                    names[f"double_blocks.{i}.{ours.format(stream)}.{end}"] = (
                        f"blocks.{i}.{theirs.format(letter)}.{end}"
                    )
            for kind in "qk":
                full = {"q": "query", "k": "key"}[kind]
                names[f"double_blocks.{i}.{stream}_attn.norm.{full}_norm.scale"] = (
                    f"blocks.{i}.attn.norm_{kind}_{letter}.weight"
                )
    for i in range(3):
        for ours, theirs in SINGLE.items():
            for end in ("weight", "bias"):
                names[f"single_blocks.{i}.{ours}.{end}"] = f"single_blocks.{i}.{theirs}.{end}"
        names[f"single_blocks.{i}.norm.query_norm.scale"] = f"single_blocks.{i}.norm_q_a.weight"
        names[f"single_blocks.{i}.norm.key_norm.scale"] = f"single_blocks.{i}.norm_k_a.weight"
    assert set(names.values()) == set(state)
    return {name: state[other].contiguous() for name, other in names.items()}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_single_file_of_black_forest_labs_gives_the_same_transformer(tmp_path, prefix):
    from diffusers import FluxTransformer2DModel

    FluxTransformer2DModel(**TRANSFORMER, guidance_embeds=True).save_pretrained(tmp_path / "folder")
    dit, _ = load_transformer(tmp_path / "folder", CONFIG, torch.float32)
    state = in_black_forest_layout(dit.state_dict())
    save_file({f"{prefix}{name}": tensor for name, tensor in state.items()}, tmp_path / "flux.safetensors")
    single, _ = load_transformer(tmp_path / "flux.safetensors", CONFIG, torch.float32)
    assert single.state_dict().keys() == dit.state_dict().keys()
    assert all(torch.equal(tensor, dit.state_dict()[name]) for name, tensor in single.state_dict().items())


@pytest.mark.parametrize(("width", "height", "steps"), [(64, 64, 3), (96, 48, 1), (128, 128, 5)])
def test_pictures_are_those_of_the_other_backend(sessions, width, height, steps):
    theirs, ours = sessions
    for seed, prompt in enumerate(PROMPTS):
        given = {"seed": seed, "steps": steps, "width": width, "height": height}
        (wanted,), (found,) = theirs.generate(prompt, **given), ours.generate(prompt, **given)
        assert np.abs(pixels(found) - pixels(wanted)).max() <= 1
        assert pixels(found).std() > 1
        assert found.request == wanted.request


def test_a_model_without_guidance_is_drawn_the_same(tmp_path):
    folder = write_tiny_flux(tmp_path / "schnell", guidance=False)
    drawn = []
    for wishes in WISHES.values():
        with autoflux.load(str(folder), wishes=wishes) as session:
            drawn.append(pixels(session.generate(PROMPTS[0], seed=3, steps=2)[0]))
    assert np.abs(drawn[0] - drawn[1]).max() <= 1


def test_states_at_different_timesteps_share_a_step(session):
    orders = [Order(prompt=prompt, seed=9, steps=steps) for prompt, steps in zip(PROMPTS, (4, 2), strict=True)]
    requests = [request for order in orders for request in make_requests(session.model, order)]
    early, late = (session.begin(request) for request in requests)
    session.advance([early])
    session.advance([early, late])
    session.advance([early, late])
    session.advance([early])
    for picture, request in zip(session.finish([early, late]), requests, strict=True):
        assert np.abs(pixels(session.draw([request])[0]) - pixels(picture)).max() <= 1


def test_block_lists_are_diffsynth_s(session):
    lists = session.pipeline.block_lists()
    assert {name: len(blocks) for name, blocks in lists.items()} == {"blocks": 2, "single_blocks": 3}
    kinds = {"blocks": FluxJointTransformerBlock, "single_blocks": FluxSingleTransformerBlock}
    assert all(isinstance(block, kinds[name]) for name, blocks in lists.items() for block in blocks)


@pytest.mark.parametrize("by_kernel", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rotary_positions_are_diffsynth_s_to_the_bit(session, dtype, by_kernel, monkeypatch):
    if by_kernel:
        monkeypatch.setattr(diffsynth_transformer, "rotates", lambda _x: True)
        monkeypatch.setattr(diffsynth_transformer, "rotate", rotated)
    dit = session.pipeline.block_lists()
    block, attention = dit["single_blocks"][0], dit["blocks"][0].attn
    matrices = RoPEEmbedding(32, 10000, [4, 6, 6])(torch.randint(0, 50, (1, 9, 3)))
    query, key = torch.randn(2, 2, 3, 9, 16).to(dtype)
    for ours, theirs in ((block, FluxSingleTransformerBlock), (attention, FluxJointAttention)):
        assert type(ours) is not theirs
        wanted = theirs.apply_rope(ours, query, key, matrices)
        for found, expected in zip(ours.apply_rope(query, key, matrices), wanted, strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("resident", [(), (0, 3), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize(("waiting", "hoist", "keep"), STREAMED_WAYS)
def test_streamed_pictures_are_the_same_to_the_bit(session, tiny_model, resident, waiting, hoist, keep):
    plan = streamed(session.plan, resident=resident, waiting=waiting, hoist=hoist, keep=keep)
    with autoflux.load(str(tiny_model), plan=plan) as under_engine:
        for seed, prompt in enumerate(PROMPTS):
            for steps in (1, HOISTED_STEPS + 2):
                (expected,) = session.generate(prompt, seed=seed, steps=steps)
                (picture,) = under_engine.generate(prompt, seed=seed, steps=steps)
                assert np.array_equal(pixels(picture), pixels(expected))


@pytest.mark.parametrize("storage", [Precision.FLOAT8, Precision.INT8])
def test_streamed_in_eight_bits_pictures_are_those_of_the_other_backend(sessions, tiny_model, storage):
    """A row has a scale of its own, so it does not matter whose rows a weight is joined of."""
    drawn = []
    for session in sessions:
        plan = streamed(session.plan)
        parts = tuple(c.replace(storage=storage) if c.name == "transformer" else c for c in plan.components)
        with autoflux.load(str(tiny_model), plan=plan.replace(components=parts)) as narrow:
            drawn.append(pixels(narrow.generate(PROMPTS[0], seed=1, steps=3)[0]))
    assert np.abs(drawn[0] - drawn[1]).max() <= 1
    assert not np.array_equal(drawn[1], pixels(sessions[1].generate(PROMPTS[0], seed=1, steps=3)[0]))


@pytest.mark.gpu
@pytest.mark.parametrize("offload", list(Offload))
def test_on_a_card_every_offload_draws_the_same_picture(tiny_model, offload):
    drawn = []
    for how in (Offload.NONE, offload):
        wishes = Wishes(device="cuda", backend="diffsynth", offload=how)
        with autoflux.load(str(tiny_model), wishes=wishes) as opened:
            first, again = (pixels(opened.generate(PROMPTS[0], seed=5, steps=3)[0]) for _ in range(2))
            assert np.array_equal(first, again)
            drawn.append(first)
    assert np.array_equal(*drawn)


def test_detaching_leaves_the_transformer_as_it_was(tmp_path):
    dit, _ = load_transformer(saved(tmp_path), CONFIG, torch.float32)
    wanted = velocity_of(dit, tiny_inputs(2))

    def told():
        modules = {name: id(module) for name, module in dit.named_modules()}
        return modules, [(name, id(weight)) for name, weight in dit.state_dict(keep_vars=True).items()]

    before = told()
    prepared = StreamedTransformer(dit, BLOCK_LISTS, Holding(hoist=True), CPU)
    prepared.attach(arena_for(prepared.parts, 0, CPU))
    assert told() != before
    prepared.detach()
    assert told() == before
    assert not hooks_of(dit)
    assert torch.equal(velocity_of(dit, tiny_inputs(2)), wanted)


def test_modulation_of_all_blocks_is_taken_out(tmp_path):
    dit, _ = load_transformer(saved(tmp_path), CONFIG, torch.float32)
    prepared = StreamedTransformer(dit, BLOCK_LISTS, Holding(hoist=True), CPU)
    modulation = prepared.parts[1]
    assert [atom.name for unit in modulation.units for atom in unit.atoms] == [
        *(f"blocks.{i}.norm1_{letter}.linear" for i in range(2) for letter in "ab"),
        *(f"single_blocks.{i}.norm.linear" for i in range(3)),
    ]


def _drop(tensors):
    tensors.pop(next(name for name in tensors if name.endswith("proj_mlp.weight")))


def _narrow(tensors):
    name = next(name for name in tensors if name.endswith("attn.to_k.weight"))
    tensors[name] = tensors[name][:, :-1].contiguous()


def _shorten(tensors):
    name = next(name for name in tensors if name.endswith("attn.to_v.weight"))
    tensors[name] = tensors[name][:-1].contiguous()


def _rename(tensors):
    for name in list(tensors):
        tensors[f"unet.{name}"] = tensors.pop(name)


def _scale(tensors):
    name = next(name for name in tensors if name.endswith("attn.to_q.weight"))
    tensors[name.replace("weight", "weight_scale")] = torch.ones(1)


@pytest.mark.parametrize("damage", [_drop, _narrow, _shorten, _rename, _scale])
def test_weights_that_are_not_a_flux_transformer_s_are_refused(tiny_copy, damage):
    plan, file = _plan(tiny_copy), tiny_copy / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file)

    def load():
        model = find_model(str(tiny_copy), load_plugins(entry_points=False))
        DiffSynthBackend().build(plan, model, lambda _stage, _share: None)

    # Most are seen when stock is taken of the files; DiffSynth cannot read scales.
    with pytest.raises((DamagedCheckpoint, UnsupportedModel), match="transformer"):
        load()


def test_a_rotary_embedding_that_the_configuration_asks_for(tmp_path):
    dit, store = open_transformer(saved(tmp_path), CONFIG, torch.float32)
    store.close()
    assert dit.pos_embedder.axes_dim == [4, 6, 6]
    assert sum(json.loads((tmp_path / "config.json").read_text())["axes_dims_rope"]) == 16
    assert weight_shapes(tmp_path)["x_embedder.weight"] == (32, 64)
    with pytest.raises(ValueError, match="heads of width 16"):
        Sizes.of(joined_weights(weight_shapes(tmp_path)), (16, 56, 56))


def test_diffsynth_is_told_not_to_ask_hubs():
    from diffsynth.core import ModelConfig

    assert os.environ["DIFFSYNTH_SKIP_DOWNLOAD"] == "true"
    assert os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] == "1"
    assert not ModelConfig(model_id="black-forest-labs/FLUX.1-dev").require_downloading()


def test_without_diffsynth_the_extra_is_named(tiny_model, monkeypatch):
    assert DiffSynthBackend().missing() is None
    monkeypatch.setitem(sys.modules, "diffsynth", None)
    assert DiffSynthBackend().missing() == INSTALL
    with pytest.raises(MissingExtra) as caught:
        autoflux.load(str(tiny_model), wishes=WISHES["diffsynth"])
    assert caught.value.hint == "pip install 'autoflux[diffsynth]'"
    assert _plan(tiny_model, Wishes(device="cpu")).backend == "diffusers"


def test_what_cannot_be_imported_says_so(tiny_model, session, monkeypatch):
    monkeypatch.delitem(sys.modules, "autoflux.plugins.diffsynth_pipeline")
    monkeypatch.setitem(sys.modules, "diffsynth.pipelines.flux_image", None)
    with pytest.raises(PluginFailure, match="cannot be imported") as caught:
        DiffSynthBackend().build(session.plan, session.model, lambda _stage, _share: None)
    assert "torchvision" in caught.value.hint


def _plan(folder: Path, wishes: Wishes = WISHES["diffsynth"]):
    plugins = load_plugins(entry_points=False)
    return autoflux.api.plan_for(find_model(str(folder), plugins), wishes, plugins, autoflux.probe())
