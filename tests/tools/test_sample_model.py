"""How the sample model is made: what is drawn, what is said of it, how it is judged, and the whole training."""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tools.sample_model import networks
from tools.sample_model.average import MasterWeights, MovingAverage
from tools.sample_model.batches import Latents, Noisy, Sampler, Shape, image_positions, pack
from tools.sample_model.captions import COLOUR_WORDS, SHAPE_WORDS, caption, training_caption
from tools.sample_model.data import make_scenes
from tools.sample_model.distil import GUIDANCE, STEPS, Paths, guided_velocity
from tools.sample_model.drawing import draw, rows
from tools.sample_model.latents import _COEFFICIENTS, latents_of
from tools.sample_model.muon import orthogonal
from tools.sample_model.palette import BACKGROUNDS, COLOURS, SHAPES
from tools.sample_model.replay import Replayed, shared_pool
from tools.sample_model.scenes import Thing, are_as_usual, held_out, held_out_scene, random_scene, training_scene
from tools.sample_model.train import SETTINGS, TEXT_TOKENS, train
from tools.sample_model.train_flow import Networks, forward_of
from tools.sample_model.train_text import answers, train_text
from tools.sample_model.words import clip_tokenizer, t5_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def adherence():
    """`benchmarks/adherence.py`, which is a script and no package."""
    spec = importlib.util.spec_from_file_location("adherence", ROOT / "benchmarks" / "adherence.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["adherence"] = module
    spec.loader.exec_module(module)
    return module


def scenes(count: int, seed: int = 1):
    rng = random.Random(seed)
    return [random_scene(rng) for _ in range(count)]


def test_drawing_is_the_same_every_time_and_puts_the_colour_where_the_scene_says():
    made = scenes(40)
    pictures = draw(rows(made), 128, 128)
    assert torch.equal(pictures, draw(rows(scenes(40)), 128, 128))
    assert pictures.shape == (40, 3, 128, 128)
    assert pictures.abs().max() <= 1
    for scene, picture in zip(made, pictures, strict=True):
        for thing in scene.things:
            if thing.shape in ("ring", "crescent", "heart"):  # hollow at the point that places them, or nearly
                continue
            pixel = (picture[:, int(thing.y * 128), int(thing.x * 128)] + 1) * 127.5
            assert torch.allclose(pixel, torch.tensor(thing.rgb), atol=2), thing


def test_every_shape_colour_and_background_comes_up():
    made = scenes(600)
    assert {t.shape for s in made for t in s.things} == set(SHAPES)
    assert {t.colour for s in made for t in s.things} == set(COLOURS)
    assert {s.background.kind for s in made} == set(BACKGROUNDS)
    assert {len(s.things) for s in made} == {1, 2}


def test_a_caption_names_every_thing_in_its_colour():
    rng = random.Random(3)
    for scene in scenes(200):
        text = caption(scene, rng).lower()
        for thing in scene.things:
            assert any(word in text for word in SHAPE_WORDS[thing.shape])
            assert any(word in text for word in COLOUR_WORDS.get(thing.colour, (thing.colour,)))


def test_what_is_held_out_is_never_trained_on_and_stays_held_out():
    rng = random.Random(5)
    trained = {training_scene(rng).combination for _ in range(400)}
    kept = {held_out_scene(rng).combination for _ in range(100)}
    assert not trained & kept
    # The split goes by a hash of words, so it must not move when the code around it does.
    first = held_out_scene(random.Random(0))
    assert held_out(first)
    assert first.combination == "blue heart; orange star"


def test_where_things_are_is_left_unsaid_only_where_one_expects_them(adherence):
    rng = random.Random(9)
    unsaid = 0
    for _ in range(500):
        scene = training_scene(rng)
        text = training_caption(scene, rng)
        if adherence.PLACE_WORDS.search(text):
            continue
        unsaid += 1
        named = sorted(scene.things, key=lambda thing: first_word(thing, text.lower()))
        assert are_as_usual(tuple(named)), text
    assert unsaid > 100
    # Prompts leave out what they like.
    asked = [prompt for prompt in adherence.prompts(100) if not adherence.PLACE_WORDS.search(prompt.text)]
    assert not all(are_as_usual(prompt.scene.things) for prompt in asked)


def first_word(thing: Thing, text: str) -> int:
    """Where a caption names the thing: its colour next to its shape."""
    colours = COLOUR_WORDS.get(thing.colour, (thing.colour,))
    phrases = [f"{colour} {shape}" for colour in colours for shape in SHAPE_WORDS[thing.shape]]
    return min(text.index(phrase) for phrase in phrases if phrase in text)


def test_training_data_is_the_same_for_the_same_seed():
    first, again = (make_scenes(30, 2, seed=4) for _ in range(2))
    assert torch.equal(first.rows, again.rows)
    assert first.captions == again.captions
    assert make_scenes(30, 2, seed=5).captions != first.captions


def test_the_judge_is_right_about_drawn_scenes(adherence):
    asked = adherence.prompts(30)
    verdicts = [adherence.judge(adherence._drawn_scenes(prompt), prompt) for prompt in asked]
    assert sum(verdict.right for verdict in verdicts) >= 29
    assert all(verdict.place in (True, None) for verdict in verdicts)


def test_the_judge_does_not_take_one_picture_for_another(adherence):
    asked = adherence.prompts(16)
    wrong = [
        adherence.judge(adherence._drawn_scenes(other), prompt)
        for prompt, other in zip(asked, asked[1:] + asked[:1], strict=True)
    ]
    assert not any(verdict.right for verdict in wrong)
    nothing = np.full((256, 256, 3), 128, np.uint8)
    assert not adherence.judge(nothing, asked[0]).right


def test_any_text_has_tokens():
    captions = [caption(scene, random.Random(1)) for scene in scenes(300)]
    clip, t5 = clip_tokenizer(captions), t5_tokenizer(captions)
    for text in ("", "a red circle", "ZEBRA & Quiz!", "日本語 🙂", "x" * 500):
        ids = clip(text).input_ids
        assert (ids[0], ids[-1]) == (clip.bos_token_id, clip.eos_token_id)
        assert clip.eos_token_id not in ids[:-1]
        assert t5(text).input_ids[-1] == t5.eos_token_id
    assert len(clip("a red circle").input_ids) == 5


def test_captions_fit_the_text_tokens_that_training_keeps(tmp_path):
    captions = [caption(scene, random.Random(i)) for i, scene in enumerate(scenes(1500))]
    t5 = t5_tokenizer(captions)
    assert t5.tokenize("a Red circle, on the left") == ["▁a", "▁Red", "▁circle", ",", "▁on", "▁the", "▁left"]
    assert max(len(ids) for ids in t5(captions).input_ids) <= TEXT_TOKENS
    odd = ["ZEBRA & Quiz!", "日本語 red", ""]
    for words in (t5, clip_tokenizer(captions)):
        words.save_pretrained(tmp_path / type(words).__name__)
        again = type(words).from_pretrained(tmp_path / type(words).__name__)
        assert again(captions + odd).input_ids == words(captions + odd).input_ids
    assert t5.unk_token_id not in t5("ZEBRA & Quiz!").input_ids


def test_latents_are_packed_as_the_pipeline_packs_them():
    from diffusers import FluxPipeline

    latents = torch.randn(2, 16, 12, 8)
    assert torch.equal(pack(latents), FluxPipeline._pack_latents(latents, 2, 16, 12, 8))
    theirs = FluxPipeline._prepare_latent_image_ids(2, 6, 4, torch.device("cpu"), torch.float32)
    assert torch.equal(image_positions(latents), theirs)


def test_latents_keep_what_is_even_in_the_first_three_channels():
    picture = torch.tensor([0.5, -0.25, 0.75])[None, :, None, None].expand(1, 3, 16, 24)
    latents = latents_of(picture)
    assert latents.shape == (1, networks.LATENT_CHANNELS, 2, 3)
    assert latents[:, 3:].abs().max() < 1e-5
    brightness = 0.299 * 0.5 - 0.587 * 0.25 + 0.114 * 0.75
    assert torch.allclose(latents[:, 0], torch.tensor(8 * brightness / 4.35**0.5))


def test_latents_of_drawn_scenes_weigh_as_their_table_says():
    # A few at a time stay in the processor's cache.
    latents = torch.cat([latents_of(draw(some)) for some in rows(scenes(200)).split(4)])
    # Each channel was divided by the root of its standard deviation, so what is left is that root.
    expected = torch.tensor([spread**0.5 for *_, spread in _COEFFICIENTS])
    assert torch.allclose(latents.std(dim=(0, 2, 3)), expected, rtol=0.2)


def test_muon_makes_updates_orthogonal_and_minimizes():
    torch.manual_seed(0)
    for shape in ((3, 16, 40), (3, 40, 16)):
        singular = torch.linalg.svdvals(orthogonal(torch.randn(shape)).float())
        assert singular.min() > 0.5
        assert singular.max() < 1.5
    network = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
    weights = MasterWeights(network, 0.02, weight_decay=0.0, by_muon=lambda name, _: name == "2.weight")
    assert [group[0].shape for group in weights._muon._groups] == [(2, 16)]
    inputs = torch.randn(64, 8)
    losses = []
    for _ in range(400):
        loss = (network(inputs) - inputs[:, :2]).square().mean()
        weights.schedule(0.0)
        weights.step(loss)
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_weights_in_bf16_learn_through_their_float32_copies():
    torch.manual_seed(0)
    network = torch.nn.Linear(4, 1).to(torch.bfloat16)
    weights = MasterWeights(network, 0.05, weight_decay=0.0)
    average = MovingAverage(weights.master, 0.9)
    inputs = torch.randn(64, 4, dtype=torch.bfloat16)
    target = inputs.sum(1, keepdim=True)
    losses = []
    for _ in range(400):
        loss = (network(inputs) - target).float().square().mean()
        weights.schedule(0.0)
        weights.step(loss)
        average.update(weights.master)
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]
    weights.show(average.values)
    assert torch.allclose(network.weight.float(), torch.ones(1, 4), atol=0.05)


def test_the_text_encoders_learn_what_captions_say():
    made = make_scenes(400, 4, seed=1)
    captions = [text for variants in made.captions for text in variants]
    clip, t5 = clip_tokenizer(captions), t5_tokenizer(captions)
    trained = Networks(networks.transformer(), networks.clip_encoder(clip), networks.t5_encoder(t5))
    ids = [torch.tensor(words(captions, padding=True).input_ids).view(400, 4, -1) for words in (clip, t5)]
    told = train_text(trained, made.rows, *ids, minutes=0.1, batch=16)
    # Of ten shapes one or two are there: saying "none" every time is right in 84 % of cases.
    assert told > 0.5
    things, background = answers(made.rows)
    assert things[..., 0].sum(1).min() >= 1
    assert torch.equal(background[:, :5].sum(1), torch.ones(400))


def test_times_are_embedded_in_float32_whatever_the_network_computes_in():
    torch.manual_seed(0)
    transformer = networks.transformer().to(torch.bfloat16)
    seen = []
    transformer.time_text_embed.time_proj.register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    sigma = torch.tensor([0.7422, 0.0313])
    tokens = torch.zeros(2, 8, networks.TEXT_WIDTH, dtype=torch.bfloat16)
    pooled = torch.zeros(2, networks.POOLED_WIDTH, dtype=torch.bfloat16)
    noisy = Noisy(torch.randn(2, 4, 64), sigma, image_positions(torch.zeros(1, 16, 4, 4)))
    predicted = forward_of(transformer)(noisy, (tokens, pooled), torch.tensor([3.51, 1.0]))
    assert predicted.dtype == torch.float32
    assert torch.equal(seen[0], sigma * 1000)
    assert torch.equal(seen[1], torch.tensor([3.51, 1.0]) * 1000)


def some_latents(count: int) -> Latents:
    """Noise as if it were scenes; every token of scene i is i."""
    ids = torch.arange(count)[:, None, None].expand(count, 1, 3)
    return Latents(torch.randn(count, 16, 4, 6), ids, ids)


def test_half_drawn_pictures_take_the_strides_of_the_sampler_and_are_replaced_when_drawn():
    torch.manual_seed(0)
    empty = (torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long))
    paths = Paths(Sampler([some_latents(5)], empty, batch=4, seed=0), Shape(0, 3))
    paths.level.fill_(1.0)
    start, captions, velocity = paths.latents.clone(), paths.clip_ids.clone(), torch.randn(4, 6, 64)
    scheduler = networks.scheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS))
    for sigma in scheduler.sigmas[:-1]:
        now = paths.now
        assert torch.allclose(now.sigma, sigma.expand(4), atol=1e-6)
        assert torch.allclose(now.latents, start + (sigma - 1) * velocity, atol=1e-5)
        assert torch.equal(paths.clip_ids, captions)
        paths.advance(velocity)
    assert not torch.isclose(paths.latents, start - velocity).any()
    assert (paths.level > 0).all()
    defaults = json.loads(SETTINGS.read_text())["defaults"]
    assert (defaults["steps"], defaults["guidance"]) == (STEPS, GUIDANCE)


def test_guidance_leads_away_from_what_the_empty_caption_gives():
    def teach(noisy: Noisy, text: tuple[torch.Tensor, torch.Tensor], guidance: torch.Tensor) -> torch.Tensor:
        assert torch.equal(guidance, torch.ones(3))
        return noisy.latents * text[0]

    text, nothing = (torch.full((3, 1, 1), 2.0), torch.zeros(3)), (torch.full((3, 1, 1), 0.5), torch.zeros(3))
    now = Noisy(torch.randn(3, 2, 8), torch.rand(3), image_positions(torch.zeros(1, 16, 4, 2)))
    scale = torch.tensor([1.0, 3.5, 6.0])
    guided = guided_velocity(teach, now, text=text, nothing=nothing, scale=scale)
    assert torch.allclose(guided, now.latents * (0.5 + 1.5 * scale)[:, None, None])


def test_training_ends_in_a_folder_that_diffusers_loads(tmp_path):
    from diffusers import FluxPipeline

    blink = 0.0001
    options = argparse.Namespace(
        out=tmp_path, scenes=10, vae_minutes=blink, flow_minutes=blink, distil_minutes=blink,
        batch=2, vae_batch=1, text_batch=2, distil_batch=2, seed=0, text_minutes=blink, start=None, teacher=None,
        compile=False,
    )  # fmt: skip
    train(options)
    options.start = options.teacher = tmp_path / "model"
    train(options)
    files = list((tmp_path / "model").rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) < 16_000_000
    pipe = FluxPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a red circle", width=64, height=64, num_inference_steps=1, max_sequence_length=64).images[0]
    assert picture.size == (64, 64)
    assert pipe.scheduler.config.shift == networks.SHIFT


def trained_line(device: str, *, replayed: bool) -> list[float]:
    """Losses of a small fit, whose batch is the same in every step."""
    torch.manual_seed(0)
    line = torch.nn.Linear(4, 4).to(device)
    x = torch.arange(32.0, device=device).view(8, 4) / 32
    weights = MasterWeights(line, 0.1, weight_decay=0.0)

    def step() -> torch.Tensor:
        loss = (line(x) - x.flip(1)).square().mean()
        weights.step(loss)
        return loss.detach()

    advance = Replayed(step, shared_pool()) if replayed else step
    losses = []
    for i in range(20):
        weights.schedule(i / 20)
        losses.append(advance().item())
    return losses


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_replayed_steps_train_as_called_ones_do(device):
    losses = trained_line(device, replayed=True)
    assert losses == pytest.approx(trained_line(device, replayed=False), rel=1e-4)
    assert losses[-1] < 0.9 * losses[0]  # the rate is still warming up
