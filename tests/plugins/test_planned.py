"""Whatever a plan can say is what happens, in both backends: each field, against the picture with everything there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from autoflux.plugins.diffusers_backend import DiffusersBackend
from autoflux.plugins.diffusers_loading import DIFFUSERS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import autoflux
from autoflux import ContradictoryWishes, Placement, Plan, Precision, UnknownName, Waiting, Wishes, attending
from autoflux.models.pack_shelf import NO_PACK
from autoflux.models.request import Request
from autoflux.planning.activations import WIDEST_PRODUCT, largest_tensor_bytes
from autoflux.planning.terms import TransferUnit
from autoflux.runtime.quantized import QuantizedLinear
from autoflux.runtime.sources import HostUnits, StagedUnits
from autoflux.runtime.streamer import Streamer
from tests.plugins.plans import changed, streamed

PROMPT = "two large green squares above the small yellow star"
ENCODERS = ("text_encoder", "text_encoder_2")


@pytest.fixture(scope="module", autouse=True)
def no_packs():
    """Weights come from the model's files, also where other tests have left packs of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(NO_PACK, "1")
        yield


@pytest.fixture(scope="module", params=["diffusers", "diffsynth"])
def session(request, tiny_model: Path):
    """Everything on the device."""
    if request.param == "diffsynth":
        pytest.importorskip("diffsynth", reason="needs the extra: pip install 'autoflux[diffsynth]'")
    with autoflux.load(str(tiny_model), wishes=Wishes(device="cpu", backend=request.param)) as opened:
        yield opened


def drawn(session: autoflux.Session) -> np.ndarray:
    return np.asarray(session.generate(PROMPT, seed=3, steps=3)[0].image)


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that anything gives."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, operation, _types, args=(), kwargs=None):
        given = operation(*args, **(kwargs or {}))
        tensors = [tensor for tensor in tree_leaves(given) if isinstance(tensor, torch.Tensor)]
        self.nbytes = max([self.nbytes, *(tensor.nbytes for tensor in tensors)])
        return given


def decibels(found: np.ndarray, wanted: np.ndarray) -> float:
    """Peak signal-to-noise ratio."""
    error = np.square(found.astype(float) - wanted).mean()
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


@pytest.fixture
def load(tiny_model: Path):
    """Open a session of a plan; it is closed at the end."""
    opened = []

    def begin(plan: Plan) -> autoflux.Session:
        opened.append(autoflux.load(str(tiny_model), plan=plan))
        return opened[-1]

    yield begin
    for session in opened:
        session.close()


@pytest.fixture
def same(session, load):
    """Draw as planned and expect the same picture, to the bit; gives the session."""

    def check(plan: Plan) -> autoflux.Session:
        under_plan = load(plan)
        assert np.array_equal(drawn(under_plan), drawn(session))
        return under_plan

    return check


def residences(session: autoflux.Session):
    return session.pipeline._residences


def transformer_units(session: autoflux.Session) -> list[str]:
    """Names of what is streamed of the transformer."""
    return [unit.name for unit in residences(session)._transformer.blocks.streamer.streamed]


def test_each_component_waits_where_its_own_plan_says(session, same):
    plan = changed(streamed(session.plan), ENCODERS, waiting=Waiting.DISK)
    held = residences(same(changed(plan, ("vae",), waiting=Waiting.PAGEABLE)))
    sources = {name: part.streamer._source for name, part in held._others.items()}
    assert {name: type(source) for name, source in sources.items()} == dict.fromkeys((*ENCODERS, "vae"), StagedUnits)
    assert {type(part.streamer._source) for part in held._transformer.parts} == {HostUnits}
    assert set(held._stores) == set(ENCODERS)


def test_closing_closes_the_files(session, load):
    under_plan = load(changed(streamed(session.plan), ENCODERS, waiting=Waiting.DISK))
    stores = list(residences(under_plan)._stores.values())
    assert all(store._files for store in stores)
    under_plan.close()
    assert not any(store._files for store in stores)


@pytest.mark.parametrize("kept", [ENCODERS, ("vae",), (*ENCODERS, "vae"), ("text_encoder",)])
@pytest.mark.parametrize("placement", [Placement.DEVICE, Placement.HOST, Placement.VISITING])
def test_components_beside_a_streamed_transformer_need_not_be_streamed(session, same, kept, placement):
    plan = changed(streamed(session.plan, resident=(1, 4)), kept, placement=placement)
    assert plan.park_for_decode
    assert set(residences(same(plan))._others) == {*ENCODERS, "vae"} - set(kept)


def test_a_transformer_may_stay_while_the_others_are_streamed(session, same):
    plan = changed(streamed(session.plan, hoist=False), ("transformer",), placement=Placement.DEVICE)
    assert set(residences(same(plan))._others) == {*ENCODERS, "vae"}


def test_the_processor_encodes_for_a_device_that_computes_the_rest(session):
    """A device that stores nothing: whatever ran there could give no number."""
    plan = changed(session.plan.replace(device="meta"), (*ENCODERS, "vae"), placement=Placement.HOST)
    pipeline = DiffusersBackend().build(plan, session.model, lambda _stage, _share: None)
    made = {}
    for name in ENCODERS:
        getattr(pipeline._pipe, name).register_forward_hook(
            lambda _module, _given, output, name=name: made.update({name: output[0]})
        )
    (conditioning,) = pipeline.encode([PROMPT])
    (wanted,) = session.pipeline.encode([PROMPT])
    assert torch.equal(made["text_encoder_2"], wanted.tokens)
    assert made["text_encoder"].device.type == "cpu"
    assert {conditioning.tokens.device.type, conditioning.pooled.device.type} == {"meta"}
    assert {parameter.device.type for parameter in pipeline._transformer.parameters()} == {"meta"}


def test_components_may_compute_in_other_formats_than_the_transformer(session, load):
    plan = changed(session.plan, ("transformer",), storage=Precision.BFLOAT16, arithmetic=Precision.BFLOAT16)
    mixed = load(plan)
    (conditioning,) = mixed.pipeline.encode([PROMPT])
    assert conditioning.tokens.dtype == mixed.pipeline.pack(conditioning)["pooled"].dtype == torch.float32
    assert mixed.begin(autoflux.Request(prompt=PROMPT, seed=3, steps=3, guidance=3.5, width=64, height=64)) is not None
    assert decibels(drawn(mixed), drawn(session)) > 30


def narrow(plan: Plan, storage: Precision, *, native: bool) -> Plan:
    return changed(plan, ("transformer",), storage=storage, native=native)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("storage", [Precision.INT8, Precision.FLOAT8])
def test_in_eight_bits_pictures_are_close_and_the_same_wherever_weights_are(session, load, storage, native):
    plan, kinds = session.plan, set()
    pictures = []
    for arranged in (
        plan,
        changed(plan, ("transformer",), placement=Placement.VISITING),
        streamed(plan, hoist=False),
        streamed(plan, resident=(0, 3)),
        streamed(plan, waiting="pageable"),
    ):
        under_plan = load(narrow(arranged, storage, native=native))
        pictures.append(drawn(under_plan))
        linears = [m for m in under_plan.pipeline._transformer.modules() if isinstance(m, QuantizedLinear)]
        kinds.add((len(linears) > 20, *{(m.weight.dtype, m.native) for m in linears}))
    assert kinds == {(True, (getattr(torch, storage), native))}
    assert all(np.array_equal(picture, pictures[0]) for picture in pictures)
    assert 30 < decibels(pictures[0], drawn(session)) < 100


def test_in_eight_bits_half_of_the_bytes_are_streamed(session, load):
    def streamed_bytes(plan: Plan) -> int:
        return residences(load(plan))._transformer.blocks.streamer.streamed_bytes

    wide = streamed(changed(session.plan, ("transformer",), storage=Precision.BFLOAT16, arithmetic=Precision.BFLOAT16))
    assert streamed_bytes(narrow(wide, Precision.INT8, native=False)) < 0.7 * streamed_bytes(wide)


@pytest.mark.parametrize("hoist", [True, False])
@pytest.mark.parametrize(("resident", "waiting"), [((), "pinned"), ((0, 3), "disk")])
def test_layer_by_layer_pictures_are_the_same(session, same, resident, waiting, hoist):
    plan = streamed(session.plan, resident=resident, waiting=waiting, hoist=hoist).replace(ring_bytes=0)
    by_block, by_layer = same(plan), same(plan.replace(unit=TransferUnit.LAYER))
    block, layer = (residences(s)._transformer.blocks.largest_streamed for s in (by_block, by_layer))
    assert layer < block
    names, blocks = transformer_units(by_layer), transformer_units(by_block)
    assert len(names) > 5 * len(blocks)
    inside = [name for name in names if name.startswith(tuple(f"{block}." for block in blocks))]
    # Embedders are called for the modulation too, outside of the pass.
    assert (inside == names) == hoist


def test_layers_are_brought_in_the_order_they_run(session, load, monkeypatch):
    """Or the ring would begin anew, and nothing come ahead."""
    begun = []
    begin = Streamer._begin

    def noted(streamer, number):
        begun.append(streamer)
        begin(streamer, number)

    monkeypatch.setattr(Streamer, "_begin", noted)
    by_layer = load(streamed(session.plan).replace(unit=TransferUnit.LAYER))
    drawn(by_layer)
    assert begun.count(residences(by_layer)._transformer.blocks.streamer) == 1


def test_graphs_are_forgotten_before_what_they_read_leaves_the_device(session, load, monkeypatch):
    done = []
    opened = load(streamed(session.plan, resident=(0, 2)).replace(park_for_decode=True))
    held = residences(opened)
    monkeypatch.setattr(held._transformer, "forget_graphs", lambda: done.append("forgotten"))
    monkeypatch.setattr(held._arena, "park", lambda: done.append("parked"))
    drawn(opened)
    assert done == ["forgotten", "parked"]
    done.clear()
    opened.pipeline.encode(["another"])
    assert done == ["forgotten"], "a picture that was cancelled had no decode"


def test_layers_in_eight_bits_are_streamed_as_blocks_are(session, load):
    plan = narrow(streamed(session.plan), Precision.INT8, native=True)
    by_layer = load(plan.replace(unit=TransferUnit.LAYER))
    assert np.array_equal(drawn(by_layer), drawn(load(plan)))


@pytest.mark.parametrize(
    ("unit", "block_bytes"), [("block", 150_000), ("block", 1 << 30), ("layer", 20_000), ("layer", 1 << 30)]
)
def test_several_are_copied_at_once(session, same, unit, block_bytes):
    plan = streamed(session.plan, resident=(2,)).replace(unit=TransferUnit(unit), ring_bytes=0)
    one_by_one = len(transformer_units(same(plan)))
    names = transformer_units(same(plan.replace(block_bytes=block_bytes)))
    assert len(names) < one_by_one
    if block_bytes == 1 << 30:
        # The block that stays is between them.
        assert len(names) == 2


def test_compiled_blocks_are_streamed_too_and_are_as_they_were_after_closing(session, same):
    blocks = [
        streamed(session.plan),
        session.plan,
        changed(session.plan, ("transformer",), placement=Placement.VISITING),
    ]
    for plan in blocks:
        with torch.compiler.set_stance("force_eager"):  # the compiler's own work is not tested here
            compiled = same(plan.replace(compiled=True))
        lists = [block for blocks in compiled.pipeline.block_lists().values() for block in blocks]
        assert all("forward" in vars(block) for block in lists)
        compiled.close()
        assert not any("forward" in vars(block) for block in lists)


def test_attention_is_computed_by_what_the_plan_says_and_then_as_before():
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

    before = Registry.get_active_backend()
    with DIFFUSERS.attending("cudnn"):
        assert Registry.get_active_backend()[0].value == "_native_cudnn"
    with DIFFUSERS.attending("default"):
        assert Registry.get_active_backend() == before
    assert Registry.get_active_backend() == before
    cuda = torch.backends.cuda
    with attending("cudnn"):
        assert (cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.math_sdp_enabled()) == (True, False, False)
    with attending("default"):
        assert cuda.flash_sdp_enabled()
    assert cuda.flash_sdp_enabled()


INT8 = Precision.INT8
CONTRADICTIONS = {
    "to wait on the disk and to be held as int8": lambda p: changed(streamed(p, waiting="disk"), storage=INT8),
    "'text_encoder_2' is to be held as int8": lambda p: changed(p, ("text_encoder_2",), storage=INT8),
    "to multiply in 8 bits weights held as float32": lambda p: changed(p, native=True),
    "held as bfloat16 and computed in float32": lambda p: changed(p, storage=Precision.BFLOAT16),
    "does not multiply in float8": lambda p: changed(p.replace(device="meta"), storage=Precision.FLOAT8, native=True),
    "processor is to compute the transformer": lambda p: changed(p.replace(device="meta"), placement=Placement.HOST),
    "own offload brings": lambda p: changed(p.replace(compiled=True), placement=Placement.NATIVE),
    "hoisted out of a transformer that is not streamed": lambda p: p.replace(hoist_modulation=True),
    "layers are brought one by one": lambda p: streamed(p).replace(compiled=True, unit=TransferUnit.LAYER),
    "from CUDA graphs whose layers": lambda p: streamed(p).replace(graphs=True, unit=TransferUnit.LAYER),
    "from CUDA graphs that are not streamed": lambda p: p.replace(graphs=True),
    "there are no CUDA graphs on 'cpu'": lambda p: streamed(p).replace(graphs=True),
    "no attention of cuDNN": lambda p: p.replace(attention="cudnn"),
    "block 5 of 'transformer' is to stay": lambda p: streamed(p, resident=(0, 5)),
}


@pytest.mark.parametrize("reason", CONTRADICTIONS)
def test_what_excludes_itself_is_refused_by_name(session, reason):
    from autoflux.plugin_manager import load_plugins

    plan = CONTRADICTIONS[reason](session.plan)
    backend = load_plugins(entry_points=False).backends.get(plan.backend)
    with pytest.raises(ContradictoryWishes, match=reason) as caught:
        backend.build(plan, session.model, lambda _stage, _share: None)
    assert caught.value.hint


def test_an_unknown_way_of_attention_is_told(session, tiny_model):
    with pytest.raises(UnknownName, match="cudnn") as caught:
        autoflux.load(str(tiny_model), plan=session.plan.replace(attention="cuddn"))
    assert caught.value.hint == "did you mean 'cudnn'?"


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["default", "cudnn"])
def test_on_a_card_fields_of_a_plan_keep_the_picture(tiny_model, attention):
    with autoflux.load(str(tiny_model), wishes=Wishes(device="cuda")) as opened:
        wanted, plan = drawn(opened), opened.plan.replace(attention=attention)
    on_host = changed(streamed(plan), (*ENCODERS, "vae"), placement=Placement.HOST)
    layers = streamed(plan).replace(unit=TransferUnit.LAYER, graphs=False)
    for arranged in (plan, streamed(plan), layers, on_host):
        for compiled in (False, arranged.unit == TransferUnit.BLOCK):
            with autoflux.load(str(tiny_model), plan=arranged.replace(compiled=compiled)) as under_plan:
                assert decibels(drawn(under_plan), wanted) > 30


@pytest.mark.gpu
@pytest.mark.parametrize("parked", [False, True])
@pytest.mark.parametrize("backend", ["diffusers", "diffsynth"])
def test_on_a_card_pictures_from_graphs_are_the_same_to_the_bit(tiny_model, backend, parked, caplog):
    """Several in a row: graphs are kept over a decode, or recorded anew where what stays is parked."""
    with autoflux.load(str(tiny_model), wishes=Wishes(device="cuda", backend=backend)) as opened:
        plan = streamed(opened.plan, resident=(0, 2)).replace(park_for_decode=parked)
    pictures = []
    for graphs in (False, True):
        with autoflux.load(str(tiny_model), plan=plan.replace(graphs=graphs)) as under_plan:
            pictures.append([drawn(under_plan) for _ in range(3)])
    for launched, replayed in zip(*pictures, strict=True):
        assert np.array_equal(launched, replayed)
    assert "not replayed" not in caplog.text


@pytest.mark.parametrize("kind", ["wide", "int8", "int8 multiplied", "fp8"])
def test_no_tensor_of_a_step_is_larger_than_what_a_limit_of_memory_leaves_room_for(session, load, kind):
    storage = {"wide": Precision.FLOAT32, "fp8": Precision.FLOAT8}.get(kind, Precision.INT8)
    plan = changed(session.plan, storage=storage, native=kind == "int8 multiplied")
    under_plan = load(plan) if storage != Precision.FLOAT32 else session
    request = Request(prompt=PROMPT, seed=1, steps=2, guidance=3.5, width=128, height=128)
    drawings = [under_plan.begin(request) for _ in range(2)]
    under_plan.advance(drawings)  # positions are computed once
    with Largest() as step:
        under_plan.advance(drawings)
    picture = plan.predicted.picture.replace(width=128, height=128, batch=2)
    room = largest_tensor_bytes(session.model, plan.arrangement, picture)
    assert step.nbytes <= room
    if plan.backend == "diffsynth" and kind == "wide":
        assert step.nbytes == room, f"{WIDEST_PRODUCT} is too wide"
