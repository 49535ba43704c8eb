"""How much do 8-bit weights and arithmetic change the pictures of the sample model?

    python benchmarks/precision.py [--prompts 100] [--steps 12] [--device cuda] [--wide bfloat16]
                                   [--settings int8-native float8_e4m3fn-cast] [--json FILE]

The same held-out prompts and seeds as `adherence.py --prompts 100`, drawn one by one by diffusers' own FluxPipeline:
once with all networks in the wide precision, then with the linears of the transformer's blocks quantized as the engine
does it, all else wide. Each setting loads the model anew. `native` multiplies 8-bit numbers by 8-bit numbers, `cast`
widens the weights first. The CPU computes native float8 in float32, and so does one without AVX512-VNNI for int8: the
same numbers up to rounding.

PSNR is in dB over the RGB channels in 8 bits, against the wide picture, and infinite (null in JSON) where both are
equal; its percentiles are values of pictures that there are. A picture is right when `adherence.judge` says so.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from numpy.typing import NDArray

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from autoflux.plugins.diffusers_loading import DIFFUSERS  # noqa: E402

import autoflux  # noqa: E402
from autoflux.models.inventory import take_stock  # noqa: E402
from autoflux.models.values import Defaults, Precision  # noqa: E402
from autoflux.runtime.quantized import QuantizedLinear, supports_native  # noqa: E402
from autoflux.runtime.streaming import NARROW, Holding, StreamedTransformer  # noqa: E402
from benchmarks.adherence import Prompt, judge, prompts  # noqa: E402
from benchmarks.full_size import best_device  # noqa: E402


@dataclass(frozen=True)
class Setting:
    """How the linears of the blocks are held and multiplied."""

    storage: Precision
    native: bool

    @property
    def name(self) -> str:
        return f"{self.storage}-{'native' if self.native else 'cast'}"


SETTINGS = {made.name: made for made in (Setting(storage, native) for storage in NARROW for native in (True, False))}


@dataclass(frozen=True)
class Drawn:
    """The pictures of one setting, and whether each is what was asked for."""

    pictures: list[NDArray[np.uint8]]
    right: list[bool]
    quantized_layers: int
    seconds_per_picture: float

    @property
    def right_percent(self) -> float:
        return 100 * sum(self.right) / len(self.right)


@dataclass(frozen=True)
class Row:
    """One setting against wide."""

    setting: str
    psnr_median: float | None
    psnr_percentile_5: float | None
    psnr_worst: float | None
    worst_seed: int
    identical_percent: float
    right_percent: float
    right_points: float
    """Percentage points of difference to wide."""
    gained: int
    """Pictures that are right, and wrong in wide."""
    lost: int
    quantized_layers: int


def main() -> None:
    """Draw, compare, report."""
    options = _options()
    asked = prompts(options.prompts)
    model = take_stock(options.model)
    wide = draw_all(options, asked, model.defaults)
    _tell(f"{options.wide} (wide)", wide)
    rows = []
    for name in options.settings:
        if SETTINGS[name].native and not supports_native(SETTINGS[name].storage, options.device):
            print(f"{name}: left out, {options.device} does not multiply this format", file=sys.stderr)
            continue
        drawn = draw_all(options, asked, model.defaults, SETTINGS[name])
        _tell(name, drawn)
        rows.append(compared(name, drawn, wide, asked))
    print(table(options.wide, wide, rows))
    if options.json:
        result = {
            "model_revision": model.revision,
            "pictures": len(asked),
            "steps": options.steps,
            "wide": {"precision": options.wide, "right_percent": round(wide.right_percent, 2)},
            "settings": [asdict(row) for row in rows],
            **_circumstances(options.device),
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "autoflux" / "models" / "sample")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--device", type=torch.device, default=best_device())
    parser.add_argument("--wide", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.prompts < 1:
        parser.error("--prompts must be 1 or more")
    return options


def draw_all(
    options: argparse.Namespace, asked: Sequence[Prompt], defaults: Defaults, setting: Setting | None = None
) -> Drawn:
    """Load the model, draw and judge every prompt, and let the model go; without a setting all is wide."""
    pipe = _loaded(options, setting)
    begin = time.perf_counter()
    pictures = [_picture(pipe, prompt, options.steps, defaults) for prompt in asked]
    seconds = (time.perf_counter() - begin) / len(asked)
    layers = sum(isinstance(module, QuantizedLinear) for module in pipe.transformer.modules())
    del pipe
    gc.collect()
    if options.device.type == "cuda":
        torch.cuda.empty_cache()
    right = [judge(picture, prompt).right for picture, prompt in zip(pictures, asked, strict=True)]
    return Drawn(pictures, right, layers, seconds)


def _loaded(options: argparse.Namespace, setting: Setting | None) -> Any:
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    pipe = diffusers.FluxPipeline.from_pretrained(options.model, dtype=getattr(torch, options.wide)).to(options.device)
    pipe.set_progress_bar_config(disable=True)
    # For the bfloat16 of processors without instructions for it: convolutions take a fourteenth of the time so.
    pipe.vae.to(memory_format=torch.channels_last)
    if setting:
        # Making it narrows the blocks; as it is never attached, the weights stay where they are.
        holding = Holding(storage=setting.storage, native=setting.native, hoist=False)
        StreamedTransformer(pipe.transformer, DIFFUSERS.block_lists, holding, options.device)
    return pipe


def _picture(pipe: Any, prompt: Prompt, steps: int, defaults: Defaults) -> NDArray[np.uint8]:
    drawn = pipe(
        prompt.text,
        width=defaults.width,
        height=defaults.height,
        num_inference_steps=steps,
        guidance_scale=defaults.guidance,
        max_sequence_length=defaults.text_tokens,
        generator=torch.Generator("cpu").manual_seed(prompt.seed),
    )
    return np.asarray(drawn.images[0])


def psnr(picture: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB, infinite for equal pictures."""
    error = float(np.mean(np.square(picture.astype(np.float64) - reference)))
    return 10 * math.log10(255**2 / error) if error else math.inf


def compared(name: str, drawn: Drawn, wide: Drawn, asked: Sequence[Prompt]) -> Row:
    """One setting's pictures against those of wide."""
    ratios = [psnr(picture, other) for picture, other in zip(drawn.pictures, wide.pictures, strict=True)]
    # `lower`: between an infinite ratio and another there is nothing.
    worst, low, median = (float(np.percentile(ratios, percent, method="lower")) for percent in (0, 5, 50))
    verdicts = list(zip(drawn.right, wide.right, strict=True))
    return Row(
        setting=name,
        psnr_median=_finite(median),
        psnr_percentile_5=_finite(low),
        psnr_worst=_finite(worst),
        worst_seed=asked[ratios.index(worst)].seed,
        identical_percent=round(100 * sum(map(math.isinf, ratios)) / len(ratios), 2),
        right_percent=round(drawn.right_percent, 2),
        right_points=round(drawn.right_percent - wide.right_percent, 2),
        gained=sum(own and not other for own, other in verdicts),
        lost=sum(other and not own for own, other in verdicts),
        quantized_layers=drawn.quantized_layers,
    )


def _finite(ratio: float) -> float | None:
    return None if math.isinf(ratio) else round(ratio, 2)


def _tell(name: str, drawn: Drawn) -> None:
    count, seconds = len(drawn.pictures), drawn.seconds_per_picture
    layers = f"{drawn.quantized_layers} layers quantized"
    print(f"{name}: {count} pictures, {seconds:.2f} s each, {layers}", file=sys.stderr, flush=True)


def table(precision: str, wide: Drawn, rows: Sequence[Row]) -> str:
    """All settings, wide first."""
    titles = ("setting", "PSNR median", "5th pct.", "worst", "identical", "right", "points", "gained/lost")
    form = "{:21} {:>11} {:>8} {:>6} {:>9} {:>7} {:>7} {:>11}".format
    lines = [form(*titles), form(f"{precision} (wide)", "", "", "", "", f"{wide.right_percent:.1f} %", "", "")]
    for row in rows:
        ratios = [_decibels(ratio) for ratio in (row.psnr_median, row.psnr_percentile_5, row.psnr_worst)]
        shares = [f"{row.identical_percent:.1f} %", f"{row.right_percent:.1f} %", f"{row.right_points:+.1f}"]
        lines.append(form(row.setting, *ratios, *shares, f"{row.gained}/{row.lost}"))
    return "\n".join(lines)


def _decibels(ratio: float | None) -> str:
    return "inf" if ratio is None else f"{ratio:.1f}"


def _circumstances(device: torch.device) -> dict[str, object]:
    host = autoflux.probe().host
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "processor": host.processor,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else host.cores,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "transformers")},
    }


if __name__ == "__main__":
    main()
