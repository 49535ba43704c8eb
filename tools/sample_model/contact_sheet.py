"""A sheet of pictures with their prompts, for a look at what the sample model can do.

    python -m tools.sample_model.contact_sheet --out sheet.webp [--model DIR]

The prompts are the first held-out ones that `benchmarks/adherence.py` judges, right or wrong.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import autoflux
from tools.sample_model.captions import caption
from tools.sample_model.scenes import held_out_scene

COLUMNS, ROWS = 6, 4
CELL, GAP, TEXT_HEIGHT, FONT_SIZE = 208, 12, 58, 13
LINES = 3
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
    sheet(pictures, prompts).save(options.out, quality=85)


def sheet(pictures: list[Image.Image], prompts: list[str]) -> Image.Image:
    """Pictures in rows, each over its prompt."""
    width, height = GAP + COLUMNS * (CELL + GAP), GAP + ROWS * (CELL + TEXT_HEIGHT + GAP)
    page = Image.new("RGB", (width, height), PAPER)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(FONT_SIZE)
    for i, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        x, y = GAP + i % COLUMNS * (CELL + GAP), GAP + i // COLUMNS * (CELL + TEXT_HEIGHT + GAP)
        page.paste(picture.resize((CELL, CELL), Image.Resampling.LANCZOS), (x, y))
        for line, text in enumerate(_lines(prompt, font)):
            pen.text((x, y + CELL + 5 + 17 * line), text, INK, font)
    return page


def _lines(prompt: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """The prompt in at most as many lines as there is room for, none wider than a picture."""
    lines = [""]
    for word in prompt.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= CELL:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines[:LINES] if len(lines) <= LINES else [*lines[: LINES - 1], f"{lines[LINES - 1]} …"]


if __name__ == "__main__":
    main()
