"""Streaming: the same bits as without it, whatever a device may do in between, and everything put back afterwards."""

from __future__ import annotations

import contextlib
import functools
import random
from collections import Counter
from functools import partial
from itertools import combinations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from autoflux.errors import ContradictoryWishes
from autoflux.planning.schedule import aligned, lay_out
from autoflux.runtime import streamer as streamer_module
from autoflux.runtime.bringing import parts_of
from autoflux.runtime.lanes import DirectLane
from autoflux.runtime.order import layer_atoms
from autoflux.runtime.ring import Arena
from autoflux.runtime.sources import HostUnits, StagedUnits
from autoflux.runtime.stores import KeptStore
from autoflux.runtime.streamer import Streamer
from autoflux.runtime.units import Atom, block_atoms, make_units, rest_of, sequence_atoms
from tests.runtime.fakes import (
    CPU,
    LISTS,
    Chain,
    LateLane,
    Number,
    QueuedChain,
    TwoQueues,
    arena_for,
    hooks_of,
    layer_units,
    output_of,
    poisoned_arena,
    read_ahead_threads,
    staying_bytes,
    tiny_inputs,
    tiny_transformer,
)

LANES = {"direct": DirectLane, "late": LateLane}


@functools.cache
def layer_names() -> list[str]:
    """Tracing takes a second: once is enough, all tiny transformers have the same layers."""
    model = tiny_transformer()
    return [atom.name for atom in layer_atoms(model, lambda: model(**tiny_inputs()))]


def layers_of(model) -> list[Atom]:
    return [Atom(name, model.get_submodule(name)) for name in layer_names()]


CUTS = {
    "blocks": lambda model: make_units(block_atoms(model, LISTS), 0),
    "several blocks": lambda model: make_units(block_atoms(model, LISTS), 200_000),
    "all blocks": lambda model: make_units(block_atoms(model, LISTS), 1 << 40),
    "whole model": lambda model: make_units([Atom("model", model)], 0),
    "layers": lambda model: make_units(layers_of(model), 0),
    "several layers": lambda model: make_units(layers_of(model), 30_000),
}
RESIDENT = {
    "none": lambda count: set(),
    "some": lambda count: {i for i in range(count) if i % 3 == 1},
    "first": lambda count: {0},
    "all": lambda count: set(range(count)),
}
RINGS = {"exact": 1.0, "larger": 1.7, "huge": 20.0}


@pytest.fixture
def model():
    return tiny_transformer()


@pytest.fixture(scope="module")
def expected():
    """Outputs of three passes without streaming."""
    plain = tiny_transformer()
    return [output_of(plain, **tiny_inputs(seed=seed)) for seed in range(3)]


def attached(module, units, resident=(), *, ring=1.0, lane=None, **options):
    """A streamer in an arena of just its size, but for the ring."""
    largest = max((unit.nbytes for i, unit in enumerate(units) if i not in resident), default=0)
    arena = arena_for(module, units, resident, ring_bytes=int(largest * ring), lane=lane)
    return Streamer(module, units, arena, resident, **options)


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("resident", RESIDENT)
@pytest.mark.parametrize("cut", CUTS)
def test_output_is_the_same_bits(model, expected, cut, resident, ring):
    units = CUTS[cut](model)
    staying = RESIDENT[resident](len(units))
    for wraps, lane in ((True, LateLane()), (False, LateLane()), (True, DirectLane())):
        streamer = attached(model, units, staying, ring=RINGS[ring], lane=lane, wraps=wraps)
        assert len(streamer.streamed) == len(units) - len(staying)
        for seed, wanted in enumerate(expected):
            assert torch.equal(output_of(model, **tiny_inputs(seed=seed)), wanted)
        streamer.detach()


@pytest.mark.parametrize("resident", ["some", "all"])
@pytest.mark.parametrize("lane", LANES)
def test_what_stays_on_a_device_that_stores_cannot_write_is_brought_there(model, expected, monkeypatch, lane, resident):
    monkeypatch.setattr(streamer_module, "parts_of", partial(parts_of, most_bytes=5_000))
    units = CUTS["blocks"](model)
    staying = RESIDENT[resident](len(units))
    arena = arena_for(model, units, staying, lane=LANES[lane]())
    arena.device = torch.device("meta")  # by name only: its memory is the processor's
    streamer = Streamer(model, units, arena, staying, store=KeptStore(units))
    for seed, wanted in enumerate(expected):
        assert torch.equal(output_of(model, **tiny_inputs(seed=seed)), wanted)
    streamer.detach()
    assert torch.equal(output_of(model), expected[0])


@pytest.mark.parametrize("cut", ["blocks", "several layers"])
@pytest.mark.parametrize("stage_units", [0, 3, 50])
def test_staged_weights_give_the_same_bits(model, expected, cut, stage_units):
    units = CUTS[cut](model)
    make = partial(StagedUnits, stage_bytes=stage_units * max(unit.nbytes for unit in units))
    streamer = attached(model, units, {1}, ring=1.7, lane=LateLane(), make_source=make)
    for seed, wanted in enumerate(expected):
        assert torch.equal(output_of(model, **tiny_inputs(seed=seed)), wanted)
    streamer.detach()
    assert torch.equal(output_of(model), expected[0])
    assert not list(read_ahead_threads())


def test_bf16_gives_the_same_bits():
    plain, model = tiny_transformer(dtype=torch.bfloat16), tiny_transformer(dtype=torch.bfloat16)
    inputs = tiny_inputs(dtype=torch.bfloat16)
    attached(model, CUTS["layers"](model), lane=LateLane())
    assert torch.equal(output_of(model, **inputs), output_of(plain, **inputs))


# The order of copies and releases


class Diary:
    """A lane that writes down what it is asked, by the names of its streamer's units."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.lines: list[str] = []
        self.made: list[DiaryMark] = []

    def mark(self, *, timing=False):
        self.made.append(DiaryMark(self, len(self.made)))
        return self.made[-1]

    def name(self, mark) -> str:
        # The ring makes one for itself, then a streamer one for the arrival and one for the release of each unit.
        if mark.number == 0:
            return "handed over"
        made_by_streamer = [f"{what} {k}" for what in ("arrived", "released") for k in range(self.count)]
        return dict(enumerate(made_by_streamer, 1)).get(mark.number, "another")

    def copy(self, target, source):
        self.lines.append(f"copy to {target.storage_offset()}")
        target.copy_(source)

    def set_copied(self, mark):
        self.lines.append(f"set {self.name(mark)}")

    def set_computed(self, mark):
        self.lines.append(f"set {self.name(mark)}")

    def copies_wait(self, mark):
        self.lines.append(f"copies wait: {self.name(mark)}")

    def computation_waits(self, mark):
        self.lines.append(f"wait: {self.name(mark)}")

    def take(self) -> list[str]:
        taken, self.lines = self.lines, []
        return taken


class DiaryMark:
    def __init__(self, diary, number) -> None:
        self.diary, self.number = diary, number

    def synchronize(self):
        self.diary.lines.append(f"host waits: {self.diary.name(self)}")


def note_runs(chain, diary):
    for i, layer in enumerate(chain.layers):
        layer.register_forward_pre_hook(lambda *_, i=i: diary.lines.append(f"run {i}"))


BEGIN = ["set handed over", "copies wait: handed over"]


def test_the_order_of_copies_and_releases():
    chain, diary = Chain((16, 16, 16)), Diary(3)
    units = layer_units(chain)
    size = units[0].nbytes
    streamer = attached(chain, units, ring=2, lane=diary)
    note_runs(chain, diary)
    assert not diary.take(), "nothing is copied before it is asked for"
    x = torch.ones(1, 16)

    chain(x)
    first = ["copy to 0", "set arrived 0", f"copy to {size}", "set arrived 1", "wait: arrived 0", "run 0"]
    steady = [
        *("set released 0", "copies wait: released 0", "copy to 0", "set arrived 2"),
        *("wait: arrived 1", "run 1", "set released 1"),
        # The room beside unit 2 stays empty at the end of a pass, because unit 0 lies at the front of the ring.
        *("wait: arrived 2", "run 2", "set released 2"),
        *("copies wait: released 2", "copy to 0", "set arrived 0"),
        *("copies wait: released 1", f"copy to {size}", "set arrived 1"),
    ]
    assert diary.take() == BEGIN + first + steady
    for _ in range(3):
        chain(x)
        assert diary.take() == ["wait: arrived 0", "run 0", *steady]

    streamer.detach()
    assert diary.take() == [*BEGIN, "set another", "host waits: another"]
    chain(x)
    assert diary.take() == ["run 0", "run 1", "run 2"]


def test_without_wrapping_nothing_is_copied_at_the_end_of_a_pass():
    chain, diary = Chain((16, 16)), Diary(2)
    units = layer_units(chain)
    attached(chain, units, ring=2, lane=diary, wraps=False)
    one_pass = [
        *BEGIN,
        *("copy to 0", "set arrived 0", f"copy to {units[0].nbytes}", "set arrived 1"),
        *("wait: arrived 0", "set released 0", "wait: arrived 1", "set released 1"),
    ]
    for _ in range(2):
        chain(torch.ones(1, 16))
        assert diary.take() == one_pass


def test_prefetch_begins_before_the_pass_and_only_once():
    chain, diary = Chain((16, 16)), Diary(2)
    streamer = attached(chain, layer_units(chain), lane=diary)
    streamer.prefetch()
    assert diary.take() == [*BEGIN, "copy to 0", "set arrived 0"]
    streamer.prefetch()
    assert diary.take() == []
    chain(torch.ones(1, 16))
    assert diary.take()[0] == "wait: arrived 0"


def test_prefetch_of_nothing_streamed_leaves_the_ring_alone():
    chain, diary = Chain((16, 16)), Diary(0)
    streamer = attached(chain, layer_units(chain), {0, 1}, lane=diary)
    streamer.prefetch()
    chain(torch.ones(1, 16))
    assert diary.take() == []


# Against a device that does everything as early, as late or as mixed as the marks allow


@st.composite
def tales(draw, largest=70):
    """Two chains in one ring, and what is done with them."""
    sizes = st.lists(st.lists(st.integers(0, largest), min_size=0, max_size=2), min_size=1, max_size=7)
    chains = [draw(sizes), draw(sizes)]
    blocks = [draw(st.sampled_from([0, 600, 1300, 1 << 30])) for _ in chains]
    action = st.tuples(
        st.integers(0, 1),
        st.sampled_from(["pass", "pass", "pass", "fail", "skip", "skip", "prefetch", "look"]),
        st.integers(0, 6),
        st.frozensets(st.integers(0, 6)),
    )
    return chains, blocks, draw(st.lists(action, min_size=1, max_size=14))


def tell(tale, *, resident, spare, wraps, copies_first, make_source=HostUnits):
    """Do what the tale says on a `TwoQueues`; every result must be what the layers make of it at once."""
    sizes, blocks, actions = tale
    device = TwoQueues(copies_first)
    chains = [QueuedChain(device, each, seed=seed) for seed, each in enumerate(sizes)]
    plain = [QueuedChain(device, each, seed=seed) for seed, each in enumerate(sizes)]
    cut = [layer_units(chain, block) for chain, block in zip(chains, blocks, strict=True)]
    staying = [{i for i in range(len(units)) if i in resident} for units in cut]
    largest = max(
        (u.nbytes for units, kept in zip(cut, staying, strict=True) for i, u in enumerate(units) if i not in kept),
        default=0,
    )
    held = sum(staying_bytes(chain, units, kept) for chain, units, kept in zip(chains, cut, staying, strict=True))
    arena = poisoned_arena(resident_bytes=held, ring_bytes=largest + spare, lane=device)
    streamers = [
        Streamer(chain, units, arena, kept, wraps=wraps, make_source=make_source)
        for chain, units, kept in zip(chains, cut, staying, strict=True)
    ]
    results: list[tuple[Number, int]] = []
    for number, (which, action, at, skipped) in enumerate(actions):
        chain, layers = chains[which], plain[which].layers
        if action == "prefetch":
            streamers[which].prefetch()
        elif action == "look":
            device.finish()
        elif action == "fail":
            broken = chain.layers[at % len(layers)]
            broken.fails = True
            with pytest.raises(ArithmeticError):
                chain(Number(number))
            broken.fails = False
        else:
            left_out = skipped if action == "skip" else ()
            wanted = number
            for i, layer in enumerate(layers):
                wanted = wanted if i in left_out else layer.computed(wanted)
            results.append((chain(Number(number), skipped=left_out), wanted))
    device.finish()
    for streamer in streamers:
        streamer.detach()
    assert [made.value for made, _ in results] == [wanted for _, wanted in results]
    for chain, original in zip(chains, plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(chain.parameters(), original.parameters(), strict=True))


SETTINGS = {
    "resident": st.frozensets(st.integers(0, 6), max_size=3),
    "spare": st.integers(0, 12).map(lambda n: n * 256),
    "wraps": st.booleans(),
}


@settings(max_examples=100, deadline=None)
@given(tale=tales(), **SETTINGS)
@pytest.mark.parametrize("policy", ["early", "late"])
def test_copies_as_early_and_as_late_as_they_may_come(policy, tale, resident, spare, wraps):
    tell(tale, resident=resident, spare=spare, wraps=wraps, copies_first=lambda: policy == "early")


@settings(max_examples=100, deadline=None)
@given(tale=tales(), seed=st.integers(0, 1000), **SETTINGS)
def test_copies_in_any_order_with_computing(tale, seed, resident, spare, wraps):
    mixed = random.Random(seed)
    tell(tale, resident=resident, spare=spare, wraps=wraps, copies_first=lambda: mixed.random() < 0.5)


@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(tale=tales(largest=700), seed=st.integers(0, 1000), stage=st.integers(0, 40_000), **SETTINGS)
def test_staged_copies_in_any_order(tale, seed, stage, resident, spare, wraps):
    mixed = random.Random(seed)
    make = partial(StagedUnits, stage_bytes=stage)
    tell(tale, resident=resident, spare=spare, wraps=wraps, copies_first=lambda: mixed.random() < 0.5, make_source=make)
    assert not list(read_ahead_threads())


def test_detaching_waits_for_copies_under_way():
    """Those that own the ring and the host memory may free them next."""
    device = TwoQueues(lambda: False)
    chain = QueuedChain(device, [[5], [6], [7]])
    streamer = attached(chain, layer_units(chain), ring=2, lane=device)
    chain(Number(1))
    assert device.copies_under_way
    streamer.detach()
    assert not device.copies_under_way


# What goes wrong in a pass


@contextlib.contextmanager
def failing(module):
    """The module raises in the middle of its work."""

    def fail(*_):
        raise ArithmeticError

    hook = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("cut", ["blocks", "several blocks", "all blocks", "layers"])
@pytest.mark.parametrize("inside", ["transformer_blocks.1.attn", "single_transformer_blocks.2.proj_mlp", "proj_out"])
def test_the_pass_after_an_error_is_right(model, expected, cut, inside, lane):
    units = CUTS[cut](model)
    attached(model, units, {1} if len(units) > 1 else (), ring=1.7, lane=LANES[lane]())
    for _ in range(2):
        with failing(model.get_submodule(inside)), pytest.raises(ArithmeticError):
            output_of(model)
        assert torch.equal(output_of(model), expected[0])
        assert torch.equal(output_of(model, **tiny_inputs(seed=1)), expected[1])


@pytest.mark.parametrize("broken", range(5))
@pytest.mark.parametrize("asked_next", range(5))
def test_after_an_error_any_layer_may_come_first(broken, asked_next):
    chain, plain, x = Chain(), Chain(), torch.ones(2, 16)
    attached(chain, layer_units(chain), ring=1.5, lane=LateLane())
    for _ in range(2):
        with failing(chain.layers[broken]), pytest.raises(ArithmeticError):
            chain(x)
    given_ = torch.ones(2, plain.layers[asked_next].in_features)
    assert torch.equal(chain.layers[asked_next](given_), plain.layers[asked_next](given_))
    assert torch.equal(chain(x), plain(x))
    assert torch.equal(chain(x), plain(x))


@pytest.mark.parametrize("block_bytes", [0, 4000, 1 << 30])
@pytest.mark.parametrize("skipped", [{0}, {1, 2}, {4}, {0, 3}, {2, 4}, {0, 1, 2, 3}, {0, 1, 2, 3, 4}])
def test_layers_may_be_skipped(skipped, block_bytes):
    chain, plain, x = Chain(), Chain(), torch.ones(2, 16)
    attached(chain, layer_units(chain, block_bytes), ring=1.5, lane=LateLane())
    for left_out in (skipped, (), skipped, skipped, ()):
        assert torch.equal(chain(x, skipped=left_out), plain(x, skipped=left_out))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("ring", [1, 2])
def test_any_layers_of_units_of_two_may_be_skipped(ring, lane):
    chain, plain, x = Chain((16, 16, 16, 16)), Chain((16, 16, 16, 16)), torch.ones(2, 16)
    streamer = attached(chain, layer_units(chain, 2 * layer_units(chain)[0].nbytes), ring=ring, lane=LANES[lane]())
    assert len(streamer.streamed) == 2
    for count in range(5):
        for skipped in combinations(range(4), count):
            for left_out in (skipped, skipped, ()):
                assert torch.equal(chain(x, skipped=left_out), plain(x, skipped=left_out))


def test_a_unit_that_broke_off_is_brought_again_after_another_had_the_ring():
    chains, plain = ([Chain((16, 16, 16, 16), seed=seed) for seed in range(2)] for _ in "ab")
    cut = [layer_units(chain, 2 * layer_units(chain)[0].nbytes) for chain in chains]
    arena = poisoned_arena(ring_bytes=cut[0][0].nbytes)
    for chain, units in zip(chains, cut, strict=True):
        Streamer(chain, units, arena)
    x = torch.ones(1, 16)
    with failing(chains[0].layers[1]), pytest.raises(ArithmeticError):
        chains[0](x)
    assert torch.equal(chains[1](x), plain[1](x))
    assert torch.equal(chains[0](x, skipped={0}), plain[0](x, skipped={0}))


class Unreliable(HostUnits):
    """A source that lacks a unit when it is told to."""

    lacks: int | None = None

    def get(self, index):
        if index == self.lacks:
            raise OSError("unreadable")
        return super().get(index)


@pytest.mark.parametrize("lane", LANES)
def test_a_unit_that_broke_off_is_brought_again_after_its_source_failed(lane):
    widths = (16,) * 8
    chain, plain, x = Chain(widths), Chain(widths), torch.ones(1, 16)
    units = layer_units(chain, 2 * layer_units(chain)[0].nbytes)
    made: list[Unreliable] = []

    def make(*given_) -> Unreliable:
        made.append(Unreliable(*given_))
        return made[-1]

    attached(chain, units, ring=2, lane=LANES[lane](), make_source=make)
    with failing(chain.layers[1]), pytest.raises(ArithmeticError):
        chain(x)
    # Unit 2 takes the place of unit 0, and unit 3 does not come.
    made[0].lacks = 3
    with pytest.raises(OSError, match="unreadable"):
        chain(x, skipped={0, 1, 2, 3})
    made[0].lacks = None
    for skipped in ({0}, ()):
        assert torch.equal(chain(x, skipped=skipped), plain(x, skipped=skipped))


class Slow(HostUnits):
    """A source whose units are never there before they are needed; writes down when it is asked."""

    def __init__(self, *given) -> None:
        super().__init__(*given)
        self.diary: list[str] = []

    def ready(self) -> bool:
        return False

    def get(self, index):
        self.diary.append(f"get {index}")
        return super().get(index)


@pytest.mark.parametrize("lane", LANES)
def test_nobody_waits_for_a_unit_before_it_is_needed(lane):
    chain, plain, x = Chain((16, 16, 16, 16)), Chain((16, 16, 16, 16)), torch.ones(1, 16)
    made: list[Slow] = []

    def make(*given) -> Slow:
        made.append(Slow(*given))
        return made[-1]

    attached(chain, layer_units(chain), ring=3, lane=LANES[lane](), make_source=make)
    for i, layer in enumerate(chain.layers):
        layer.register_forward_hook(lambda *_, i=i: made[0].diary.append(f"computed {i}"))
    for _ in range(2):
        assert torch.equal(chain(x), plain(x))
    assert made[0].diary == 2 * [done for i in range(len(chain.layers)) for done in (f"get {i}", f"computed {i}")]


def test_skipping_the_first_layer_of_a_unit_brings_the_unit():
    chain, diary = Chain((16, 16, 16, 16)), Diary(2)
    attached(chain, layer_units(chain, 2 * layer_units(chain)[0].nbytes), lane=diary)
    chain(torch.ones(1, 16), skipped={0})
    assert diary.take()[:5] == [*BEGIN, "copy to 0", "set arrived 0", "wait: arrived 0"]


# Several streamers in one arena


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("wraps", [True, False])
def test_two_transformers_take_turns_in_one_ring(lane, wraps):
    models, plain = ([tiny_transformer(seed) for seed in (1, 2)] for _ in range(2))
    cut = [CUTS["blocks"](models[0]), CUTS["layers"](models[1])]
    kept = [{1}, {0, 7}]
    held = sum(staying_bytes(*each) for each in zip(models, cut, kept, strict=True))
    ring = max(unit.nbytes for unit in cut[0])
    arena = poisoned_arena(resident_bytes=held, ring_bytes=ring + 5000, lane=LANES[lane]())
    streamers = [Streamer(m, u, arena, k, wraps=wraps) for m, u, k in zip(models, cut, kept, strict=True)]
    for seed, which in enumerate((0, 1, 1, 0, 0, 1)):
        streamers[which].prefetch()
        inputs = tiny_inputs(seed=seed)
        assert torch.equal(output_of(models[which], **inputs), output_of(plain[which], **inputs))
    streamers[0].detach()
    assert torch.equal(output_of(models[1]), output_of(plain[1]))
    assert torch.equal(output_of(models[0]), output_of(plain[0]))


def test_residents_of_two_streamers_never_lie_together():
    chains, plain = ([Chain(seed=seed) for seed in range(4)] for _ in range(2))
    cut = [layer_units(chain) for chain in chains]
    arena = poisoned_arena(resident_bytes=4 * staying_bytes(chains[0], cut[0], range(5)))
    x = torch.ones(1, 16)
    first, second = (Streamer(chains[i], cut[i], arena, range(5)) for i in (0, 1))
    first.detach()
    for i in (2, 3):
        Streamer(chains[i], cut[i], arena, range(5))
    assert all(torch.equal(chain(x), original(x)) for chain, original in zip(chains, plain, strict=True))
    second.detach()
    assert all(torch.equal(chain(x), original(x)) for chain, original in zip(chains, plain, strict=True))


def test_room_that_was_given_back_is_taken_again():
    chain = Chain()
    units = layer_units(chain)
    arena = arena_for(chain, units, {0, 2})
    for _ in range(5):
        Streamer(chain, units, arena, {0, 2}).detach()


def test_the_arena_is_never_exceeded():
    chain, x = Chain(), torch.ones(1, 16)
    units = layer_units(chain)
    wanted = chain(x)
    before = {name: weight.data_ptr() for name, weight in chain.named_parameters()}
    with pytest.raises(ValueError, match="does not fit a ring"):
        Streamer(chain, units, poisoned_arena(resident_bytes=1 << 20, ring_bytes=256))
    assert {name: weight.data_ptr() for name, weight in chain.named_parameters()} == before
    held = staying_bytes(chain, units, {0, 1})
    arena = poisoned_arena(resident_bytes=held - 256, ring_bytes=1 << 20)
    with pytest.raises(ValueError, match=f"{held} bytes of resident weights in an arena made for {held - 256}"):
        Streamer(chain, units, arena, {0, 1}, make_source=StagedUnits)
    assert not hooks_of(chain)
    assert not list(read_ahead_threads())
    assert torch.equal(chain(x), wanted)


@pytest.mark.parametrize("cut", ["blocks", "layers"])
def test_weights_stay_in_their_places_in_the_arena(model, cut):
    units = CUTS[cut](model)
    arena = arena_for(model, units, {1})
    streamer = Streamer(model, units, arena, {1})
    output_of(model)
    places = [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
    spans = [
        range(memory.data_ptr(), memory.data_ptr() + memory.numel()) for memory in (arena.resident, arena.ring.memory)
    ]
    assert all(any(place in span for span in spans) for place in places)
    assert arena.nbytes == streamer.resident_bytes + max(unit.nbytes for unit in streamer.streamed)
    for _ in range(3):
        output_of(model)
        assert [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())] == places


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count[str(operation)] += 1
        return operation(*args, **(kwargs or {}))


def test_a_steady_pass_does_nothing_more_than_copy_each_unit_once(model):
    with Operations() as plain:
        output_of(model)
    streamer = attached(model, CUTS["blocks"](model), {2}, ring=1.7)
    output_of(model)
    with Operations() as streamed:
        output_of(model)
    assert streamed.count - plain.count == {"aten.copy_.default": len(streamer.streamed)}
    assert not plain.count - streamed.count


def test_sizes_that_a_streamer_reports():
    chain = Chain()
    units = layer_units(chain)
    streamer = attached(chain, units, {1, 3})
    assert streamer.streamed == (units[0], units[2], units[4])
    assert streamer.streamed_bytes == streamer.pinned_bytes == sum(units[i].nbytes for i in (0, 2, 4))
    assert streamer.resident_bytes == units[1].nbytes + units[3].nbytes


# Weights under two names


class Tied(nn.Module):
    """As T5: the embedding hangs in two places, and the second is what runs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Linear(16, 16)
        self.embed = nn.Linear(16, 16)
        self.embed.weight, self.embed.bias = self.shared.weight, self.shared.bias
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.requires_grad_(requires_grad=False)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("per_unit", [1, 2, 4])
@pytest.mark.parametrize("before", [0, 1])
def test_a_weight_under_two_names_is_brought_for_either(before, per_unit, lane):
    module, plain, x = Tied(), Tied(), torch.ones(1, 16)
    atoms = sequence_atoms(module)
    assert [atom.name for atom in atoms] == ["shared", "layers.0", "layers.1", "layers.2"]
    assert atoms[0].tied == (module.embed,)
    if before:  # it then is the second of its unit
        extra = Atom("extra", nn.Linear(4, 4))
        module.extra, atoms = extra.module, [extra, *atoms]
    units = make_units(atoms, per_unit * layer_units(module)[0].nbytes)
    streamer = attached(module, units, ring=1.5, lane=LANES[lane]())
    for _ in range(3):
        assert torch.equal(module(x), plain(x))
    streamer.detach()
    assert module.embed.weight is module.shared.weight
    assert torch.equal(module(x), plain(x))


# Attaching and detaching


def snapshot(module):
    """Everything about a module that a streamer might change."""
    state = [
        (
            name,
            id(tensor),
            tensor.detach().clone(),
            tensor.device,
            tensor.dtype,
            tensor.shape,
            tensor.requires_grad,
            tensor.is_inference(),
        )
        for name, tensor in module.state_dict(keep_vars=True).items()
    ]
    attributes = {name: sorted(vars(child)) for name, child in module.named_modules()}
    return state, attributes, hooks_of(module)


def assert_same(left, right):
    for one, other in zip(left[0], right[0], strict=True):
        assert torch.equal(one[2], other[2])
        assert (*one[:2], *one[3:]) == (*other[:2], *other[3:])
    assert left[1:] == right[1:]


@pytest.mark.parametrize("make_source", [HostUnits, StagedUnits])
@pytest.mark.parametrize("cut", ["blocks", "layers"])
def test_detach_restores_everything(model, expected, cut, make_source):
    model.register_buffer("scale", torch.arange(7))
    model.proj_out.weight.requires_grad_(requires_grad=False)
    before = snapshot(model)
    units = CUTS[cut](model)
    for lane in (LateLane(), LateLane()):
        arena = arena_for(model, units, {1}, lane=lane)
        streamer = Streamer(model, units, arena, {1}, make_source=make_source)
        for _ in range(2):
            assert torch.equal(output_of(model), expected[0])
        streamer.detach()
        assert_same(snapshot(model), before)
        arena.resident.fill_(0)
        arena.ring.memory.fill_(0)
        streamer.detach()
        assert_same(snapshot(model), before)
        assert torch.equal(output_of(model), expected[0])
    assert not list(read_ahead_threads())


@pytest.mark.parametrize("moment", ["before", "during"])
def test_detach_without_a_whole_pass(model, expected, moment):
    before = snapshot(model)
    streamer = attached(model, CUTS["blocks"](model), {1}, lane=LateLane())
    if moment == "during":
        with failing(model.single_transformer_blocks[1]), pytest.raises(ArithmeticError):
            output_of(model)
    streamer.detach()
    assert_same(snapshot(model), before)


def test_attach_inside_inference_mode(model, expected):
    before = snapshot(model)
    with torch.inference_mode():
        streamer = attached(model, CUTS["blocks"](model), {1}, ring=1.7, lane=LateLane())
        assert torch.equal(model(**tiny_inputs())[0], expected[0])
    assert torch.equal(output_of(model), expected[0])
    with torch.inference_mode():
        assert torch.equal(model(**tiny_inputs())[0], expected[0])
        streamer.detach()
    assert_same(snapshot(model), before)
    assert torch.equal(output_of(model), expected[0])
    model(**tiny_inputs())[0].sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize("make_source", [HostUnits, StagedUnits])
def test_closing_ends_everything_without_putting_it_back(make_source):
    chain, device = Chain(), LateLane()
    streamer = attached(chain, layer_units(chain), {1}, lane=device, make_source=make_source)
    chain(torch.ones(1, 16))
    places = [weight.data_ptr() for weight in chain.parameters()]
    streamer.close()
    assert not device.waiting
    assert not hooks_of(chain)
    assert not list(read_ahead_threads())
    assert [weight.data_ptr() for weight in chain.parameters()] == places


def test_a_model_with_nothing_to_stream_is_only_moved(model, expected):
    streamer = attached(model, [])
    assert torch.equal(output_of(model), expected[0])
    streamer.detach()
    assert torch.equal(output_of(model), expected[0])


def test_weights_shared_between_units_are_refused(model):
    model.single_transformer_blocks[2].proj_mlp.weight = model.single_transformer_blocks[0].proj_mlp.weight
    with pytest.raises(ContradictoryWishes, match=r"single_transformer_blocks\.0.*single_transformer_blocks\.2.*share"):
        CUTS["blocks"](model)
    with pytest.raises(ContradictoryWishes) as raised:
        CUTS["layers"](model)
    assert "larger block size" in raised.value.hint


def test_weights_shared_within_a_unit_are_streamed_once():
    chain, plain, x = Chain((16, 16, 16)), Chain((16, 16, 16)), torch.ones(1, 16)
    for each in (chain, plain):
        each.layers[1].weight = each.layers[0].weight
    units = layer_units(chain, 1 << 30)
    assert units[0].nbytes == sum(aligned(weight.nbytes) for weight in chain.parameters())
    streamer = attached(chain, units, lane=LateLane())
    assert torch.equal(chain(x), plain(x))
    streamer.detach()
    assert chain.layers[1].weight is chain.layers[0].weight
    assert torch.equal(chain(x), plain(x))


def test_a_ring_of_one_unit_holds_one_unit():
    chain = Chain((16, 16, 16))
    units = layer_units(chain)
    assert lay_out([unit.nbytes for unit in units], units[0].nbytes).distances == (1, 1, 1)
    assert attached(chain, units)._ring.memory.device == CPU


@pytest.mark.parametrize("make_source", [HostUnits, StagedUnits])
def test_what_stays_gives_its_memory_away_and_comes_back(model, expected, make_source):
    before = snapshot(model)
    units = CUTS["blocks"](model)
    lane = LateLane()
    arena = Arena(
        CPU,
        resident_bytes=sum(aligned(unit.nbytes) for unit in (units[1], units[3], rest_of(model, units))),
        ring_bytes=max(unit.nbytes for unit in units),
        parks=True,
        lane=lane,
    )
    streamer = Streamer(model, units, arena, {1, 3}, make_source=make_source)
    assert torch.equal(output_of(model), expected[0])
    for _ in range(2):
        arena.park()
        assert arena.resident.untyped_storage().nbytes() == 0
        arena.park()
        arena.unpark()
        assert torch.equal(output_of(model), expected[0])
    if make_source is HostUnits:
        assert streamer.pinned_bytes == sum(unit.nbytes for unit in (*units, rest_of(model, units)))
    arena.park()
    streamer.detach()
    assert_same(snapshot(model), before)
    assert torch.equal(output_of(model), expected[0])
    assert not list(read_ahead_threads())
