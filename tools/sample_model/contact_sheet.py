"""A sheet of pictures with their prompts, for a look at what the sample model can do.

    python -m tools.sample_model.contact_sheet --out sheet.png [--model DIR]

The prompts are the first held-out ones that `benchmarks/adherence.py` judges, right or wrong.
"""

from __future__ import annotations

import argparse
import random
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import autoflux
from tools.sample_model.captions import caption
from tools.sample_model.scenes import held_out_scene

COLUMNS, ROWS = 6, 4
CELL, GAP, TEXT_HEIGHT, FONT_SIZE = 208, 12, 58, 13
PAPER, INK = (250, 250, 250), (40, 44, 52)
FIRST_SEED = 20_000


def main() -> None:
    """Draw the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sample")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rng = random.Random(FIRST_SEED)
    scenes = [held_out_scene(rng) for _ in range(300)]
    prompts = [caption(scene, rng) for scene in scenes][: COLUMNS * ROWS]
    with autoflux.load(options.model) as session:
        pictures = [session.generate(prompt, seed=FIRST_SEED + i)[0].image for i, prompt in enumerate(prompts)]
    sheet(pictures, prompts).quantize(128).save(options.out, optimize=True)


def sheet(pictures: list[Image.Image], prompts: list[str]) -> Image.Image:
    """Pictures in rows, each over its prompt."""
    width, height = GAP + COLUMNS * (CELL + GAP), GAP + ROWS * (CELL + TEXT_HEIGHT + GAP)
    page = Image.new("RGB", (width, height), PAPER)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(FONT_SIZE)
    for i, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        x, y = GAP + i % COLUMNS * (CELL + GAP), GAP + i // COLUMNS * (CELL + TEXT_HEIGHT + GAP)
        page.paste(picture.resize((CELL, CELL), Image.Resampling.LANCZOS), (x, y))
        for line, text in enumerate(textwrap.wrap(prompt, 33)[:3]):
            pen.text((x, y + CELL + 5 + 17 * line), text, INK, font)
    return page


if __name__ == "__main__":
    main()
