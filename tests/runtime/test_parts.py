"""Weights read from where they lie."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from autoflux.errors import DamagedCheckpoint
from autoflux.models.checkpoints import Part, find_parts, read_checkpoint
from autoflux.models.formats import FORMATS, QUANTIZED
from autoflux.models.values import Naming
from autoflux.runtime.parts import PartReader, leave_parts_on_disk, load_parts
from autoflux.runtime.units import rest_of

ROWS, COLUMNS = 6, 512


@pytest.mark.parametrize("name", QUANTIZED)
def test_every_format_is_widened_as_its_own_library_does(tmp_path, name):
    form, kind = FORMATS[name], gguf.GGMLQuantizationType[name]
    count = ROWS * COLUMNS // form.block_items
    # Numbers of any bits, which the scales among them are too; where they are no numbers, both say so.
    raw = np.random.default_rng(7).integers(0, 256, (count, form.block_bytes), dtype=np.uint8)
    (tmp_path / "x").write_bytes(b"before" + raw.tobytes() + b"after")
    part = Part(str(tmp_path / "x"), ((6, raw.nbytes),), name, (ROWS, COLUMNS))
    found = torch.empty(ROWS, COLUMNS)
    PartReader([part.file]).read(part, found)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = gguf.quants.dequantize(raw.reshape(ROWS, -1), kind)
    finite = np.isfinite(expected)
    assert finite.mean() > 0.5
    np.testing.assert_allclose(found.numpy()[finite], expected[finite], rtol=1e-6)


def test_halves_change_places_and_rows_are_cut(tmp_path):
    numbers = torch.arange(24.0).view(6, 4)
    save_file({"x": numbers}, tmp_path / "x.safetensors")
    place = read_checkpoint(tmp_path / "x.safetensors").tensors["x"]
    ranges = ((place.offset + 48, 48), (place.offset, 48))
    part = Part(str(tmp_path / "x.safetensors"), ranges, "F32", (6, 4))
    for dtype in (torch.float32, torch.bfloat16):
        found = torch.empty(6, 4, dtype=dtype)
        PartReader([part.file]).read(part, found)
        assert torch.equal(found, torch.cat([numbers[3:], numbers[:3]]).to(dtype))


class Layer(nn.Module):
    """One matrix and a buffer that is computed and not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.wo = nn.Linear(4, 4, bias=False)
        self.register_buffer("positions", torch.arange(4.0), persistent=False)


def _parts(file: Path) -> dict[str, Part]:
    return find_parts([read_checkpoint(file)], Naming.DIFFUSERS, "").parts


def _bare() -> Layer:
    made = Layer()
    for module in (made.linear, made.wo):
        module.to("meta")
    return made


@pytest.fixture
def saved(tmp_path) -> tuple[Path, Layer]:
    torch.manual_seed(1)
    layer = Layer()
    held = dict(layer.state_dict())
    scale = held["linear.weight"].abs().amax(dim=1) / 448
    held["linear.weight"] = (held["linear.weight"] / scale[:, None]).to(torch.float8_e4m3fn)
    held["linear.weight_scale"] = scale
    save_file(held, tmp_path / "x.safetensors")
    layer.linear.weight.data = held["linear.weight"].float() * scale[:, None]
    return tmp_path / "x.safetensors", layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loaded_or_left_on_disk_the_weights_are_the_same(saved, dtype):
    file, layer = saved
    loaded, left = _bare(), _bare()
    load_parts(loaded, _parts(file), dtype, float32=("wo",))
    assert loaded.wo.weight.dtype == torch.float32
    assert torch.equal(loaded.wo.weight, layer.wo.weight)
    assert torch.equal(loaded.linear.weight, layer.linear.weight.to(dtype))
    store = leave_parts_on_disk(left, _parts(file), dtype)
    unit = rest_of(left, [])
    memory = torch.empty(unit.nbytes, dtype=torch.uint8)
    store.read(unit, memory)
    unit.point_at(memory)
    store.close()
    assert torch.equal(left.linear.weight, loaded.linear.weight)
    assert torch.equal(left.positions, torch.arange(4.0))


def test_what_is_missing_or_ends_early_is_named(saved, tmp_path):
    file, _ = saved
    parts = _parts(file)
    with pytest.raises(DamagedCheckpoint, match=r"linear\.bias"):
        load_parts(_bare(), {name: part for name, part in parts.items() if name != "linear.bias"}, torch.float32)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(DamagedCheckpoint, match="ended early"):
        load_parts(_bare(), parts, torch.float32)
    file.unlink()
    with pytest.raises(DamagedCheckpoint, match="cannot be read"):
        load_parts(_bare(), parts, torch.float32)
