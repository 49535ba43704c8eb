"""Does the sample model draw what it is asked for? 300 prompts that training never saw, judged by image analysis.

    python benchmarks/adherence.py [--model DIR] [--prompts 300] [--steps 12] [--json FILE]

A picture is right when every thing asked for is there in its colour and shape and nothing else is. Runs diffusers' own
FluxPipeline, on the CPU unless told otherwise. With `--judge` it judges drawn scenes instead of the model, which tells
how far the judge can be trusted; with `--autoencoder` drawn scenes that went through the model's autoencoder, which is
the most that the model could reach.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from shape_vision import Found, border_colours, find, lab_of  # noqa: E402

from tools.sample_model.captions import SIZE_WORDS, caption  # noqa: E402
from tools.sample_model.palette import BACKGROUND_COLOURS  # noqa: E402
from tools.sample_model.scenes import Scene, held_out_scene  # noqa: E402

PLACE_WORDS = re.compile(
    r"left|right|top|bottom|upper|lower|cent(re|er)|middle|above|over|below|under|beneath", re.IGNORECASE
)
SMALL_BELOW, LARGE_FROM = 0.132, 0.21
"""Radii that part small from medium and medium from large, as parts of the picture."""
NEAR = 0.17
"""How far from its place a thing may be."""
SAME_COLOUR = 26.0
"""CIE76 distance up to which a background has the colour asked for."""


@dataclass(frozen=True)
class Prompt:
    """What is asked, with which seed, and the scene it was made from."""

    text: str
    seed: int
    scene: Scene


@dataclass(frozen=True)
class Verdict:
    """What was judged; None where the prompt says nothing about it."""

    right: bool
    count: bool
    colours: bool
    shapes: bool
    size: bool | None
    place: bool | None
    background: bool
    found: tuple[Found, ...]


def prompts(count: int, seed: int = 20_000) -> list[Prompt]:
    """Held-out prompts; the same count and seed give the same prompts."""
    rng = random.Random(seed)
    scenes = [held_out_scene(rng) for _ in range(count)]
    return [Prompt(caption(scene, rng), seed + i, scene) for i, scene in enumerate(scenes)]


def judge(picture: NDArray[np.uint8], prompt: Prompt) -> Verdict:
    """Compare a picture (height, width, 3) with what was asked."""
    found = find(picture)
    wanted = sorted((thing.colour, thing.shape) for thing in prompt.scene.things)
    count = len(found) == len(wanted)
    return Verdict(
        right=sorted((f.colour, f.shape) for f in found) == wanted,
        count=count,
        colours=sorted(f.colour for f in found) == sorted(colour for colour, _ in wanted),
        shapes=sorted(f.shape for f in found) == sorted(shape for _, shape in wanted),
        size=_size_right(found, prompt) if count else None,
        place=_place_right(found, prompt) if count else None,
        background=_background_right(picture, prompt.scene),
        found=tuple(found),
    )


def _pairs(found: list[Found], scene: Scene) -> Iterator[tuple[Found, Any]]:
    """Each thing with what was found of its colour and shape."""
    for thing in scene.things:
        match = next((f for f in found if (f.colour, f.shape) == (thing.colour, thing.shape)), None)
        if match:
            yield match, thing


def _size_right(found: list[Found], prompt: Prompt) -> bool | None:
    text = prompt.text.lower()
    if len(found) != 1 or not any(word in text for words in SIZE_WORDS.values() for word in words):
        return None
    sizes = ["small" if f.radius < SMALL_BELOW else "medium" if f.radius < LARGE_FROM else "large" for f in found]
    return sizes == [thing.size for thing in prompt.scene.things]


def _place_right(found: list[Found], prompt: Prompt) -> bool | None:
    pairs = list(_pairs(found, prompt.scene))
    if not PLACE_WORDS.search(prompt.text) or len(pairs) != len(prompt.scene.things):
        return None
    if len(pairs) == 1:
        ((seen, thing),) = pairs
        return bool(np.hypot(seen.x - thing.x, seen.y - thing.y) <= NEAR)
    (seen, thing), (other_seen, other) = pairs
    across, down = thing.x - other.x, thing.y - other.y
    # Of two things only how they stand to each other is asked, along the axis in which they are apart.
    apart = (seen.x - other_seen.x) * across if abs(across) > abs(down) else (seen.y - other_seen.y) * down
    return bool(apart > 0)


def _background_right(picture: NDArray[np.uint8], scene: Scene) -> bool:
    seen = border_colours(picture)
    wanted = [lab_of(BACKGROUND_COLOURS[name]) for name in scene.background.colours]
    return all(np.linalg.norm(seen - colour, axis=1).min() <= SAME_COLOUR for colour in wanted)


def main() -> None:
    """Draw, judge, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "autoflux" / "models" / "sample")
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--judge", action="store_true", help="judge drawn scenes, to test the judge itself")
    parser.add_argument("--autoencoder", action="store_true", help="judge drawn scenes encoded and decoded again")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    asked = prompts(options.prompts)
    begin = time.perf_counter()
    draw = _artist(options)
    verdicts = [judge(draw(prompt), prompt) for prompt in asked]
    seconds = (time.perf_counter() - begin) / len(asked)
    for prompt, verdict in zip(asked, verdicts, strict=True):
        if not verdict.right:
            seen = ", ".join(f"{f.colour} {f.shape} ({f.overlap:.2f})" for f in verdict.found) or "nothing"
            print(f"seed {prompt.seed}: {prompt.text!r}\n    seen: {seen}")
    result = _summary(verdicts) | {"seconds_per_picture": round(seconds, 3), **_circumstances(options)}
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def _summary(verdicts: list[Verdict]) -> dict[str, float | int]:
    summary: dict[str, float | int] = {"pictures": len(verdicts)}
    for aspect in ("right", "count", "colours", "shapes", "size", "place", "background"):
        judged = [asdict(v)[aspect] for v in verdicts if asdict(v)[aspect] is not None]
        summary[f"{aspect}_percent"] = round(100 * sum(judged) / max(1, len(judged)), 2)
        summary[f"{aspect}_judged"] = len(judged)
    return summary


def _artist(options: argparse.Namespace) -> Callable[[Prompt], NDArray[np.uint8]]:
    if options.judge:
        return _drawn_scenes
    return _encoded_scenes(options) if options.autoencoder else _model_pictures(options)


def _circumstances(options: argparse.Namespace) -> dict[str, object]:
    what = "scenes through the autoencoder" if options.autoencoder else "sample model"
    return {
        "what": "drawn scenes" if options.judge else what,
        "device": options.device,
        "steps": options.steps,
        "guidance": options.guidance,
        "text_tokens": options.text_tokens,
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "transformers")},
    }


def _drawn_scenes(prompt: Prompt) -> NDArray[np.uint8]:
    from tools.sample_model.drawing import draw, rows

    return _pixels(draw(rows([prompt.scene]))[0])


def _encoded_scenes(options: argparse.Namespace) -> Callable[[Prompt], NDArray[np.uint8]]:
    import torch
    from diffusers import AutoencoderKL

    from tools.sample_model.drawing import draw, rows

    vae = AutoencoderKL.from_pretrained(options.model / "vae").to(options.device).eval()

    @torch.inference_mode()
    def picture(prompt: Prompt) -> NDArray[np.uint8]:
        latents = vae.encode(draw(rows([prompt.scene])).to(options.device)).latent_dist.mode()
        return _pixels(vae.decode(latents).sample[0].cpu())

    return picture


def _pixels(picture: Any) -> NDArray[np.uint8]:
    """(3, height, width) in -1..1 to (height, width, 3) in bytes."""
    return np.asarray(((picture + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0))


def _model_pictures(options: argparse.Namespace) -> Any:
    import torch
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(str(options.model)).to(options.device)
    pipe.set_progress_bar_config(disable=True)

    def picture(prompt: Prompt) -> NDArray[np.uint8]:
        drawn = pipe(
            prompt.text,
            width=256,
            height=256,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            max_sequence_length=options.text_tokens,
            generator=torch.Generator("cpu").manual_seed(prompt.seed),
        )
        return np.asarray(drawn.images[0])

    return picture


if __name__ == "__main__":
    main()
