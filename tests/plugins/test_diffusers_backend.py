"""The diffusers backend and the session over it, against diffusers' own pipeline."""

from __future__ import annotations

import gc
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from autoflux.plugins import diffusers_attention
from autoflux.plugins.diffusers_attention import RotatedAttention
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from PIL import Image
from safetensors.torch import load_file, save_file

import autoflux
from autoflux import (
    HOISTED_STEPS,
    DamagedCheckpoint,
    DoesNotFit,
    InvalidRequest,
    Order,
    Placement,
    Quality,
    Wishes,
)
from autoflux.models.request import make_requests
from autoflux.runtime import placement
from autoflux.runtime.compiling import compile_blocks
from autoflux.runtime.picture import read_request
from autoflux.runtime.residence import Residence, Visits
from tests.hardware.test_rotation import rotated
from tests.plugins.plans import STREAMED_WAYS, streamed
from tests.runtime.fakes import output_of, tiny_inputs, tiny_transformer
from tests.tiny_model import TEXT_TOKENS, write_tiny_flux

PROMPTS = ("a red circle", "two large green squares above the small yellow star")


@pytest.fixture(scope="module")
def session(tiny_model: Path):
    with autoflux.load(str(tiny_model), wishes=Wishes(device="cpu")) as opened:
        yield opened


def reference(folder: Path, prompt: str, seed: int, steps: int, width: int = 64, height: int = 64) -> np.ndarray:
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = pipe(
        prompt,
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance_scale=3.5,
        generator=generator,
        max_sequence_length=TEXT_TOKENS,
    )
    return np.asarray(drawn.images[0])


@pytest.mark.parametrize(("width", "height", "steps"), [(64, 64, 3), (96, 48, 1), (128, 128, 5)])
def test_pictures_are_those_of_diffusers_pixel_for_pixel(session, tiny_model, width, height, steps):
    for seed, prompt in enumerate(PROMPTS):
        (picture,) = session.generate(prompt, seed=seed, steps=steps, width=width, height=height)
        assert np.array_equal(np.asarray(picture.image), reference(tiny_model, prompt, seed, steps, width, height))


def test_positions_are_computed_once_for_each_size(session, tiny_model):
    computed = []
    embed = session.pipeline._positions.embed
    hook = embed.register_forward_hook(lambda _module, given, _made: computed.append(len(given[0])))
    # As many tokens lying in another shape; then the first size again.
    for width, height in ((64, 128), (128, 64), (64, 128)):
        (picture,) = session.generate(PROMPTS[0], seed=1, steps=3, width=width, height=height)
        assert np.array_equal(np.asarray(picture.image), reference(tiny_model, PROMPTS[0], 1, 3, width, height))
    hook.remove()
    assert computed == [TEXT_TOKENS + 32] * 3


@pytest.mark.parametrize("by_kernel", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_is_diffusers_to_the_bit(dtype, by_kernel, monkeypatch):
    if by_kernel:
        monkeypatch.setattr(diffusers_attention, "rotates", lambda _x: True)
        monkeypatch.setattr(diffusers_attention, "rotate", rotated)
    ours, theirs = tiny_transformer(dtype=dtype), tiny_transformer(dtype=dtype)
    RotatedAttention.placed_in(ours)
    assert {type(made) for made in ours.attn_processors.values()} == {RotatedAttention}
    assert {type(made) for made in theirs.attn_processors.values()} == {FluxAttnProcessor}
    for batch in (1, 3):
        given = tiny_inputs(batch, dtype=dtype)
        assert torch.equal(output_of(ours, **given), output_of(theirs, **given))


def test_attention_is_compiled_without_leaving_the_graph():
    torch.compiler.reset()
    model, given = tiny_transformer(), tiny_inputs()
    wanted = output_of(model, **given)
    RotatedAttention.placed_in(model)
    undo = compile_blocks([*model.transformer_blocks, *model.single_transformer_blocks], backend="eager")
    assert torch.equal(output_of(model, **given), wanted)
    undo()
    torch.compiler.reset()


def test_what_torch_keeps_is_given_back_when_the_size_changes_and_after_a_decode_that_left_much(session, monkeypatch):
    given_back, after_decodes = [], []
    monkeypatch.setattr(placement, "give_back_unused", lambda: given_back.append(len(drawn)))
    monkeypatch.setattr(placement, "give_back_much_unused", lambda *given: after_decodes.append((given[0], len(drawn))))
    drawn = []
    for width, height in ((64, 96), (64, 96), (96, 64), (64, 96)):
        drawn += session.generate(PROMPTS[0], seed=1, steps=1, width=width, height=height)
    assert given_back == [0, 2, 3]
    assert after_decodes == [("cpu", 0), ("cpu", 1), ("cpu", 2), ("cpu", 3)]


def test_a_model_without_guidance_is_drawn_like_diffusers_does(tmp_path):
    folder = write_tiny_flux(tmp_path / "schnell", guidance=False)
    with autoflux.load(str(folder), wishes=Wishes(device="cpu")) as session:
        (picture,) = session.generate(PROMPTS[0], seed=3, steps=2)
    assert np.array_equal(np.asarray(picture.image), reference(folder, PROMPTS[0], 3, 2))


def test_a_dynamic_shift_is_followed(tiny_copy):
    config = tiny_copy / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dynamic_shifting": True, "shift": 3.0}))
    with autoflux.load(str(tiny_copy), wishes=Wishes(device="cpu")) as session:
        (picture,) = session.generate(PROMPTS[0], seed=3, steps=4)
    assert np.array_equal(np.asarray(picture.image), reference(tiny_copy, PROMPTS[0], 3, 4))


def test_the_same_request_gives_the_same_file(session):
    first, second = (session.generate(PROMPTS[0], seed=5)[0].png() for _ in range(2))
    assert first == second
    assert session.generate(PROMPTS[0], seed=6)[0].png() != first


def test_alone_or_in_company_a_picture_is_the_same_within_one_level(session):
    together = session.generate(PROMPTS[0], seed=20, steps=3, count=5)
    for picture in together:
        alone = session.generate(PROMPTS[0], seed=picture.request.seed, steps=3)[0]
        difference = np.asarray(alone.image).astype(int) - np.asarray(picture.image)
        assert np.abs(difference).max() <= 1


def test_pictures_of_different_prompts_steps_and_progress_share_a_step(session):
    orders = [(PROMPTS[0], 4), (PROMPTS[1], 2)]
    requests = [
        autoflux.Request(prompt=p, seed=9, steps=steps, guidance=3.5, width=64, height=64) for p, steps in orders
    ]
    late, early = session.begin(requests[1]), session.begin(requests[0])
    session.advance([early])
    session.advance([early, late])
    session.advance([early, late])
    session.advance([early])
    assert early.finished
    assert late.finished
    mixed = session.finish([early, late])
    for picture, request in zip(mixed, requests, strict=True):
        alone = session.draw([request])[0]
        assert np.abs(np.asarray(alone.image).astype(int) - np.asarray(picture.image)).max() <= 1


def test_mixed_sizes_come_back_in_the_order_asked(session):
    sizes = [(64, 64), (96, 64), (64, 64), (64, 96)]
    requests = [
        autoflux.Request(prompt="x", seed=i, steps=1 + i % 2, guidance=3.5, width=w, height=h)
        for i, (w, h) in enumerate(sizes)
    ]
    seen: list[tuple[int, int]] = []
    pictures = session.draw(requests, on_step=lambda done, total: seen.append((done, total)))
    assert [p.image.size for p in pictures] == sizes
    assert [p.request for p in pictures] == requests
    assert seen[-1] == (6, 6)
    assert sorted(seen) == seen


def test_the_file_says_how_to_draw_it_again(session):
    (picture,) = session.generate('a "red" circle:\nbig, round', seed=5)
    png = picture.png()
    assert read_request(png) == picture.request
    with Image.open(io.BytesIO(png)) as image:
        prompt, _, last = image.info["parameters"].rpartition("\n")
        assert prompt == picture.request.prompt
        assert last.startswith("Steps: 2, Sampler: Euler")
        assert "Size: 64x64" in last
        assert "/" not in image.info["autoflux"].replace("\\/", "")
    assert read_request(_plain_png()) is None


def test_what_the_token_limit_cut_off_is_told(session):
    (picture,) = session.generate("a red circle " * 30, seed=5)
    assert "did not read" in picture.warnings[0]
    assert "circle" in picture.warnings[0]
    assert session.generate("a red circle", seed=5)[0].warnings == ()


def test_bad_requests_and_sizes_leave_the_session_usable(session):
    before = session.generate(PROMPTS[0], seed=1)[0].png()
    with pytest.raises(InvalidRequest):
        session.generate("")
    with pytest.raises(InvalidRequest):
        session.generate(PROMPTS[0], width=65)
    small = session.plan.replace(ram_limit_bytes=session.plan.priors.host_bytes + 10**6)
    with pytest.raises(DoesNotFit):
        autoflux.Session(session.pipeline, small, session.model).generate(PROMPTS[0])
    assert session.generate(PROMPTS[0], seed=1)[0].png() == before


def test_block_lists_are_the_transformer_s(session):
    lists = session.pipeline.block_lists()
    assert {name: len(blocks) for name, blocks in lists.items()} == {
        "transformer_blocks": 2,
        "single_transformer_blocks": 3,
    }


def _drop_tensor(file: Path) -> None:
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[3])
    save_file(tensors, file)


def _reshape_tensor(file: Path) -> None:
    tensors = load_file(file)
    name = max(tensors, key=lambda n: tensors[n].numel())
    tensors[name] = tensors[name].flatten()[:-1].clone()
    save_file(tensors, file)


@pytest.mark.parametrize("damage", [_drop_tensor, _reshape_tensor])
@pytest.mark.parametrize(
    "file",
    [
        "text_encoder/model",
        "text_encoder_2/model",
        "transformer/diffusion_pytorch_model",
        "vae/diffusion_pytorch_model",
    ],
)
def test_weights_that_do_not_fit_their_configuration_are_refused(tiny_copy, file, damage):
    damage(tiny_copy / f"{file}.safetensors")
    with pytest.raises(DamagedCheckpoint, match="cannot be loaded"):
        autoflux.load(str(tiny_copy), wishes=Wishes(device="cpu"))


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("tokenizer/tokenizer.json", "model", {}),
        ("tokenizer_2/tokenizer.json", "pre_tokenizer", {"type": "none"}),
        ("text_encoder/config.json", "layer_norm_eps", "x"),
    ],
)
def test_what_only_loading_finds_out_is_named_with_its_folder(tiny_copy, file, key, value):
    place = tiny_copy / file
    place.write_text(json.dumps(json.loads(place.read_text()) | {key: value}))
    with pytest.raises(DamagedCheckpoint, match=f"{place.parent.name}' cannot be loaded"):
        autoflux.load(str(tiny_copy), wishes=Wishes(device="cpu"))


@pytest.mark.parametrize("content", [None, {}, {"model_max_length": 10**6}], ids=str)
def test_a_tokenizer_that_knows_no_limit_has_that_of_the_encoder(session, tiny_copy, content):
    settings = tiny_copy / "tokenizer" / "tokenizer_config.json"
    settings.unlink()
    if content is not None:
        settings.write_text(json.dumps(content))
    prompt = " ".join(PROMPTS * 20)
    (wanted,) = session.generate(prompt, seed=3, steps=1)
    with autoflux.load(str(tiny_copy), wishes=Wishes(device="cpu")) as opened:
        (picture,) = opened.generate(prompt, seed=3, steps=1)
    assert np.array_equal(np.asarray(picture.image), np.asarray(wanted.image))


def test_a_visiting_component_keeps_its_weights_in_ram():
    layer = torch.nn.Linear(4, 4)
    home, expected = layer.weight.data_ptr(), layer(torch.ones(4))
    residence = Residence(layer, Placement.VISITING, torch.device("cpu"))
    with residence.on_device() as module:
        assert torch.equal(module(torch.ones(4)), expected)
    with pytest.raises(RuntimeError, match="inside"), residence.on_device():
        raise RuntimeError("inside")
    assert layer.weight.data_ptr() == home


def test_a_visiting_component_lingers_until_another_has_its_turn():
    visits, cpu = Visits(), torch.device("cpu")
    layer, other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    lingers = Residence(layer, Placement.VISITING, cpu, visits=visits, lingers=True)
    visitor = Residence(other, Placement.VISITING, cpu, visits=visits)
    stays = Residence(torch.nn.Linear(4, 4), Placement.DEVICE, cpu, visits=visits)
    for turn in (visitor, stays):
        for _ in range(3):
            with lingers.on_device():
                pass
            assert visits.lingering is lingers
        with turn.on_device():
            assert visits.lingering is None
    with lingers.on_device():
        pass
    with pytest.raises(RuntimeError, match="inside"), lingers.on_device():
        raise RuntimeError("inside")
    with visitor.on_device():
        assert visits.lingering is None


@pytest.mark.gpu
def test_a_lingering_component_is_copied_once_for_all_its_turns():
    layer, visits, card = torch.nn.Linear(4, 4), Visits(), torch.device("cuda")
    lingers = Residence(layer, Placement.VISITING, card, visits=visits, lingers=True)
    places = []
    for _ in range(3):
        with lingers.on_device() as module:
            places.append(module.weight.data_ptr())
    assert len(set(places)) == 1
    assert layer.weight.is_cuda
    with Residence(torch.nn.Linear(4, 4), Placement.VISITING, card, visits=visits).on_device():
        assert not layer.weight.is_cuda


def test_modulation_of_a_picture_is_let_go_before_it_is_decoded(session, tiny_model, monkeypatch):
    with autoflux.load(str(tiny_model), plan=streamed(session.plan, hoist=True)) as under_engine:
        pipeline: Any = under_engine.pipeline
        (request,) = make_requests(under_engine.model, Order(prompt=PROMPTS[0], seed=1, steps=2))
        drawing = under_engine.begin(request)
        under_engine.advance([drawing])
        assert drawing.state.modulation is not None
        under_engine.advance([drawing])
        held: list[Any] = []
        decode = pipeline._decode
        monkeypatch.setattr(pipeline, "_decode", lambda state: (held.append(state.modulation), decode(state))[1])
        (picture,) = under_engine.finish([drawing])
    assert held == [None]
    (expected,) = session.draw([request])
    assert np.array_equal(np.asarray(picture.image), np.asarray(expected.image))


@pytest.mark.parametrize("resident", [(), (0, 3), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize(("waiting", "hoist", "keep"), STREAMED_WAYS)
def test_streamed_pictures_are_the_same_to_the_bit(session, tiny_model, resident, waiting, hoist, keep):
    plan = streamed(session.plan, resident=resident, waiting=waiting, hoist=hoist, keep=keep)
    with autoflux.load(str(tiny_model), plan=plan) as under_engine:
        for seed, prompt in enumerate(PROMPTS):
            for steps in (1, HOISTED_STEPS + 2):
                (expected,) = session.generate(prompt, seed=seed, steps=steps)
                (picture,) = under_engine.generate(prompt, seed=seed, steps=steps)
                assert np.array_equal(np.asarray(picture.image), np.asarray(expected.image))
        # States of different prompts at different steps in one pass; hoisted rows are those of single pictures.
        orders = [Order(prompt=prompt, seed=1, steps=steps) for prompt, steps in zip(PROMPTS, (4, 2), strict=True)]
        requests = [request for order in orders for request in make_requests(session.model, order)]
        for picture, expected in zip(under_engine.draw(requests), session.draw(requests), strict=True):
            assert np.abs(np.asarray(picture.image).astype(int) - np.asarray(expected.image)).max() <= 1


def test_modulation_of_a_batch_passes_through_the_device_once_and_of_those_that_join_later_once_more(
    session, tiny_model, monkeypatch
):
    with autoflux.load(str(tiny_model), plan=streamed(session.plan)) as under_engine:
        passes: list[int] = []
        residences = under_engine.pipeline._residences
        computed = residences.modulation

        def noted(embeddings):
            passes.append(len(embeddings))
            return computed(embeddings)

        monkeypatch.setattr(residences, "modulation", noted)
        orders = [Order(prompt=prompt, seed=1, steps=steps) for prompt, steps in zip(PROMPTS, (4, 2), strict=True)]
        first, second = (under_engine.begin(*make_requests(session.model, order)) for order in orders)
        third = under_engine.begin(*make_requests(session.model, orders[1].replace(seed=3)))
        under_engine.advance([first, second])
        assert passes == [4 + 2]
        under_engine.advance([first, second, third])
        assert passes == [4 + 2, 2]
        under_engine.advance([first, third])
        under_engine.advance([first])
        assert passes == [4 + 2, 2]
        assert all(drawing.finished for drawing in (first, second, third))
        (alone,) = under_engine.generate(PROMPTS[1], seed=3, steps=2)
        (together,) = under_engine.finish([third])
        assert np.abs(np.asarray(together.image).astype(int) - np.asarray(alone.image)).max() <= 1


@pytest.mark.parametrize(("precision", "side_by_side"), [("bfloat16", True), ("float32", False)])
def test_a_processor_decodes_bfloat16_with_channels_side_by_side(monkeypatch, tiny_model, precision, side_by_side):
    """The other way takes it 14 times as long; in float32 pictures are those of diffusers, to the bit."""
    decoded = []
    wishes = Wishes(device="cpu", precision=autoflux.Precision(precision))
    with autoflux.load(str(tiny_model), wishes=wishes) as opened:
        vae = opened.pipeline._pipe.vae
        decode = vae.decode

        def watched(latents, **more):
            decoded.append(latents.is_contiguous(memory_format=torch.channels_last))
            return decode(latents, **more)

        monkeypatch.setattr(vae, "decode", watched)
        opened.generate(PROMPTS[0], seed=1, steps=1)
    assert decoded == [side_by_side]


def test_what_a_failed_decode_left_parked_is_back_for_the_next_picture(session, tiny_model):
    (expected,) = session.generate(PROMPTS[0], seed=1, steps=2)
    with autoflux.load(str(tiny_model), plan=streamed(session.plan)) as under_engine:
        under_engine.pipeline._residences._arena.park()
        (picture,) = under_engine.generate(PROMPTS[0], seed=1, steps=2)
    assert np.array_equal(np.asarray(picture.image), np.asarray(expected.image))


@pytest.mark.gpu
@pytest.mark.parametrize("offload", list(autoflux.Offload))
def test_on_a_card_every_offload_draws_the_same_picture_in_less_memory(tiny_model, offload):
    # Graphs would keep the memory that blocks compute in.
    wishes = Wishes(device="cuda", offload=offload, quality=Quality.EXACT, graphs=False)
    square = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
    torch.mm(square, square)  # cuBLAS takes the workspace that it keeps
    gc.collect()  # what other tests have left is not to go meanwhile
    before = torch.cuda.memory_allocated()
    with autoflux.load(str(tiny_model), wishes=wishes) as opened:
        idle = torch.cuda.memory_allocated() - before
        first, again = (opened.generate(PROMPTS[0], seed=5, steps=3)[0].png() for _ in range(2))
        assert first == again
        assert torch.cuda.memory_allocated() - before <= idle + 2**20
        weights = sum(c.bytes_as(autoflux.Precision.BFLOAT16) for c in opened.model.components)
        # A card that holds everything keeps all blocks when it streams, and the ring beside them.
        waits = offload in (autoflux.Offload.COMPONENT, autoflux.Offload.NATIVE)
        assert idle < weights / 10 if waits else idle >= weights / 2
    with autoflux.load(str(tiny_model), wishes=wishes.replace(offload=autoflux.Offload.NONE)) as resident:
        assert resident.generate(PROMPTS[0], seed=5, steps=3)[0].png() == first


def _plain_png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "png")
    return file.getvalue()
