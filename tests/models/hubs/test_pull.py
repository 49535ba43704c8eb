"""Whole models from both hubs, in good and bad weather."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from autoflux.errors import (
    AccessDenied,
    AutofluxError,
    DamagedDownload,
    DiskFull,
    HubUnavailable,
    ModelNotFound,
)
from autoflux.models.hubs.pull import Pulled, Watcher, pull
from autoflux.models.hubs.transport import Patience
from autoflux.models.hubs.values import HubId, Listing, Reference, Source
from tests.models.hubs.conftest import BIG, NEEDED, REPO, contents, flux_files, pattern
from tests.models.hubs.stub import COMMIT, Fault, huggingface_entry, modelscope_entry

EAGER = Patience(first_pause_seconds=0.0)
WANTED = {**NEEDED, **{p: d for p, d in flux_files().items() if p.endswith(".index.json")}}


def get(reference: Reference, **options) -> Pulled:
    return pull(reference, patience=EAGER, **options)


def entry(source: Source, path: str, data: bytes):
    return (huggingface_entry if source == Source.HUGGINGFACE else modelscope_entry)(path, data)


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*.incomplete") if path.stat().st_size]


def test_what_is_needed_arrives_and_nothing_else(hub, small, store):
    pulled = get(small)
    assert contents(Path(pulled.path)) == WANTED
    assert pulled.downloaded_bytes == sum(map(len, WANTED.values()))
    assert pulled.listing.licence.name == "test-licence"
    assert not leftovers(store.root)
    assert len(hub.downloads()) == len(WANTED)


def test_a_second_pull_downloads_nothing(hub, small):
    first = get(small)
    hub.asked.clear()
    second = get(small)
    assert (second.path, second.downloaded_bytes) == (first.path, 0)
    assert not hub.downloads()


def test_hugging_faces_own_tools_find_the_model(hub, tmp_path):
    from huggingface_hub import scan_cache_dir, try_to_load_from_cache

    pulled = get(Reference(name=REPO, ids=(HubId(source=Source.HUGGINGFACE, repo_id=REPO),)))
    cached = try_to_load_from_cache(REPO, BIG, cache_dir=tmp_path / "hf")
    assert Path(cached) == Path(pulled.path) / BIG
    scan = scan_cache_dir(tmp_path / "hf")
    assert not scan.warnings
    (repo,) = scan.repos
    (revision,) = repo.revisions
    assert (repo.repo_id, revision.commit_hash, revision.refs) == (REPO, COMMIT, frozenset({"main"}))
    assert revision.nb_files == len(WANTED)


def test_modelscopes_layout_is_that_of_its_tools(hub, tmp_path):
    pulled = get(Reference(name=REPO, ids=(HubId(source=Source.MODELSCOPE, repo_id=REPO),)))
    assert Path(pulled.path) == tmp_path / "ms" / "models" / "someone--small-flux" / "snapshots" / "master"


def test_an_older_modelscope_folder_is_gone_on_with(hub, tmp_path):
    """Before 1.38 its tools kept a model in OWNER/NAME, dots written as three underscores."""
    older = tmp_path / "ms" / "hub" / "models" / "someone" / "small___1"
    older.mkdir(parents=True)
    (older / "model_index.json").write_bytes(NEEDED["model_index.json"])
    hub.repos["someone/small.1"] = flux_files()
    pulled = get(Reference(name="x", ids=(HubId(source=Source.MODELSCOPE, repo_id="someone/small.1"),)))
    assert Path(pulled.path) == older
    assert contents(older) == WANTED
    assert not hub.ranges("model_index.json")


def test_a_revision_is_its_own_snapshot(hub, small, source):
    pulled = get(small.replace(revision="v2"))
    assert pulled.listing.revision == "v2"
    if source == Source.MODELSCOPE:
        assert Path(pulled.path).name == "v2"


def test_single_files_are_added_to_what_is_there(hub, small):
    get(small)
    pulled = get(small.replace(file="flux1-dev.safetensors"))
    assert [file.path for file in pulled.listing.files] == ["flux1-dev.safetensors"]
    assert contents(Path(pulled.path)) == {**WANTED, "flux1-dev.safetensors": flux_files()["flux1-dev.safetensors"]}


def test_an_interrupted_pull_goes_on_at_the_byte_where_it_stopped(hub, small, store):
    hub.faults[BIG] = [Fault(keep_bytes=1234), *[Fault(status=500)] * 5]
    with pytest.raises(HubUnavailable, match="500"):
        get(small)
    assert 1234 in [path.stat().st_size for path in leftovers(store.root)]
    hub.faults.clear()
    hub.asked.clear()
    pulled = get(small)
    assert hub.ranges(BIG) == ["bytes=1234-"]
    assert contents(Path(pulled.path)) == WANTED


def test_a_killed_pull_goes_on_at_the_byte_where_it_stopped(hub, small, source, store):
    sent, release = threading.Event(), threading.Event()
    hub.faults[BIG] = [Fault(body=NEEDED[BIG], keep_bytes=2000, then=lambda: (sent.set(), release.wait(60)))]
    command = [sys.executable, "-m", "autoflux", "models", "pull", REPO, "--source", source.value]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        assert sent.wait(120)
        process.kill()
    release.set()
    digest = modelscope_entry(BIG, NEEDED[BIG])["Sha256"][:16]
    have = sum(path.stat().st_size for path in leftovers(store.root) if digest in path.name)
    hub.faults.clear()
    hub.asked.clear()
    pulled = get(small)
    assert hub.ranges(BIG) == [f"bytes={have}-" if have else None]
    assert contents(Path(pulled.path)) == WANTED


def test_two_pulls_at_once_do_not_disturb_each_other(hub, small):
    with ThreadPoolExecutor(4) as pool:
        pulled = list(pool.map(lambda _: get(small), range(4)))
    assert contents(Path(pulled[0].path)) == WANTED
    assert sorted(p.downloaded_bytes for p in pulled)[:3] == [0, 0, 0]
    assert len(hub.downloads()) == len(WANTED)


def test_a_wrong_content_is_refused_and_the_rest_stays(hub, small, store):
    wrong = pattern(len(NEEDED[BIG]), 99)
    hub.faults[BIG] = [Fault(body=wrong), Fault(body=wrong)]
    with pytest.raises(DamagedDownload, match="arrived twice"):
        get(small)
    assert wrong not in contents(store.root).values()
    assert contents(Path(get(small).path)) == WANTED


def test_a_small_file_of_hugging_face_is_verified_by_gits_checksum(hub):
    reference = Reference(name=REPO, ids=(HubId(source=Source.HUGGINGFACE, repo_id=REPO),))
    hub.faults["vae/config.json"] = [Fault(body=b'{"f": 2}')] * 2
    with pytest.raises(DamagedDownload, match="git sha1"):
        get(reference)


class _Seen(Watcher):
    def __init__(self) -> None:
        self.licence: str | None = None
        self.gained = 0
        self.missing_bytes = 0
        self.downloads_before: int | None = None
        self.hub = None

    def listed(self, listing: Listing, missing, here_bytes) -> None:
        self.licence = listing.licence.url if listing.licence else None
        self.missing_bytes = sum(file.size_bytes for file in missing)
        self.downloads_before = len(self.hub.downloads())

    def fetched(self, file, count) -> None:
        self.gained += count


def test_the_licence_is_told_before_the_first_byte_and_every_byte_is_counted(hub, small, source):
    seen = _Seen()
    seen.hub = hub
    hub.faults[BIG] = [Fault(keep_bytes=100), Fault(body=pattern(len(NEEDED[BIG]), 99))]
    get(small, watcher=seen)
    assert seen.downloads_before == 0
    assert seen.gained == seen.missing_bytes == sum(map(len, WANTED.values()))
    page = f"{hub.url}/{REPO}/blob/main/LICENSE.md" if source == Source.HUGGINGFACE else f"{hub.url}/models/{REPO}"
    assert seen.licence == page


def test_a_token_goes_to_the_hub_and_to_no_other_host(hub, small, start_hub, monkeypatch, source):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms_secret")
    elsewhere = start_hub()
    hub.redirect_to = elsewhere.url
    assert contents(Path(get(small).path)) == WANTED
    assert all("authorization" in asked.headers for asked in hub.asked)
    assert len(elsewhere.asked) == len(WANTED)
    for asked in elsewhere.asked:
        assert not {"authorization", "cookie"} & asked.headers.keys()
        assert "secret" not in str(asked)


def test_a_circle_of_redirects_ends(hub, small):
    hub.redirect_to = hub.url
    with pytest.raises(HubUnavailable, match="redirects"):
        get(small)


def test_too_little_room_is_found_out_before_the_download(hub, small, source, store):
    huge = entry(source, "huge.safetensors", b"x")
    size = 10**18
    huge.update({"Size": size} if source == Source.MODELSCOPE else {"lfs": {**huge["lfs"], "size": size}})
    hub.listed[REPO] = [huge]
    with pytest.raises(DiskFull, match=r"needs 1000000 TB, but .* are free"):
        get(small)
    assert not hub.downloads()
    assert not store.folder(REPO).exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs limits on processes")
def test_a_disk_that_fills_up_ends_with_a_message_and_keeps_what_has_arrived(hub, small, source, store):
    big = pattern(400_000, 7)
    hub.repos[REPO]["vae/diffusion_pytorch_model.safetensors"] = big
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from autoflux.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", code, "models", "pull", REPO, "--source", source.value, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["error"]["code"] == "disk_full"
    assert "Traceback" not in done.stderr
    assert [p.stat().st_size for p in leftovers(store.root)] == [100_000]
    pulled = get(small)
    assert hub.ranges("vae/diffusion_pytorch_model.safetensors")[-1] == "bytes=100000-"
    assert contents(Path(pulled.path)) == {**WANTED, "vae/diffusion_pytorch_model.safetensors": big}


@pytest.mark.parametrize("path", ["../../escaped.safetensors", "/tmp/escaped.safetensors", "vae/../../../x"])
def test_a_list_that_leads_out_of_the_model_is_refused_whole(hub, small, source, store, tmp_path, path):
    hub.listed[REPO] = [*(entry(source, p, d) for p, d in flux_files().items()), entry(source, path, b"x")]
    with pytest.raises(DamagedDownload, match="lies outside of the model"):
        get(small)
    assert not hub.downloads()
    assert not contents(tmp_path)


@pytest.mark.parametrize("checksum", ["../../../x", "ABC", "0" * 63, 7, ["a"]])
def test_a_checksum_that_is_none_is_refused(hub, small, source, checksum):
    odd = entry(source, "x.safetensors", b"x")
    odd.update({"Sha256": checksum} if source == Source.MODELSCOPE else {"lfs": {"sha256": checksum, "size": 1}})
    hub.listed[REPO] = [odd]
    with pytest.raises(DamagedDownload, match="list of files cannot be read"):
        get(small)


def test_weights_without_a_checksum_are_refused(hub):
    hub.listed[REPO] = [{"Path": "x.safetensors", "Type": "blob", "Size": 1, "Sha256": ""}]
    with pytest.raises(DamagedDownload, match="no checksum"):
        get(Reference(name=REPO, ids=(HubId(source=Source.MODELSCOPE, repo_id=REPO),)))


def test_a_link_in_the_cache_that_leads_out_is_not_written_through(hub, small, store, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    snapshot = store.snapshot(REPO, COMMIT if store.source == Source.HUGGINGFACE else "master")
    snapshot.mkdir(parents=True)
    (snapshot / "vae").symlink_to(outside)
    with pytest.raises(DamagedDownload, match="through a link"):
        get(small)
    assert not list(outside.iterdir())


def test_a_file_that_is_a_link_is_replaced_not_written_through(hub, small, store, tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    snapshot = store.snapshot(REPO, COMMIT if store.source == Source.HUGGINGFACE else "master")
    (snapshot / "vae").mkdir(parents=True)
    (snapshot / "vae" / "config.json").symlink_to(victim)
    assert contents(Path(get(small).path)) == WANTED
    assert victim.read_bytes() == b"precious"


def test_a_file_in_the_place_of_a_folder_is_named(hub, small, store):
    snapshot = store.snapshot(REPO, COMMIT if store.source == Source.HUGGINGFACE else "master")
    snapshot.mkdir(parents=True)
    (snapshot / "vae").write_bytes(b"")
    with pytest.raises(DamagedDownload, match="vae"):
        get(small)


def test_offline_takes_what_is_complete_and_asks_nobody(hub, small, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubUnavailable, match="HF_HUB_OFFLINE"):
        get(small)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    online = get(small)
    hub.asked.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert get(small).replace(offline=False, downloaded_bytes=online.downloaded_bytes) == online
    with pytest.raises(HubUnavailable, match="not complete"):
        get(small.replace(file="*Q8_0*"))
    (Path(online.path) / BIG).unlink()
    with pytest.raises(HubUnavailable, match="not complete"):
        get(small)
    assert not hub.asked


def test_offline_takes_what_another_tool_downloaded(hub, small, store, monkeypatch):
    online = get(small)
    shutil.rmtree(store.folder(REPO) / ".autoflux")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = get(small)
    assert (found.path, found.offline, found.downloaded_bytes) == (online.path, True, 0)
    assert {file.path for file in found.listing.files} == set(WANTED)
    get(small.replace(file=BIG))
    with pytest.raises(HubUnavailable, match="not complete"):
        get(small.replace(file="*Q8_0*"))
    (Path(online.path) / BIG).unlink()
    with pytest.raises(HubUnavailable, match="not complete"):
        get(small)


def test_offline_takes_a_folder_of_older_modelscope_tools(hub, tmp_path, monkeypatch):
    folder = tmp_path / "ms/hub/models" / REPO
    for path, content in WANTED.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert get(Reference(name=REPO, ids=(HubId(source=Source.MODELSCOPE, repo_id=REPO),))).path == str(folder)


def test_an_unknown_model_is_said_to_be_so(hub, source):
    misspelt = Reference(name="x", ids=(HubId(source=source, repo_id="black-forest-labs/FLUX.1-dve"),))
    with pytest.raises(ModelNotFound, match="has no model") as caught:
        get(misspelt)
    assert caught.value.hint == "did you mean 'black-forest-labs/FLUX.1-dev'?"


def test_a_gated_model_says_where_to_accept_its_terms(hub, small, source, store):
    first = min(WANTED, key=lambda path: len(WANTED[path]))
    hub.faults[first] = [Fault(status=403, headers={"X-Error-Code": "GatedRepo"})]
    with pytest.raises(AccessDenied) as caught:
        get(small)
    page, way = ("/someone/small-flux", "hf auth login"), ("/models/someone/small-flux", "MODELSCOPE_API_TOKEN")
    for words in page if source == Source.HUGGINGFACE else way:
        assert words in caught.value.hint
    assert len(hub.downloads()) == 1


def test_a_refusal_without_a_reason_is_not_taken_for_a_gate(hub, small, source):
    hub.faults["api"] = [Fault(status=403)]
    with pytest.raises(AccessDenied) as caught:
        get(small)
    assert "is gated" not in caught.value.message
    if source == Source.HUGGINGFACE:
        assert "it answered 403 Forbidden" in caught.value.message
        assert "may be gated, or closed to your account" in caught.value.message
    assert f"{hub.url}/" in caught.value.hint


@pytest.mark.parametrize(
    ("status", "what", "words"),
    [
        (429, "answered 429 Too Many Requests", "wait some minutes"),
        (500, "answered 500 Internal Server Error", "--source"),
        (503, "answered 503 Service Unavailable", "--source"),
        (520, "answered 520", "--source"),
        (408, "answered 408 Request Timeout", "check the network"),
    ],
)
def test_a_status_is_said_with_what_to_try(hub, small, source, status, what, words):
    hub.faults["api"] = [Fault(status=status)] * EAGER.tries
    with pytest.raises(HubUnavailable) as caught:
        get(small)
    assert caught.value.message == f"{source.label} at {hub.url} {what}"
    assert words in caught.value.hint
    assert ("HTTPS_PROXY" in caught.value.hint) == (status == 408)
    assert (f"--source {source.other}" in caught.value.hint) == (status >= 500)


def test_a_token_that_is_not_accepted_is_said_to_be_so(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    hub.faults["api"] = [Fault(status=401)]
    with pytest.raises(AccessDenied, match="token"):
        get(Reference(name=REPO, ids=(HubId(source=Source.HUGGINGFACE, repo_id=REPO),)))


@pytest.mark.parametrize("status", [429, 502])
def test_a_busy_api_is_waited_for(hub, small, status):
    hub.faults["api"] = [Fault(status=status, headers={"Retry-After": "0"})] * 3
    get(small)


@pytest.mark.parametrize(
    "body", [b"<html>", b"", b"[]", b"{}", b'{"Data": null}', b'{"sha": "x", "Data": {}}', b"\xff"]
)
def test_an_answer_that_makes_no_sense_is_an_error_with_advice(hub, small, body):
    hub.faults["api"] = [Fault(body=body)]
    with pytest.raises(HubUnavailable) as caught:
        get(small)
    assert caught.value.hint


def test_a_hub_that_is_not_there_is_said_to_be_so(hub, small, monkeypatch):
    hub.close()
    with pytest.raises(HubUnavailable, match="cannot be reached"):
        get(small)
    monkeypatch.setenv("HF_ENDPOINT", "ftp://x")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "ftp://x")
    with pytest.raises(HubUnavailable, match="not the address"):
        get(small)


def test_a_cache_that_cannot_be_created_is_an_error(hub, small, store):
    store.root.write_bytes(b"")
    with pytest.raises(DamagedDownload, match="a file lies where the folder"):
        get(small)


def test_repair_mends_a_flipped_bit_and_a_missing_file(hub, small, store):
    pulled = get(small)
    flipped = (Path(pulled.path) / BIG).resolve()
    data = bytearray(flipped.read_bytes())
    data[1500] ^= 4
    flipped.write_bytes(data)
    (Path(pulled.path) / "vae/config.json").resolve().unlink()
    hub.asked.clear()
    assert get(small).downloaded_bytes == len(WANTED["vae/config.json"])
    assert get(small, repair=True).downloaded_bytes == len(data)
    assert contents(Path(pulled.path)) == WANTED
    assert len(hub.downloads()) == 2


def test_what_is_repaired_is_what_was_downloaded(hub, small):
    one = small.replace(file="flux1-dev.safetensors")
    path = Path(get(one).path) / "flux1-dev.safetensors"
    path.resolve().write_bytes(b"x")
    assert get(small, repair=True).downloaded_bytes == len(flux_files()["flux1-dev.safetensors"])
    assert contents(Path(path.parent)) == {"flux1-dev.safetensors": flux_files()["flux1-dev.safetensors"]}


def test_one_file_of_many_once_chosen_need_not_be_named_again(hub, source):
    hub.repos["m/many"] = {"a-Q4.gguf": b"four", "a-Q8.gguf": b"eight"}
    many = Reference(name="m/many", ids=(HubId(source=source, repo_id="m/many"),))
    with pytest.raises(ModelNotFound, match="2 weight files"):
        get(many)
    pulled = get(many.replace(file="*Q8*"))
    (Path(pulled.path) / "a-Q8.gguf").unlink()
    assert contents(Path(get(many).path)) == {"a-Q8.gguf": b"eight"}


def test_a_branch_that_moved_brings_what_has_changed(hub, small, source):
    get(small)
    changed = pattern(len(NEEDED[BIG]), 77)
    hub.repos[REPO][BIG] = changed
    hub.asked.clear()
    pulled = get(small)
    assert contents(Path(pulled.path)) == {**WANTED, BIG: changed}
    assert len(hub.downloads()) == 1


def test_a_move_of_a_branch_that_is_interrupted_is_not_taken_for_done(hub, small):
    get(small)
    hub.repos[REPO][BIG] = pattern(len(NEEDED[BIG]), 77)
    hub.faults[BIG] = [Fault(status=500)] * 5
    with pytest.raises(AutofluxError):
        get(small)
    assert contents(Path(get(small).path))[BIG] == pattern(len(NEEDED[BIG]), 77)
