"""The real FLUX.1-dev by its headers, in every layout: sparse files that take no room."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoflux.models.absent import absent_model
from autoflux.models.catalogue import find as find_entry
from autoflux.models.finding import find
from autoflux.models.values import Family, Layout, Model
from autoflux.planning.planner import make_plan
from autoflux.planning.profiles import for_host
from autoflux.planning.values import Wishes
from autoflux.plugin_manager import load_plugins
from autoflux.units import GB
from tests.conftest import card
from tests.layouts import write_full_size

LAYOUTS = {
    "diffusers folder": (Layout.FOLDER, "BF16", False, 33_741_198_278),
    "Black Forest Labs file": (Layout.TRANSFORMER_FILE, "BF16", False, 33_741_198_278),
    "float8 file with scales": (Layout.TRANSFORMER_FILE, "F8_E4M3", True, None),
    "all-in-one file": (Layout.ALL_IN_ONE, "F8_E4M3", False, None),
    "GGUF file": (Layout.GGUF, "Q4_K", False, None),
}


@pytest.fixture(scope="module")
def full_size(tmp_path_factory) -> dict[str, Path]:
    return write_full_size(tmp_path_factory.mktemp("full"))


def test_every_layout_is_there(full_size):
    assert full_size.keys() == LAYOUTS.keys()


@pytest.mark.parametrize("name", LAYOUTS)
def test_it_is_recognised_counted_and_planned(full_size, machine, name):
    layout, stored, scaled, disk_bytes = LAYOUTS[name]
    base = None if layout == Layout.FOLDER else str(full_size["diffusers folder"])
    model = find(str(full_size[name]), {}, base)
    transformer = model.component("transformer")
    assert (model.layout, model.family, transformer.scaled) == (layout, Family.DEV_LIKE, scaled)
    assert max(transformer.formats, key=transformer.formats.get) == stored
    assert disk_bytes is None or model.disk_bytes == disk_bytes
    entry = find_entry("flux.1-dev")
    assert entry is not None
    expected = absent_model(entry)
    assert _counts(model) == _counts(expected)
    assert model.architecture == expected.architecture
    profiles = for_host(load_plugins(entry_points=False).profiles, 64 * GB)
    plans = [make_plan(machine(card(24)), m, profiles, Wishes(), ["diffusers"]) for m in (model, expected)]
    # What lies on the disk decides how long the start takes, and nothing else.
    first, second = (p.predicted for p in plans)
    assert (first.seconds_per_step, first.peak_vram_bytes) == (second.seconds_per_step, second.peak_vram_bytes)
    assert plans[0].components == plans[1].components


def _counts(model: Model) -> list:
    return [
        (
            c.name,
            c.parameter_count,
            [(b.path, [block.parameters for block in b.blocks]) for b in c.block_lists],
            c.rest.parameters,
        )
        for c in model.components
    ]
