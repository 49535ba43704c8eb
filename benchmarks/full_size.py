"""FLUX.1-dev's transformer and the T5-XXL encoder at their real sizes with random weights, and how to time a step.

    from benchmarks.full_size import measure, transformer, transformer_inputs

    model, inputs = transformer(device="cuda"), transformer_inputs(device="cuda", pixels=1024)
    print(measure(lambda: model(**inputs, return_dict=False)[0], steps=6))

Speed and memory do not depend on what the weights are, so nothing has to be downloaded. `FLUX_TINY` and `T5_TINY` are
the same architectures made small enough to try everything on a CPU.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import msgspec
import torch

HEAD_WIDTH = 128
"""Width of an attention head: rotary embedding splits it in (16, 56, 56), so that small models have it too."""
LATENT_CHANNELS = 64
"""Channels of an image token: 16 of the autoencoder's times a patch of 2 x 2."""
PIXELS_PER_TOKEN = 16
"""Along each side: the autoencoder makes 8 pixels one, and a patch makes two of those one."""
WEIGHT_STD = 0.02
BLOCK_LISTS = ("transformer_blocks", "single_transformer_blocks")
"""Of the transformer, in the order they run."""


class FluxSize(msgspec.Struct, frozen=True, kw_only=True):
    """What differs between a full-size transformer and a small one; the defaults are FLUX.1-dev's."""

    num_double: int = 19
    num_single: int = 38
    heads: int = 24
    text_width: int = 4096
    pooled_width: int = 768


class T5Size(msgspec.Struct, frozen=True, kw_only=True):
    """What differs between a full-size encoder and a small one; the defaults are those of T5 v1.1 XXL."""

    layers: int = 24
    width: int = 4096
    hidden_width: int = 10240
    heads: int = 64
    head_width: int = 64
    vocabulary: int = 32128


FLUX_DEV = FluxSize()
FLUX_TINY = FluxSize(num_double=2, num_single=4, heads=2, text_width=64, pooled_width=32)
T5_XXL = T5Size()
T5_TINY = T5Size(layers=2, width=64, hidden_width=128, heads=4, head_width=16, vocabulary=512)


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """What a step takes. Memory is the highest there was during the steps, 0 without CUDA."""

    median_seconds: float
    best_seconds: float
    worst_seconds: float
    warm_seconds: float
    """All the steps that do not count, compilation and first transfers included."""
    allocated_bytes: int
    reserved_bytes: int
    on_card_bytes: int
    """Taken of the card as its driver sees it: includes the CUDA context, and whatever other processes hold."""
    finite: bool
    norm: float
    """Of the last step's output: equal work on equal weights has an equal norm."""


def best_device() -> torch.device:
    """The CUDA card if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def empty_transformer(size: FluxSize = FLUX_DEV) -> Any:
    """A `FluxTransformer2DModel` whose parameters are on `meta`."""
    from accelerate import init_empty_weights
    from diffusers import FluxTransformer2DModel

    with init_empty_weights(include_buffers=False):
        return FluxTransformer2DModel(
            in_channels=LATENT_CHANNELS,
            num_layers=size.num_double,
            num_single_layers=size.num_single,
            attention_head_dim=HEAD_WIDTH,
            num_attention_heads=size.heads,
            joint_attention_dim=size.text_width,
            pooled_projection_dim=size.pooled_width,
            guidance_embeds=True,
        )


def empty_text_encoder(size: T5Size = T5_XXL) -> Any:
    """A `T5EncoderModel` whose parameters are on `meta`."""
    from accelerate import init_empty_weights
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        num_layers=size.layers,
        d_model=size.width,
        d_ff=size.hidden_width,
        num_heads=size.heads,
        d_kv=size.head_width,
        vocab_size=size.vocabulary,
        feed_forward_proj="gated-gelu",
    )
    with init_empty_weights(include_buffers=False):
        model = T5EncoderModel(config)
        model.set_input_embeddings(model.get_input_embeddings())
    return model


def transformer(
    size: FluxSize = FLUX_DEV, *, device: torch.device | str, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Any:
    """A `FluxTransformer2DModel` with random weights."""
    return fill_randomly(empty_transformer(size), device=device, dtype=dtype, seed=seed)


def text_encoder(
    size: T5Size = T5_XXL, *, device: torch.device | str, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Any:
    """A `T5EncoderModel` with random weights."""
    return fill_randomly(empty_text_encoder(size), device=device, dtype=dtype, seed=seed)


def fill_randomly(
    model: torch.nn.Module, *, device: torch.device | str, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> torch.nn.Module:
    """Give a model that was built on `meta` its weights: normal, the scales of its norms 1; ready to infer.

    Drawn on the card if there is one, tensor by tensor, also when they go to the CPU, which would take minutes for it.
    """
    drawn_on = best_device()
    to_host = _HostCopy() if drawn_on.type == "cuda" and torch.device(device).type == "cpu" else None
    generator = torch.Generator(drawn_on).manual_seed(seed)
    made: dict[int, torch.nn.Parameter] = {}  # tied weights stay one parameter
    state = {}
    for name, empty in model.named_parameters(remove_duplicate=False):
        if id(empty) not in made:
            weight = torch.empty(empty.shape, dtype=dtype, device=drawn_on)
            _draw(name, weight, generator)
            placed = to_host(weight) if to_host else weight.to(device)
            made[id(empty)] = torch.nn.Parameter(placed, requires_grad=False)
        state[name] = made[id(empty)]
    model.load_state_dict(state, assign=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return model.eval()


class _HostCopy:
    """Copies tensors of the card to pageable memory, which the driver alone does at a twentieth of the link's rate.

    New pages cost more than the copy, and the driver asks for them in one thread. Through a pinned buffer all of
    torch's threads do.
    """

    def __init__(self, nbytes: int = 64 << 20) -> None:
        self._buffer = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        copied = torch.empty(weight.shape, dtype=weight.dtype)
        bytes_there = weight.reshape(-1).view(torch.uint8).split(self._buffer.numel())
        bytes_here = copied.reshape(-1).view(torch.uint8).split(self._buffer.numel())
        for source, target in zip(bytes_there, bytes_here, strict=True):
            target.copy_(self._buffer[: source.numel()].copy_(source))
        return copied


def _draw(name: str, weight: torch.Tensor, generator: torch.Generator) -> None:
    if weight.ndim == 1 and "norm" in name and name.endswith("weight"):
        weight.fill_(1)
    else:
        weight.normal_(0, WEIGHT_STD, generator=generator)


def transformer_inputs(
    size: FluxSize = FLUX_DEV,
    *,
    device: torch.device | str,
    pixels: int = 1024,
    text_tokens: int = 512,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """The arguments of a transformer's forward for square pictures of so many pixels a side."""
    generator = torch.Generator(device).manual_seed(seed)
    side = pixels // PIXELS_PER_TOKEN

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    return {
        "hidden_states": noise(batch, side * side, LATENT_CHANNELS),
        "encoder_hidden_states": noise(batch, text_tokens, size.text_width),
        "pooled_projections": noise(batch, size.pooled_width),
        "timestep": torch.full((batch,), 0.5, device=device, dtype=dtype),
        "guidance": torch.full((batch,), 3.5, device=device, dtype=torch.float32),
        "img_ids": _image_ids(side).to(device, dtype),
        "txt_ids": torch.zeros(text_tokens, 3, device=device, dtype=dtype),
    }


def _image_ids(side: int) -> torch.Tensor:
    rows, columns = torch.meshgrid(*[torch.arange(side, device="cpu")] * 2, indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)


def text_inputs(
    size: T5Size = T5_XXL, *, device: torch.device | str, text_tokens: int = 512, batch: int = 1, seed: int = 0
) -> dict[str, torch.Tensor]:
    """The arguments of a text encoder's forward."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (batch, text_tokens)
    return {"input_ids": torch.randint(size.vocabulary, shape, generator=generator, device=device)}


def measure(step: Callable[[], torch.Tensor], *, steps: int = 6, warm: int = 2, awaited: bool = False) -> Measurement:
    """Time `step` after `warm` calls that do not count. Without gradients, as diffusers' pipelines call it.

    Steps follow each other as in a denoise loop, and the time of one is from the end of the one before to its own, on
    the device's clock. Waiting for a step would also wait for what is copied ahead for the next, while nothing
    computes. With `awaited` it is waited for: what is done once a picture has nothing ahead.
    """
    _forget_setup()
    with torch.no_grad():
        warm_seconds = sum(_timed(step)[0] for _ in range(warm))
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        take = _following if torch.cuda.is_available() and not awaited else _apart
        seconds, output = take(step, steps)
    return Measurement(
        median_seconds=statistics.median(seconds),
        best_seconds=min(seconds),
        worst_seconds=max(seconds),
        warm_seconds=warm_seconds,
        allocated_bytes=torch.cuda.max_memory_allocated(),
        reserved_bytes=torch.cuda.max_memory_reserved(),
        on_card_bytes=_on_card_bytes(),
        finite=bool(torch.isfinite(output).all()),
        norm=output.float().norm().item(),
    )


def _following(step: Callable[[], torch.Tensor], steps: int) -> tuple[list[float], torch.Tensor]:
    """Seconds of steps on the device's clock, after one that fills what is copied ahead; and what the last gave."""
    marks: list[torch.cuda.Event] = []
    for _ in range(1 + steps):
        output = step()
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()
    torch.cuda.synchronize()
    return [earlier.elapsed_time(later) / 1000 for earlier, later in pairwise(marks)], output


def _apart(step: Callable[[], torch.Tensor], steps: int) -> tuple[list[float], torch.Tensor]:
    taken = [_timed(step) for _ in range(steps)]
    return [seconds for seconds, _ in taken], taken[-1][1]


def _timed(step: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    _synchronize()
    begin = time.perf_counter()
    output = step()
    _synchronize()
    return time.perf_counter() - begin, output


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _forget_setup() -> None:
    """What building the model left in the allocator's cache is not what a step needs."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _on_card_bytes() -> int:
    """The allocator keeps what it ever reserved, so right after the steps this is still their peak."""
    if not torch.cuda.is_available():
        return 0
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    return total_bytes - free_bytes
