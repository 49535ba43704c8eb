"""The fields of the gradio page, made to fit the model's defaults and limits."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any

import gradio as gr

from autoflux import Limits, Model, Order

SHAPES = ((1, 1), (4, 3), (3, 4), (16, 9), (9, 16))
OWN_SIZE = "own size"
MOST_STEPS, MOST_GUIDANCE, MOST_PICTURES = 100, 10.0, 16
"""Where the sliders end; the API takes all that the model's limits allow."""

EXAMPLES = (
    "a red circle on a blue background",
    "a yellow square on a green background",
    "a white triangle on a black background",
    "a purple circle on a yellow background",
)
"""Within reach of the sample model, and of every other."""


@dataclass(frozen=True)
class Settings:
    """The fields beside the prompt."""

    width: gr.Number
    height: gr.Number
    steps: gr.Slider
    guidance: gr.Slider
    count: gr.Slider
    seed: gr.Number
    random_seed: gr.Checkbox

    @property
    def fields(self) -> list[Any]:
        """What `make_order` takes after the prompt, in its order."""
        return [self.width, self.height, self.steps, self.guidance, self.count, self.seed, self.random_seed]


def make_order(
    prompt: str | None,
    width: float | None,
    height: float | None,
    steps: float | None,
    guidance: float | None,
    count: float | None,
    seed: float | None,
    random_seed: bool,  # noqa: FBT001 — gradio passes values by position
) -> Order:
    """The order that the fields describe; an empty field means the model's default."""
    return Order(
        prompt=(prompt or "").strip(),
        width=_whole(width),
        height=_whole(height),
        steps=_whole(steps),
        guidance=guidance,
        count=_whole(count) or 1,
        seed=None if random_seed else _whole(seed),
    )


def _whole(number: float | None) -> int | None:
    return None if number is None else int(number)


def make_question() -> tuple[gr.Textbox, gr.Button, gr.Button]:
    """Create prompt, Generate and Cancel, with examples, inside the current gradio block."""
    prompt = gr.Textbox(
        label="Prompt",
        placeholder="What shall it be? Enter draws it, Shift+Enter starts a new line.",
        lines=1,  # with more, gradio takes Enter for a new line
        max_lines=8,
        elem_id="af-prompt",
    )
    with gr.Row(elem_id="af-buttons"):
        draw = gr.Button("Generate", variant="primary", elem_id="af-draw", scale=3, min_width=120)
        cancel = gr.Button("Cancel", interactive=False, elem_id="af-cancel", scale=1, min_width=90)
    gr.Examples([[example] for example in EXAMPLES], [prompt], label="Examples", elem_id="af-examples")
    return prompt, draw, cancel


def make_settings(model: Model) -> Settings:
    """Create the other fields inside the current gradio block."""
    defaults, limits = model.defaults, model.limits
    with gr.Group():
        width, height = _size_fields(model)
        steps = _slider("Steps", 1, min(limits.max_steps, MOST_STEPS), defaults.steps, 1)
        guidance = _slider("Guidance", 0, min(limits.max_guidance, MOST_GUIDANCE), defaults.guidance, 0.1)
        guidance.visible = model.architecture.guidance
        count = _slider("Pictures", 1, MOST_PICTURES, 1, 1)
        with gr.Row(elem_id="af-seed-row"):
            seed = gr.Number(0, label="Seed", precision=0, elem_id="af-seed", scale=2, min_width=90)
            random_seed = gr.Checkbox(label="Random", value=True, elem_id="af-random", scale=1, min_width=122)
    return Settings(width, height, steps, guidance, count, seed, random_seed)


def _slider(label: str, low: float, high: float, value: float, step: float) -> gr.Slider:
    return gr.Slider(low, high, value, step=step, label=label, buttons=[], elem_id=f"af-{label.lower()}")


def _size_fields(model: Model) -> tuple[gr.Number, gr.Number]:
    defaults, limits = model.defaults, model.limits
    presets = size_presets(defaults.width, defaults.height, limits)
    step = limits.size_multiple
    with gr.Row(elem_id="af-size-row"):
        shape = gr.Dropdown(
            [*presets, OWN_SIZE], value=next(iter(presets)), label="Size", elem_id="af-shape", scale=2, min_width=110
        )
        width = gr.Number(defaults.width, label="Width", precision=0, step=step, elem_id="af-width", min_width=64)
        height = gr.Number(defaults.height, label="Height", precision=0, step=step, elem_id="af-height", min_width=64)

    def choose(name: str) -> tuple[Any, Any]:
        return presets.get(name, (gr.skip(), gr.skip()))

    shape.input(choose, [shape], [width, height], show_progress="hidden", queue=False, api_visibility="private")
    for side in (width, height):
        side.input(lambda: OWN_SIZE, None, [shape], show_progress="hidden", queue=False, api_visibility="private")
    return width, height


def size_presets(width: int, height: int, limits: Limits) -> dict[str, tuple[int, int]]:
    """Sizes by name: the default one, then other shapes of about as many pixels that the limits allow."""
    presets = {f"{width}x{height}": (width, height)}
    for across, down in SHAPES:
        scale = sqrt(width * height / (across * down))
        size = (_nearest(across * scale, limits), _nearest(down * scale, limits))
        if size[0] * size[1] <= limits.max_pixels and size not in presets.values():
            presets[f"{size[0]}x{size[1]} ({across}:{down})"] = size
    return presets


def _nearest(side: float, limits: Limits) -> int:
    multiple = round(side / limits.size_multiple) * limits.size_multiple
    return min(max(multiple, limits.min_side), limits.max_side)
