"""Networks by their configurations, against the libraries' own modules."""

from __future__ import annotations

from math import prod

import accelerate
import diffusers
import pytest
import transformers

from autoflux.models.absent import absent_model
from autoflux.models.catalogue import CATALOGUE, find
from autoflux.models.configs import CLASSES, FLUX_DEV, told_by_shapes
from autoflux.models.naming import plain_name
from autoflux.models.shapes import weights_of
from autoflux.models.values import Family, Layout

COUNTS = {
    "text_encoder": 123_060_480,
    "text_encoder_2": 4_762_310_656,
    "transformer": 11_901_408_320,
    "vae": 83_819_683,
}
"""Of FLUX.1-dev, counted on the real model."""

VARIED = {
    "text_encoder": {"num_hidden_layers": 3, "vocab_size": 100},
    "text_encoder_2": {"num_layers": 2, "feed_forward_proj": "relu"},
    "transformer": {"num_layers": 1, "num_single_layers": 2, "guidance_embeds": False, "in_channels": 384},
    "vae": {"block_out_channels": [32, 64, 96], "layers_per_block": 1, "use_quant_conv": True},
}


def _module(name: str, config: dict):
    kind = getattr(diffusers, CLASSES[name], None) or getattr(transformers, CLASSES[name])
    with accelerate.init_empty_weights():
        if name in ("transformer", "vae"):
            return kind.from_config(config)
        return kind(kind.config_class.from_dict(config))


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("changed", [False, True], ids=["FLUX.1", "others"])
def test_weights_are_those_of_the_libraries(name: str, *, changed: bool):
    config = FLUX_DEV[name] | (VARIED[name] if changed else {})
    if changed and name == "vae":
        config |= {"down_block_types": config["down_block_types"][:3], "up_block_types": config["up_block_types"][:3]}
    found = weights_of(name, config)
    expected = {plain_name(key): tuple(tensor.shape) for key, tensor in _module(name, config).state_dict().items()}
    assert found == expected
    if not changed:
        assert sum(map(prod, found.values())) == COUNTS[name]
    told = told_by_shapes(name, found)
    assert told == {key: config[key] for key in told} | ({"out_channels": None} if name == "transformer" else {})


@pytest.mark.parametrize("entry", CATALOGUE, ids=lambda entry: entry.name)
def test_the_catalogue_says_what_a_model_is_made_of(entry):
    model = absent_model(entry)
    assert model.layout == Layout.ABSENT
    assert (model.path, model.component("transformer").files) == ("", ())
    for name, count in COUNTS.items():
        if name != "transformer":
            assert model.component(name).parameter_count == count
    transformer = model.component("transformer")
    changes = {Family.SCHNELL: -(256 * 3072 + 3072 + 3072 * 3072 + 3072), Family.FILL: (384 - 64) * 3072}
    assert transformer.parameter_count == COUNTS["transformer"] + changes.get(entry.family, 0)
    assert [len(blocks.blocks) for blocks in transformer.block_lists] == [19, 38]
    double, single = (blocks.blocks[0].parameters for blocks in transformer.block_lists)
    assert (double.total, single.total) == (339_831_296, 141_591_808)
    assert 19 * double.modulation + 38 * single.modulation == 3_227_516_928
    assert model.architecture.guidance == (entry.family != Family.SCHNELL)


def test_the_catalogue_is_found_by_every_name():
    for entry in CATALOGUE:
        for name in (entry.name, entry.name.upper(), *entry.aliases, entry.huggingface, entry.modelscope):
            assert find(name) is entry
    assert find("flux.2-dev") is None
