"""What a streamer reports: which marks are set in which order, and the times made of them."""

from __future__ import annotations

import pytest
import torch

from autoflux.runtime.lanes import DirectLane
from autoflux.runtime.streamer import Streamer
from autoflux.runtime.telemetry import SILENT, Recording
from tests.runtime.fakes import Chain, arena_for, layer_units, poisoned_arena, staying_bytes

X = torch.ones(1, 16)


class Calls:
    """A recorder that writes down what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def asked(self, index, /):
        self.lines.append(f"asked {index}")

    def began(self, index, /):
        self.lines.append(f"began {index}")

    def ended(self, index, /):
        self.lines.append(f"ended {index}")

    def sending(self, index, /):
        self.lines.append(f"sending {index}")

    def sent(self, index, /):
        self.lines.append(f"sent {index}")

    def take(self) -> list[str]:
        taken, self.lines = self.lines, []
        return taken


class Clock:
    """A lane on which each copy takes 4 seconds, and each of the other moments comes a second after the last."""

    class _Mark:
        at: float | None = None

        def synchronize(self):
            assert self.at is not None, "waited for a mark that was never set"

        def elapsed_time(self, end):
            return 1000 * (end.at - self.at)

    def __init__(self) -> None:
        self.now = 0.0
        self.timing = 0

    def mark(self, *, timing=False):
        self.timing += timing
        return self._Mark()

    def _tick(self, mark):
        self.now += 1
        mark.at = self.now

    set_copied = set_computed = _tick

    def copy(self, target, source):
        self.now += 4
        target.copy_(source)

    def copies_wait(self, mark):
        mark.synchronize()

    computation_waits = copies_wait


def streamed(chain, resident=(), *, ring=1.0, lane=None, **options):
    units = layer_units(chain)
    largest = max((u.nbytes for i, u in enumerate(units) if i not in resident), default=0)
    return Streamer(
        chain, units, arena_for(chain, units, resident, ring_bytes=int(largest * ring), lane=lane), resident, **options
    )


def run_of(index):
    return [f"asked {index}", f"began {index}", f"ended {index}"]


def copy_of(index):
    return [f"sending {index}", f"sent {index}"]


def test_what_is_reported_in_which_order():
    chain, calls = Chain((16, 16, 16)), Calls()
    streamer = streamed(chain, {1})  # 0 and 2 share the ring's only place
    streamer.record(calls)
    chain(X)
    assert calls.take() == [*copy_of(0), *run_of(0), *copy_of(2), *run_of(1), *run_of(2), *copy_of(0)]
    chain(X)
    assert calls.take() == [*run_of(0), *copy_of(2), *run_of(1), *run_of(2), *copy_of(0)]


class Waits(DirectLane):
    """A lane that writes its waits between what a recorder is told."""

    def __init__(self, calls) -> None:
        self.calls = calls

    def copies_wait(self, mark):
        self.calls.lines.append("copies wait")

    def computation_waits(self, mark):
        self.calls.lines.append("wait")


def test_waiting_is_counted_as_waiting_and_neither_as_copying_nor_as_computing():
    chain, calls = Chain((16, 16)), Calls()
    streamed(chain, lane=Waits(calls)).record(calls)
    chain(X)
    calls.take()
    chain(X)
    assert calls.take() == [
        *("asked 0", "wait", "began 0", "ended 0", "copies wait", "sending 1", "sent 1"),
        *("asked 1", "wait", "began 1", "ended 1", "copies wait", "sending 0", "sent 0"),
    ]


def test_resident_units_are_reported_when_nothing_is_streamed():
    chain, calls = Chain((16, 16)), Calls()
    streamed(chain, {0, 1}).record(calls)
    chain(X)
    assert calls.take() == [*run_of(0), *run_of(1)]


def test_silence_ends_the_reports_and_leaves_no_hook():
    chain, calls = Chain((16, 16, 16)), Calls()
    streamer = streamed(chain, {1})
    resident = chain.layers[1]
    assert not resident._forward_pre_hooks
    streamer.record(calls)
    streamer.record(calls)
    assert len(resident._forward_pre_hooks) == len(resident._forward_hooks) == 1
    streamer.record(SILENT)
    assert not resident._forward_pre_hooks
    assert not resident._forward_hooks
    chain(X)
    assert calls.take() == []


def test_detach_ends_the_reports():
    chain, calls = Chain((16, 16, 16)), Calls()
    streamer = streamed(chain, {1})
    streamer.record(calls)
    streamer.detach()
    chain(X)
    assert calls.take() == []


def test_a_second_streamer_reports_to_its_own_recorder():
    chains = [Chain((16, 16)), Chain((16, 16), seed=1)]
    cut = [layer_units(chain) for chain in chains]
    held = sum(staying_bytes(chain, units, {0}) for chain, units in zip(chains, cut, strict=True))
    arena = poisoned_arena(resident_bytes=held, ring_bytes=cut[0][0].nbytes)
    streamers = [Streamer(chain, units, arena, {0}) for chain, units in zip(chains, cut, strict=True)]
    recorders = [Calls(), Calls()]
    for streamer, recorder in zip(streamers, recorders, strict=True):
        streamer.record(recorder)
    for which in (0, 1, 0):
        chains[which](X)
        assert recorders[1 - which].take() == []
        # The other one had the ring, so that the pass begins without anything.
        assert recorders[which].take() == [*run_of(0), *copy_of(1), *run_of(1), *copy_of(1)]


def test_times_are_those_of_the_marks():
    chain, clock = Chain((16, 16, 16)), Clock()
    streamer = streamed(chain, {1}, lane=clock)
    recording = Recording(clock)
    streamer.record(recording)
    began = clock.now
    chain(X)
    units = recording.times()
    assert [unit.unit for unit in units] == [0, 1, 2]
    first, resident, last = units
    # The ring is taken at 1, the copy begins at 2 and takes 4, it has arrived at 7, and its end is recorded at 8.
    assert first[1:] == (9, 10, 12, 2, 8)
    assert began == 1
    assert resident.copy_began == resident.copy_ended == 0
    assert last.copy_began == first.compute_ended + 1
    assert [unit.waited for unit in units] == [1, 1, 1]
    assert clock.timing == 1 + 3 * 3 + 2 * 3


@pytest.mark.parametrize("lane", [Clock, DirectLane])
@pytest.mark.parametrize("ring", [1.0, 2.0, 10.0])
@pytest.mark.parametrize("resident", [(), {0}, {1, 3}, {0, 1, 2, 3, 4}])
@pytest.mark.parametrize("passes_before", [0, 1, 2])
@pytest.mark.parametrize("wraps", [True, False])
def test_times_are_consistent(lane, ring, resident, passes_before, wraps):
    chain, device = Chain(), lane()
    streamer = streamed(chain, resident, ring=ring, lane=device, wraps=wraps)
    for _ in range(passes_before):
        chain(X)
    recording = Recording(device)
    streamer.record(recording)
    for _ in range(3):
        chain(X)
    times = recording.times()
    assert [unit.unit for unit in times] == list(range(5)) * 3
    now = 0.0
    for number, unit in enumerate(times):
        assert now <= unit.wait_began <= unit.compute_began <= unit.compute_ended
        assert unit.waited >= 0
        assert 0 <= unit.copy_began <= unit.copy_ended <= unit.compute_began, f"{unit} uses a later copy"
        known = unit.unit not in resident and (number >= 5 or not (wraps and passes_before))
        if known:
            assert unit.copy_ended > unit.copy_began
        if unit.unit in resident:
            assert unit.copy_ended == unit.copy_began == 0
        now = unit.compute_ended
    copies = [unit.copy_began for unit in times if unit.copy_ended > unit.copy_began]
    assert len(set(copies)) == len(copies), "a copy is used once"
    assert copies == sorted(copies), "copies come in the order of their use"


@pytest.mark.parametrize("resident", [(), {0}, {0, 1, 2}])
def test_a_pass_that_breaks_off_leaves_no_trace(resident):
    chain = Chain((16, 16, 16))
    clock = Clock()
    streamer = streamed(chain, resident, lane=clock)
    recording = Recording(clock)
    streamer.record(recording)

    def fail(*_):
        raise ArithmeticError

    hook = chain.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError):
        chain(X)
    hook.remove()
    chain(X)
    assert [unit.unit for unit in recording.times()] == [0, 1, 2]


@pytest.mark.parametrize("resident", [(), {0, 1}])
def test_units_that_run_in_part(resident):
    chain, clock = Chain((16, 16, 16, 16)), Clock()
    units = layer_units(chain, 2 * layer_units(chain)[0].nbytes)
    streamer = Streamer(chain, units, arena_for(chain, units, resident, lane=clock), resident)
    recording = Recording(clock)
    streamer.record(recording)
    for skipped in ((), {0}, {1}, ()):
        chain(X, skipped=skipped)
    times = recording.times()
    assert all(unit.copy_ended <= unit.compute_began < unit.compute_ended for unit in times)
    # A resident unit begins with its first layer, a streamed one when it is brought; both end with the last layer.
    second_pass = [1] if resident else [0, 1]
    assert [unit.unit for unit in times] == [0, 1, *second_pass, 1, 0, 1]
