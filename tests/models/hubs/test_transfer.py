"""One file on its way: cut anywhere, answered wrongly, and whole in the end or not there at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoflux.errors import DamagedDownload, HubUnavailable
from autoflux.models.hubs.transfer import fetch
from autoflux.models.hubs.transport import UNREACHED_TRIES, Patience, Stopped, Wire, connect
from autoflux.models.hubs.values import RemoteFile, Source
from tests.models.hubs.conftest import REPO, pattern
from tests.models.hubs.stub import Fault, StubHub, sha256

SIZE = 4001
DATA = pattern(SIZE)
FILE = RemoteFile(path="w.safetensors", size_bytes=SIZE, sha256=sha256(DATA))
EAGER = Patience(first_pause_seconds=0.0)


CLIENT = connect()


@pytest.fixture(scope="module")
def server() -> Iterator[StubHub]:
    server = StubHub()
    server.repos[REPO] = {FILE.path: DATA}
    yield server
    server.close()


@pytest.fixture
def partial(server: StubHub, tmp_path: Path) -> Path:
    server.faults.clear()
    server.asked.clear()
    return tmp_path / "w.incomplete"


def bring(server: StubHub, partial: Path, file: RemoteFile = FILE, patience: Patience = EAGER) -> int:
    """Fetch; returns the bytes that were reported as gained."""
    gained = []
    wire = Wire(CLIENT, Source.HUGGINGFACE, server.url, patience=patience)
    fetch(wire, f"{server.url}/{REPO}/resolve/main/{FILE.path}", file, partial, lambda _r: None, gained.append)
    return sum(gained)


def test_a_file_arrives_whole(server, partial):
    assert bring(server, partial) == SIZE
    assert partial.read_bytes() == DATA
    assert server.ranges(FILE.path) == [None]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, SIZE - 1), max_size=4), ignored=st.booleans(), silent=st.booleans())
def test_connections_cut_anywhere_are_resumed(server, partial, cuts, ignored, silent):
    """Each cut breaks one answer after that many bytes; no byte is asked for twice unless ranges are ignored."""
    partial.unlink(missing_ok=True)
    server.asked.clear()
    server.faults[FILE.path] = [Fault(keep_bytes=cut, ignore_range=ignored, without_length=silent) for cut in cuts]
    assert bring(server, partial) == SIZE
    assert partial.read_bytes() == DATA
    starts = [int(r.removeprefix("bytes=").removesuffix("-")) if r else 0 for r in server.ranges(FILE.path)]
    assert starts == sorted(starts)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(have=st.integers(0, SIZE))
def test_what_an_earlier_run_left_is_not_downloaded_again(server, partial, have):
    partial.write_bytes(DATA[:have])
    server.asked.clear()
    assert bring(server, partial) == SIZE
    assert partial.read_bytes() == DATA
    assert server.ranges(FILE.path) == ([] if have == SIZE else [f"bytes={have}-" if have else None])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(have=st.integers(1, SIZE), at=st.integers(0, SIZE - 1))
def test_a_leftover_with_a_wrong_byte_is_found_and_replaced(server, partial, have, at):
    left = bytearray(DATA[:have])
    left[at % have] ^= 1
    partial.write_bytes(left)
    assert bring(server, partial) == SIZE
    assert partial.read_bytes() == DATA


def test_a_leftover_that_is_too_long_is_thrown_away(server, partial):
    partial.write_bytes(DATA + b"x")
    assert bring(server, partial) == SIZE
    assert partial.read_bytes() == DATA


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="the system cannot refuse links")
def test_a_link_in_place_of_the_leftover_is_not_followed(server, partial, tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    partial.symlink_to(victim)
    bring(server, partial)
    assert victim.read_bytes() == b"precious"
    assert not partial.is_symlink()


def test_a_server_that_ignores_ranges_is_put_up_with(server, partial):
    partial.write_bytes(DATA[:1000])
    server.faults[FILE.path] = [Fault(ignore_range=True)]
    bring(server, partial)
    assert partial.read_bytes() == DATA


@pytest.mark.parametrize(
    "wrong", ["bytes 2000-4000/4001", "bytes 1000-4000/9999", "bytes 1000-", "", "octets 1000-4000/4001"]
)
def test_an_answer_with_another_range_is_not_used(server, partial, wrong):
    partial.write_bytes(DATA[:1000])
    server.faults[FILE.path] = [Fault(content_range=wrong or "none")]
    bring(server, partial)
    assert partial.read_bytes() == DATA
    assert len(server.ranges(FILE.path)) == 2


def test_an_answer_that_begins_earlier_is_used_from_where_it_is_needed(server, partial):
    partial.write_bytes(DATA[:1000])
    server.faults[FILE.path] = [
        Fault(status=206, ignore_range=True, content_range=f"bytes 0-{SIZE - 1}/{SIZE}"),
    ]
    bring(server, partial)
    assert partial.read_bytes() == DATA
    assert len(server.ranges(FILE.path)) == 1


def test_a_wrong_content_is_tried_once_more_and_leaves_nothing(server, partial):
    wrong = b"x" * SIZE
    server.faults[FILE.path] = [Fault(body=wrong), Fault(body=wrong)]
    with pytest.raises(DamagedDownload, match=sha256(wrong)):
        bring(server, partial)
    assert not partial.exists()
    server.faults[FILE.path] = [Fault(body=wrong)]
    assert bring(server, partial) == SIZE


def test_more_bytes_than_promised_are_refused(server, partial):
    server.faults[FILE.path] = [Fault(body=DATA + b"x")]
    with pytest.raises(DamagedDownload, match="more than the 4,001 bytes"):
        bring(server, partial)
    assert not partial.exists()


def test_compression_that_was_not_asked_for_is_refused(server, partial):
    server.faults[FILE.path] = [Fault(headers={"Content-Encoding": "gzip"})] * 5
    with pytest.raises(HubUnavailable, match="compressed"):
        bring(server, partial)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_passes_is_waited_for(server, partial, status):
    server.faults[FILE.path] = [Fault(status=status, headers={"Retry-After": "0"})] * 4
    assert bring(server, partial, patience=Patience()) == SIZE


def test_patience_ends_and_what_has_arrived_stays(server, partial):
    server.faults[FILE.path] = [Fault(keep_bytes=700), *[Fault(status=503)] * 5]
    with pytest.raises(HubUnavailable, match="503") as caught:
        bring(server, partial)
    assert "goes on where it stopped" in caught.value.hint
    assert partial.read_bytes() == DATA[:700]


def test_a_hub_that_cannot_be_reached_is_given_up_sooner_than_one_that_is_busy():
    asked: list[str] = []

    def refuse(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        raise httpx.ConnectError("[Errno -2] Name or service not known")

    with httpx.Client(transport=httpx.MockTransport(refuse)) as client:
        wire = Wire(client, Source.HUGGINGFACE, "https://hub.invalid", patience=EAGER)
        with pytest.raises(HubUnavailable, match="cannot be reached: Name or service not known") as caught:
            wire.get_json("/api/models/a/b", lambda _response: None)
    assert "HF_ENDPOINT" in caught.value.hint
    assert len(asked) == UNREACHED_TRIES < EAGER.tries


def test_patience_counts_only_failures_without_a_new_byte(server, partial):
    server.faults[FILE.path] = [Fault(keep_bytes=10)] * 50
    assert bring(server, partial) == SIZE


def test_pauses_double_up_to_the_longest_and_follow_the_hub():
    patience = Patience(first_pause_seconds=2.0, longest_pause_seconds=9.0)
    assert [patience.pause(n, None) for n in (1, 2, 3, 4)] == [2.0, 4.0, 8.0, 9.0]
    assert patience.pause(1, 5.0) == 5.0
    assert patience.pause(1, 1e9) == 9.0


def test_a_download_that_is_called_off_keeps_what_it_has(server, partial):
    wire = Wire(CLIENT, Source.HUGGINGFACE, server.url, patience=EAGER)
    url = f"{server.url}/{REPO}/resolve/main/{FILE.path}"
    server.faults[FILE.path] = [Fault(keep_bytes=500)]
    with pytest.raises(Stopped):
        fetch(wire, url, FILE, partial, lambda _r: None, lambda _count: wire.stop.set())
    assert partial.read_bytes() == DATA[:500]


def test_an_empty_file_is_a_file(server, partial):
    empty = RemoteFile(path="w.safetensors", size_bytes=0, sha256=sha256(b""))
    assert bring(server, partial, empty) == 0
    assert partial.read_bytes() == b""
