"""Names of other layouts against the converters of diffusers."""

from __future__ import annotations

import torch
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_ldm_vae_checkpoint,
)

from autoflux.models.configs import FLUX_DEV
from autoflux.models.naming import decoder_levels, meaning_of
from autoflux.models.shapes import weights_of
from autoflux.models.values import Naming
from tests.layouts import join_shapes, to_bfl, to_ldm


def test_the_transformer_is_taken_apart_as_diffusers_does():
    """The converter cuts by rows of the real hidden size, so the tensors have those rows and one column."""
    config = FLUX_DEV["transformer"] | {"num_layers": 2, "num_single_layers": 2}
    shapes = to_bfl(weights_of("transformer", config), join_shapes)
    first, stored = 0, {}
    for key, shape in shapes.items():
        stored[key] = torch.arange(first, first + shape[0])  # every row has a number of its own
        first += shape[0]
    expected = convert_flux_transformer_checkpoint_to_diffusers(dict(stored))
    found = {}
    for key, rows in stored.items():
        meaning = meaning_of(Naming.BFL, key)
        shares = [4 if "proj_mlp" in name else 1 for name in meaning.names]
        cut = rows.split([len(rows) // sum(shares) * share for share in shares]) if len(shares) > 1 else [rows]
        cut = [torch.cat(list(reversed(rows.chunk(2))))] if meaning.swapped else cut
        found.update(zip(meaning.names, cut, strict=True))
    assert found.keys() == expected.keys() == weights_of("transformer", config).keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_autoencoder_is_named_as_diffusers_does():
    config = FLUX_DEV["vae"]
    shapes = weights_of("vae", config)
    numbers = {name: torch.full((1,) * len(shape), i) for i, (name, shape) in enumerate(shapes.items())}
    stored = to_ldm(numbers, lambda weight: weight[..., None, None])
    expected = convert_ldm_vae_checkpoint(dict(stored), config)
    levels = decoder_levels(stored)
    found = {meaning_of(Naming.LDM, key, levels).names[0]: number for key, number in stored.items()}
    assert found.keys() == expected.keys() == shapes.keys()
    assert all(found[name].item() == expected[name].item() for name in expected)
    assert "decoder.up.0.block.0.nin_shortcut.weight" in stored
    assert "encoder.mid.attn_1.proj_out.weight" in stored


def test_a_level_that_no_number_holds_is_no_level():
    name = f"decoder.up.{'9' * 5000}.block.0.conv1.weight"
    assert decoder_levels([name, "decoder.up.3.block.0.conv1.weight"]) == 4
    assert "up_blocks" not in meaning_of(Naming.LDM, name, 4).names[0]


def test_what_flux_has_not_means_nothing():
    for key in ("double_blocks.0.img_attn.lora.weight", "distilled_guidance_layer.in_proj.weight", "single_blocks.0"):
        assert meaning_of(Naming.BFL, key) is None
