"""How fast other tools run FLUX.1-dev's transformer at its real size (random weights), and in how much memory.

    python -m benchmarks.streaming_peers                # the arms, what they need and which options they heed
    python -m benchmarks.streaming_peers mmgp --budget-mb 3000 --quantize

One arm a process, since each leaves hooks, pinned memory and streams behind; it prints one JSON line, and everything
that the tool itself prints goes to stderr. A tool that is not installed gives `skipped` with what to install (exit
code 0), and whatever else goes wrong gives `failed` (exit code 1).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import msgspec
import torch

from benchmarks.full_size import (
    FLUX_DEV,
    FLUX_TINY,
    FluxSize,
    best_device,
    fill_randomly,
    measure,
    transformer,
    transformer_inputs,
)

Step = Callable[[], torch.Tensor]


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be measured."""

    device: torch.device
    flux: FluxSize
    size: int
    text_tokens: int
    batch: int
    steps: int
    vram_limit: float
    storage: str
    budget_mb: int
    quantize: bool
    buckets: int


class Arm(msgspec.Struct, frozen=True, kw_only=True):
    """One way to run the transformer: `build` sets it up and returns one denoise step."""

    name: str
    build: Callable[[Options], Step]
    about: str
    module: str = "diffusers"
    install: tuple[str, ...] = ("diffusers==0.42.1",)
    """What pip is to be asked for; the first names the tool."""
    needs_cuda: bool = False
    heeds: tuple[str, ...] = ()
    """Options that only this arm knows."""


def list_arms() -> tuple[Arm, ...]:
    """All arms, in the order in which they are worth running."""
    return ARMS


def main() -> int:
    """Run one arm, or list them."""
    arguments = _parser().parse_args()
    if arguments.arm is None:
        print("\n".join(_told(arm) for arm in list_arms()))
        return 0
    arm = next(arm for arm in list_arms() if arm.name == arguments.arm)
    with redirect_stdout(sys.stderr):
        result = run(arm, _options(arguments))
    print(json.dumps({"arm": arm.name, **result}))
    return 1 if "failed" in result else 0


def run(arm: Arm, options: Options) -> dict[str, Any]:
    """Measure one arm, or say why not."""
    skipped = _missing(arm, options)
    if skipped:
        return {"skipped": skipped}
    try:
        return _measured(arm, options)
    except ModuleNotFoundError as error:
        if error.name and not _is_installed(error.name):
            return {"skipped": f"{_install(arm)} (there is no module {error.name!r})"}
        return {"failed": _one_line(error)}
    except Exception as error:  # noqa: BLE001 — whatever a peer does, the line is printed
        return {"failed": _one_line(error)}


def _measured(arm: Arm, options: Options) -> dict[str, Any]:
    begin = time.perf_counter()
    step = arm.build(options)
    setup_seconds = time.perf_counter() - begin
    measurement = measure(step, steps=options.steps)
    return {
        "settings": {name: getattr(options, name) for name in (*COMMON, *arm.heeds)}
        | {"num_double": options.flux.num_double, "num_single": options.flux.num_single},
        **msgspec.to_builtins(measurement),
        "setup_seconds": setup_seconds,
        "device": torch.cuda.get_device_name() if options.device.type == "cuda" else "cpu",
        "versions": {name: _version(name) for name in ("torch", *(need.partition("==")[0] for need in arm.install))},
    }


# The arms


def _resident(options: Options) -> Step:
    return _step(transformer(options.flux, device=options.device), options)


def _resident_compiled(options: Options) -> Step:
    model = transformer(options.flux, device=options.device)
    model.compile_repeated_blocks(fullgraph=True)
    return _step(model, options)


def _group_block(options: Options) -> Step:
    model = transformer(options.flux, device="cpu")
    _stream_groups(model, options, "block_level")
    return _step(model, options)


def _group_leaf(options: Options) -> Step:
    model = transformer(options.flux, device="cpu")
    _stream_groups(model, options, "leaf_level")
    return _step(model, options)


def _group_fp8(options: Options) -> Step:
    model = transformer(options.flux, device="cpu")
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    _stream_groups(model, options, "block_level")
    return _step(model, options)


def _stream_groups(model: Any, options: Options, kind: str) -> None:
    has_streams = options.device.type == "cuda"
    model.enable_group_offload(
        onload_device=options.device,
        offload_device=torch.device("cpu"),
        offload_type=kind,
        num_blocks_per_group=1 if kind == "block_level" else None,  # all that it can do with streams
        use_stream=has_streams,
        record_stream=has_streams,
        non_blocking=has_streams,
    )


def _mmgp(options: Options) -> Step:
    model = transformer(options.flux, device="cpu")
    from mmgp import offload

    offload.all(
        {"transformer": model},
        pinnedMemory=True,
        quantizeTransformer=options.quantize,
        budgets={"transformer": options.budget_mb},
        asyncTransfers=True,
        # By default it pins up to half of the RAM and the rest of the weights not at all.
        perc_reserved_mem_max=0.9,
        verboseLevel=1,
    )
    return _step(model, options)


def _cache_dit(options: Options) -> Step:
    import cache_dit

    model = transformer(options.flux, device="cpu")
    cache_dit.layerwise_offload(
        model,
        onload_device=options.device,
        offload_device="cpu",
        async_transfer=True,
        transfer_buckets=options.buckets,
        prefetch_limit=True,
    )
    return _step(model, options)


def _step(model: Any, options: Options) -> Step:
    inputs = transformer_inputs(
        options.flux,
        device=options.device,
        pixels=options.size,
        text_tokens=options.text_tokens,
        batch=options.batch,
    )
    return lambda: model(**inputs, return_dict=False)[0]


def _diffsynth(options: Options) -> Step:
    os.environ.setdefault("DIFFSYNTH_SKIP_DOWNLOAD", "true")
    from diffsynth.core.vram.layers import enable_vram_management
    from diffsynth.pipelines.flux_image import model_fn_flux_image

    storage = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}[options.storage]
    waiting = {"dtype": storage, "device": "cpu"}
    states = {
        "offload": waiting,
        "onload": waiting,
        "preparing": {"dtype": storage, "device": options.device.type},
        "computation": {"dtype": torch.bfloat16, "device": options.device.type},
    }
    managed = enable_vram_management(
        _diffsynth_transformer(options.flux).to(storage),
        _diffsynth_wrappers(),
        {f"{state}_{key}": value for state, place in states.items() for key, value in place.items()},
        vram_limit=options.vram_limit,
    )
    for module in managed.modules():  # as its pipeline does before the first step
        if hasattr(module, "onload"):
            module.onload()
    inputs = _diffsynth_inputs(options)
    return lambda: model_fn_flux_image(dit=managed, **inputs)


def _diffsynth_transformer(size: FluxSize) -> torch.nn.Module:
    """Its widths cannot be chosen, only the number of blocks."""
    from diffsynth.models.flux_dit import FluxDiT

    with torch.device("meta"):
        model = FluxDiT(num_blocks=size.num_double)
    model.single_blocks = model.single_blocks[: size.num_single]
    return fill_randomly(model, device="cpu")


def _diffsynth_wrappers() -> dict[type, type]:
    from diffsynth.configs.vram_management_module_maps import VRAM_MANAGEMENT_MODULE_MAPS

    names = VRAM_MANAGEMENT_MODULE_MAPS["diffsynth.models.flux_dit.FluxDiT"]
    return {_named(layer): _named(wrapper) for layer, wrapper in names.items()}


def _named(dotted: str) -> type:
    module, _, name = dotted.rpartition(".")
    found: type = getattr(importlib.import_module(module), name)
    return found


def _diffsynth_inputs(options: Options) -> dict[str, torch.Tensor]:
    ours = transformer_inputs(device=options.device, text_tokens=options.text_tokens, batch=options.batch)
    side = options.size // 8
    return {
        "latents": torch.randn(options.batch, 16, side, side, device=options.device, dtype=torch.bfloat16),
        "prompt_emb": ours["encoder_hidden_states"],
        "pooled_prompt_emb": ours["pooled_projections"],
        "timestep": ours["timestep"] * 1000,
        "guidance": ours["guidance"].to(torch.bfloat16),
        "text_ids": ours["txt_ids"].expand(options.batch, -1, -1),
    }


COMMON = ("size", "text_tokens", "batch", "steps")
ARMS = (
    Arm(name="diffusers-resident", build=_resident, about="all weights on the card, bf16, eager"),
    Arm(name="diffusers-resident-compiled", build=_resident_compiled, about="the same, its blocks compiled"),
    Arm(name="diffusers-group-block", build=_group_block, about="group offload, a block at a time, with a stream"),
    Arm(name="diffusers-group-leaf", build=_group_leaf, about="group offload, a layer at a time, with a stream"),
    Arm(name="diffusers-group-fp8", build=_group_fp8, about="group offload by block, weights stored as fp8"),
    Arm(
        name="diffsynth-vram-limit",
        build=_diffsynth,
        about="DiffSynth's VRAM management",
        module="diffsynth",
        install=("diffsynth==2.1.12",),
        needs_cuda=True,
        heeds=("vram_limit", "storage"),
    ),
    Arm(
        name="mmgp",
        build=_mmgp,
        about="mmgp, all weights pinned",
        module="mmgp",
        install=("mmgp==3.8.2", "diffusers==0.42.1"),
        needs_cuda=True,
        heeds=("budget_mb", "quantize"),
    ),
    Arm(
        name="cache-dit",
        build=_cache_dit,
        about="cache-dit's layerwise offload, asynchronous",
        module="cache_dit",
        install=("cache-dit==1.5.3", "diffusers==0.42.1"),
        needs_cuda=True,
        heeds=("buckets",),
    ),
)


# What is asked, and what is told


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arm", nargs="?", choices=[arm.name for arm in list_arms()], metavar="ARM")
    parser.add_argument("--size", type=int, help="pixels a side (1024; 128 with --tiny)")
    parser.add_argument("--text-tokens", type=int, help="tokens of the prompt (512; 16 with --tiny)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--layers", type=_layers, metavar="DOUBLE,SINGLE", help="blocks of each kind (19,38)")
    parser.add_argument("--tiny", action="store_true", help="a small transformer, which a CPU can run too")
    parser.add_argument("--vram-limit", type=float, default=12, help="diffsynth: GiB in use on the card (12)")
    parser.add_argument("--storage", choices=["bf16", "fp8"], default="bf16", help="diffsynth: format of the weights")
    parser.add_argument("--budget-mb", type=int, default=3000, help="mmgp: of weights on the card (3000)")
    parser.add_argument("--quantize", action="store_true", help="mmgp: weights in int8")
    parser.add_argument("--buckets", type=int, default=1, help="cache-dit: layers fetched ahead (1)")
    return parser


def _layers(text: str) -> tuple[int, int]:
    double, single = text.split(",")
    return int(double), int(single)


def _options(arguments: argparse.Namespace) -> Options:
    flux = FLUX_TINY if arguments.tiny else FLUX_DEV
    if arguments.layers:
        flux = msgspec.structs.replace(flux, num_double=arguments.layers[0], num_single=arguments.layers[1])
    return Options(
        # The full size takes hours on a CPU.
        device=best_device() if arguments.tiny else torch.device("cuda"),
        flux=flux,
        size=arguments.size or (128 if arguments.tiny else 1024),
        text_tokens=arguments.text_tokens or (16 if arguments.tiny else 512),
        **{
            name: getattr(arguments, name)
            for name in ("batch", "steps", "vram_limit", "storage", "budget_mb", "quantize", "buckets")
        },
    )


def _missing(arm: Arm, options: Options) -> str | None:
    if not _is_installed(arm.module):
        return _install(arm)
    if not torch.cuda.is_available() and (arm.needs_cuda or options.device.type == "cuda"):
        return "needs CUDA" if arm.needs_cuda else "needs CUDA, or --tiny"
    return None


def _is_installed(module: str) -> bool:
    return find_spec(module.partition(".")[0]) is not None


def _install(arm: Arm) -> str:
    return f"pip install {' '.join(arm.install)}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _one_line(error: Exception) -> str:
    traceback.print_exception(error)
    return " ".join(f"{type(error).__name__}: {error}".split())


def _told(arm: Arm) -> str:
    own = "".join(f" --{name.replace('_', '-')}" for name in arm.heeds)
    needs = f"needs {'CUDA, ' if arm.needs_cuda else ''}{' '.join(arm.install)}"
    return f"{arm.name:28} {arm.about}; {needs}{f'; heeds{own}' if own else ''}"


if __name__ == "__main__":
    sys.exit(main())
