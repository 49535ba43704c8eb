"""Making packs from files of any format, in every number format, whatever happens meanwhile."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from autoflux.errors import DamagedCheckpoint, DamagedPack, UnreadablePack
from autoflux.models.finding import find
from autoflux.models.pack_shelf import Shelf
from autoflux.models.packs import FLOAT32_IN_FLOAT16, PIECE_BYTES, WEIGHTS, Recipe, check_pack, recipes
from autoflux.models.values import Component, Precision
from autoflux.runtime.pack_file import PackFile, checksum
from autoflux.runtime.packed import PackStore, fill, make_fitting
from autoflux.runtime.packing import pack_component
from autoflux.runtime.quantized import QuantizedLinear, quantize, quantize_linears
from autoflux.runtime.stores import Rows
from autoflux.runtime.streaming import stays_wide
from tests.refusals import refuse
from tests.runtime.fakes import CPU, LISTS, LateLane, tiny_transformer


@pytest.fixture
def shelf(tmp_path) -> Shelf:
    return Shelf(tmp_path / "packs")


@pytest.fixture
def model(tiny_found):
    return tiny_found


@pytest.mark.parametrize("arithmetic", [Precision.BFLOAT16, Precision.FLOAT16, Precision.FLOAT32])
@pytest.mark.parametrize("storage", [Precision.INT8, Precision.FLOAT8])
def test_a_pack_holds_the_numbers_that_narrowing_a_loaded_network_gives(model, shelf, storage, arithmetic):
    from diffusers import FluxTransformer2DModel

    recipe = Recipe(model.component("transformer"), storage, arithmetic)
    pack = pack_component(recipe, model, shelf)
    assert check_pack(shelf.folder(pack.key), checksum) == ""
    network = FluxTransformer2DModel.from_pretrained(
        Path(model.path) / "transformer", torch_dtype=getattr(torch, arithmetic.value)
    )
    for path in LISTS:
        for block in network.get_submodule(path):
            quantize_linears(block, storage, native=False, keep=stays_wide)
    held = load_file(shelf.folder(pack.key) / WEIGHTS)
    wanted = {name.replace(".scale", ".weight_scale"): tensor for name, tensor in network.state_dict().items()}
    assert set(held) == set(wanted)
    for name, tensor in wanted.items():
        assert held[name].dtype == tensor.dtype, name
        assert torch.equal(held[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("arithmetic", [Precision.BFLOAT16, Precision.FLOAT16, Precision.FLOAT32])
def test_encoders_and_decoder_have_the_formats_that_their_libraries_load_them_in(model, shelf, arithmetic):
    import diffusers
    import transformers

    kinds = {"text_encoder": transformers.CLIPTextModel, "text_encoder_2": transformers.T5EncoderModel}
    for name, kind in {**kinds, "vae": diffusers.AutoencoderKL}.items():
        pack = pack_component(Recipe(model.component(name), arithmetic, arithmetic), model, shelf)
        network = kind.from_pretrained(Path(model.path) / name, torch_dtype=getattr(torch, arithmetic.value))
        held = load_file(shelf.folder(pack.key) / WEIGHTS)
        wanted = {n.removeprefix("text_model."): t for n, t in network.state_dict().items() if "embed_tokens" not in n}
        for weight, tensor in wanted.items():
            assert held[weight].dtype == tensor.dtype, weight
            assert torch.equal(held[weight], tensor), weight
        assert set(held) == set(wanted)
        careful = getattr(kind, "_keep_in_fp32_modules", None) or []
        assert careful == [FLOAT32_IN_FLOAT16[k] for k in [kind.__name__] if k in FLOAT32_IN_FLOAT16]


KILLED = """
import os, signal, sys
from pathlib import Path
from autoflux.models.finding import find
from autoflux.models.pack_shelf import Shelf
from autoflux.models.packs import recipes
from autoflux.models.values import Precision
from autoflux.runtime.packing import pack_component

written = 0

def on_bytes(count, total):
    global written
    written += count
    if written >= float(sys.argv[3]) * total:
        os.kill(os.getpid(), signal.SIGKILL)

model = find(sys.argv[1], {})
transformer = recipes(model, Precision.INT8, Precision.BFLOAT16)[2]
pack_component(transformer, model, Shelf(Path(sys.argv[2])), on_bytes=on_bytes)
"""


def run(code: str, *arguments: object, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_packing_that_is_killed_leaves_no_pack_and_the_next_one_starts_anew(model, tiny_copy, shelf, share):
    assert run(KILLED, tiny_copy, shelf.root, share).returncode == -signal.SIGKILL
    assert shelf.packs() == []
    recipe = recipes(model, Precision.INT8, Precision.BFLOAT16)[2]
    assert shelf.open(recipe.key()) is None
    pack = pack_component(recipe, model, shelf)
    assert check_pack(shelf.folder(pack.key), checksum) == ""
    assert sorted(f.name for f in shelf.root.iterdir()) == sorted(["locks", pack.key])


def test_two_processes_that_pack_at_once_make_one_pack(model, tiny_copy, shelf):
    command = [sys.executable, "-c", KILLED, tiny_copy, shelf.root, "9"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    (pack,) = shelf.packs()
    assert check_pack(shelf.folder(pack.key), checksum) == ""
    assert sorted(f.name for f in shelf.root.iterdir()) == sorted(["locks", pack.key])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs limits on processes")
def test_a_full_disk_is_told_and_nothing_is_left_behind(tiny_copy, shelf):
    code = (
        "import resource, sys\n"
        "from autoflux.cli.main import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "main(sys.argv[1:])\n"
    )
    environment = os.environ | {"AUTOFLUX_CACHE_DIR": str(shelf.root.parent)}
    done = run(code, "models", "pack", tiny_copy, "--precision", "int8", "--json", env=environment)
    assert done.returncode == 1, done.stderr
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "disk_full"
    assert "nothing of the pack is kept" in error["message"]
    assert "Traceback" not in done.stderr
    assert all(pack.nbytes <= 50_000 for pack in shelf.packs())
    assert not list(shelf.root.glob(".*"))


def test_a_file_that_is_replaced_while_it_is_read_makes_no_pack(model, shelf):
    recipe = recipes(model, Precision.INT8, Precision.BFLOAT16)[2]

    def replace(_count: int, _total: int) -> None:
        os.utime(recipe.component.files[0], ns=(1, 1))

    with pytest.raises(DamagedCheckpoint, match="were changed while they were packed"):
        pack_component(recipe, model, shelf, on_bytes=replace)
    assert shelf.packs() == []
    assert not list(shelf.root.glob(".*"))


# Reading


@pytest.fixture
def big(tmp_path, shelf):
    """A network with a tensor of several pieces, packed."""
    network = nn.Sequential(nn.Linear(4096, 5000, bias=False), nn.Linear(64, 48))
    file = tmp_path / "big.safetensors"
    save_file(network.state_dict(), file)
    rest = find(str(Path(__file__).parents[2] / "autoflux/models/sample"), {}).component("vae")
    component: Component = rest.replace(files=(str(file),), folder="")
    pack = pack_component(Recipe(component, Precision.FLOAT32, Precision.FLOAT32), _Named(), shelf)
    return network, pack


class _Named:
    name, path, base_path = "big", "/big", ""


@pytest.mark.parametrize("lane", [None, LateLane()])
def test_large_tensors_are_read_piece_by_piece(big, shelf, lane):
    network, pack = big
    assert pack.tensors[-1].nbytes > 4 * PIECE_BYTES or pack.tensors[0].nbytes > 4 * PIECE_BYTES
    with torch.device("meta"):
        read = nn.Sequential(nn.Linear(4096, 5000, bias=False), nn.Linear(64, 48))
    make_fitting(read, pack.tensors, native=False)
    store = PackStore(read, shelf.open(pack.key))
    fill(read, store, CPU, lane=lane)
    store.close()
    for name, tensor in network.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor)


def test_rows_across_pieces_are_joined_and_checked(big, shelf):
    network, pack = big
    rows = [Rows("0.weight", 2500, 5000), Rows("0.weight", 0, 2500)]
    with torch.device("meta"):
        read = nn.Sequential(nn.Linear(4096, 5000, bias=False), nn.Linear(64, 48))
    make_fitting(read, pack.tensors, native=False, joined={"0.weight": rows})
    fill(read, PackStore(read, shelf.open(pack.key), {"0.weight": rows}), CPU)
    assert torch.equal(read[0].weight, network[0].weight.roll(2500, 0))
    weight = next(tensor for tensor in pack.tensors if tensor.name == "0.weight")
    with (shelf.folder(pack.key) / WEIGHTS).open("r+b") as file:
        file.seek(weight.offset + weight.nbytes // 2)
        (byte,) = file.read(1)
        file.seek(weight.offset + weight.nbytes // 2)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(DamagedPack):
        fill(read, PackStore(read, shelf.open(pack.key), {"0.weight": rows}), CPU)


@pytest.mark.parametrize("other", [nn.Linear(4096, 5001, bias=False), nn.Linear(4096, 5000), nn.Linear(64, 48)])
def test_a_pack_that_does_not_fit_the_network_is_dropped(big, shelf, other):
    _, pack = big
    with pytest.raises(DamagedPack, match="is missing"):
        PackStore(nn.Sequential(other), shelf.open(pack.key))
    assert shelf.find(pack.key) is None


@pytest.mark.parametrize("code", [errno.EACCES, errno.EMFILE, errno.EIO])
@pytest.mark.parametrize("when", ["opened", "read"])
def test_a_pack_that_cannot_be_read_now_is_not_dropped(big, shelf, monkeypatch, caplog, when, code):
    network, pack = big
    opened = shelf.open(pack.key)

    def refusing(*_arguments: object) -> int:
        raise OSError(code, os.strerror(code))

    if when == "opened":
        refuse(monkeypatch, WEIGHTS, code)
    else:
        monkeypatch.setattr(PackFile, "_read_at", refusing)
    with pytest.raises(UnreadablePack, match=os.strerror(code)) as raised:
        fill(network, PackStore(network, opened), CPU)
    assert "--no-pack" in raised.value.hint
    assert [r.message for r in caplog.records if "cannot be read" in r.message and "dropped" not in r.message]
    assert shelf.find(pack.key) == pack
    assert shelf.remove(pack.key), "it is closed"


def test_joining_before_or_after_narrowing_is_the_same():
    upper, lower = torch.randn(32, 48), torch.randn(16, 48) * 100
    for precision in (Precision.INT8, Precision.FLOAT8):
        apart = [quantize(weight, precision) for weight in (upper, lower)]
        together = quantize(torch.cat([upper, lower]), precision)
        for i in range(2):
            joined = torch.cat([apart[0][i], apart[1][i]])
            assert torch.equal(joined.view(torch.uint8), together[i].view(torch.uint8))


def test_quantized_layers_stand_where_the_pack_has_scales(model, shelf):
    pack = pack_component(Recipe(model.component("transformer"), Precision.INT8, Precision.BFLOAT16), model, shelf)
    network = tiny_transformer().to("meta")
    make_fitting(network, pack.tensors, native=True)
    layers = {name: child for name, child in network.named_modules() if isinstance(child, QuantizedLinear)}
    assert "transformer_blocks.0.attn.to_q" in layers
    assert not [name for name in layers if "norm" in name or not name.startswith(LISTS)]
    assert all(layer.native and layer.weight.dtype == torch.int8 for layer in layers.values())
    quantize_linears(network.transformer_blocks, Precision.INT8, native=True, keep=stays_wide)
    assert layers.keys() == {n for n, child in network.named_modules() if isinstance(child, QuantizedLinear)}
