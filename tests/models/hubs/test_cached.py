"""What is on the machine: found, judged, read again, removed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoflux.errors import ModelNotFound, ServiceUnavailable
from autoflux.models.hubs.cached import CachedModel, cached_models, disk_bytes, find_cached, look_at, model_path
from autoflux.models.hubs.pull import pull
from autoflux.models.hubs.remove import plan_removal, remove
from autoflux.models.hubs.stores import HuggingFaceStore, stores
from autoflux.models.hubs.values import HubId, Reference, Source
from autoflux.models.hubs.verify import verify
from tests.models.hubs.conftest import BIG, NEEDED, REPO, SHARDS, contents, flux_files


@pytest.fixture
def here(hub, small) -> CachedModel:
    """The small model, downloaded."""
    pull(small)
    return find_cached(small, stores())


def foreign(model: CachedModel) -> CachedModel:
    """The same model as if another tool had downloaded it: without autoflux's record."""
    shutil.rmtree(stores()[model.source].folder(model.repo_id) / ".autoflux")
    return look_at(HubId(source=model.source, repo_id=model.repo_id), stores()[model.source])


def test_nothing_is_found_where_nothing_is(hub, small):
    assert cached_models(stores()) == []
    assert find_cached(small, stores()) is None


def test_a_downloaded_model_is_listed_as_complete(here, source):
    assert cached_models(stores()) == [here]
    assert (here.name, here.source, here.complete, here.licence) == (REPO, source, True, "test-licence")
    assert here.size_bytes == disk_bytes(stores()[source].folder(REPO)) > sum(map(len, NEEDED.values()))
    assert model_path(here) == Path(here.path)


def test_what_is_missing_or_short_is_named(here, small):
    (Path(here.path) / "vae/config.json").unlink()
    short = (Path(here.path) / BIG).resolve()
    short.write_bytes(short.read_bytes()[:-1])
    found = find_cached(small, stores())
    assert set(found.missing) == {"vae/config.json", BIG}
    with pytest.raises(ModelNotFound, match=r"2 files missing \(") as caught:
        model_path(found)
    assert f"models pull {REPO}" in caught.value.hint


def test_what_other_tools_downloaded_is_judged_by_its_layout(here):
    assert foreign(here).complete
    (Path(here.path) / f"transformer/{SHARDS}-00002-of-00002.safetensors").unlink()
    again = look_at(HubId(source=here.source, repo_id=REPO), stores()[here.source])
    assert again.missing == (f"transformer/{SHARDS}-00002-of-00002.safetensors",)
    shutil.rmtree(Path(here.path) / "tokenizer")
    again = look_at(HubId(source=here.source, repo_id=REPO), stores()[here.source])
    assert "tokenizer/tokenizer.json" in again.missing
    (Path(here.path) / "model_index.json").unlink()
    again = look_at(HubId(source=here.source, repo_id=REPO), stores()[here.source])
    assert again.missing == ("model_index.json",)


LOST = {
    "words without their merges": (["tokenizer/merges.txt"], "tokenizer/merges.txt"),
    "merges without their words": (["tokenizer/vocab.json"], "tokenizer/vocab.json"),
    "no file of a tokenizer": (
        ["tokenizer_2/spiece.model", "tokenizer_2/tokenizer.json"],
        "tokenizer_2/tokenizer.json",
    ),
    "no scheduler": (["scheduler/scheduler_config.json"], "scheduler/scheduler_config.json"),
    "one of two forms": (["tokenizer_2/tokenizer.json"], None),
}


@pytest.mark.parametrize("case", LOST)
def test_what_other_tools_downloaded_is_not_complete_without_its_small_parts(here, case):
    lost, missing = LOST[case]
    for path in lost:
        (Path(here.path) / path).unlink()
        (Path(here.path) / path).with_name("special_tokens_map.json").write_bytes(b"{}")
    found = foreign(here)
    assert found.missing == ((missing,) if missing else ())
    assert found.complete is not bool(missing)


def test_what_other_tools_downloaded_and_cannot_be_run_says_why(here):
    weights = Path(here.path) / "vae/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    found = foreign(here)
    assert (found.complete, found.missing) == (False, ())
    with pytest.raises(ModelNotFound, match=r"cannot be run: .*pickle"):
        model_path(found)


def test_models_of_other_families_are_listed_only_when_asked_for(hub, tmp_path):
    for folder in ("hf/models--some--bert/snapshots/abc", "ms/models/some--bert/snapshots/master"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_bytes(b"{}")
    assert cached_models(stores()) == []
    assert {model.source for model in cached_models(stores(), everything=True)} == set(Source)


def test_stray_things_in_a_cache_do_no_harm(hub, tmp_path):
    for stray in (
        "hf/models--a--b/refs",
        "hf/models--a--b--c",
        "hf/.locks",
        "ms/models/x",
        "ms/.lock",
        "ms/hub/models",
    ):
        (tmp_path / stray).mkdir(parents=True)
    (tmp_path / "hf/models--a--b/refs/main").write_bytes(b"\xff../../..")
    (tmp_path / "hf/CACHEDIR.TAG").write_bytes(b"")
    (tmp_path / "ms/models/file").write_bytes(b"")
    assert cached_models(stores(), everything=True) == []


@pytest.mark.skipif(os.name == "nt", reason="there are no pipes in folders")
def test_a_pipe_in_the_place_of_an_index_is_not_waited_for(hub, tmp_path):
    folder = tmp_path / "hf/models--some--flux/snapshots/abc"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "model_index.json")
    assert cached_models(stores()) == []


class Held(HuggingFaceStore):
    """A cache of which another program holds one model, as Windows does; or another user's."""

    def commit(self, repo_id: str, revision: str | None = None) -> str | None:
        if repo_id == "held/flux":
            raise PermissionError(errno.EACCES, "Permission denied", str(self.folder(repo_id)))
        return super().commit(repo_id, revision)


def test_a_model_that_cannot_be_read_does_not_hide_the_others(hub, tmp_path):
    for name in ("a--flux", "held--flux", "z--flux"):
        folder = tmp_path / f"hf/models--{name}/snapshots/abc"
        folder.mkdir(parents=True)
        (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    found = cached_models({Source.HUGGINGFACE: Held(tmp_path / "hf")})
    assert [model.name for model in found] == ["a/flux", "held/flux", "z/flux"]
    assert [model.unreadable for model in found] == [None, "Permission denied", None]
    held = found[1]
    assert (held.path, held.complete) == (str(tmp_path / "hf/models--held--flux"), False)
    with pytest.raises(ModelNotFound, match="cannot be read: Permission denied"):
        model_path(held)


def test_folders_that_may_not_be_looked_into_are_listed_as_such(here, source):
    store = stores()[source]
    Path(here.path).chmod(0)
    if os.access(here.path, os.R_OK):
        pytest.skip("this user may read everything")
    try:
        (found,) = cached_models({source: store})
    finally:
        Path(here.path).chmod(0o755)
    assert not found.complete


def test_a_damaged_record_is_no_record(here, source):
    for path in (stores()[source].folder(REPO) / ".autoflux").iterdir():
        path.write_bytes(b"{")
    assert find_cached(Reference(name=REPO, ids=(HubId(source=source, repo_id=REPO),)), stores()).complete


def test_a_complete_model_goes_before_one_in_part(hub):
    ids = tuple(HubId(source=source, repo_id=REPO) for source in Source)
    both = Reference(name=REPO, ids=ids)
    for source in Source:
        pull(Reference(name=REPO, ids=tuple(i for i in ids if i.source == source)))
    assert find_cached(both, stores()).source == Source.HUGGINGFACE
    (Path(find_cached(both, stores()).path) / BIG).unlink()
    assert find_cached(both, stores()).source == Source.MODELSCOPE


def test_a_model_that_is_a_single_file_is_that_file(hub, source):
    hub.repos["m/one"] = {"one_v1.safetensors": b"weights", "README.md": b"x"}
    reference = Reference(name="m/one", ids=(HubId(source=source, repo_id="m/one"),))
    pulled = pull(reference)
    assert contents(Path(pulled.path)) == {"one_v1.safetensors": b"weights"}
    assert model_path(find_cached(reference, stores())) == Path(pulled.path) / "one_v1.safetensors"


def test_an_untouched_model_verifies(here):
    verification = verify(here, stores())
    assert not verification.faulty
    assert {file.path for file in verification.files} == set(contents(Path(here.path)))
    assert all(file.checked for file in verification.files)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_is_found_in_its_file(here, data):
    path = data.draw(st.sampled_from(sorted(contents(Path(here.path)))))
    file = (Path(here.path) / path).resolve()
    good = file.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(good) - 1))
    bad = bytearray(good)
    bad[bit // 8] ^= 1 << bit % 8
    file.write_bytes(bad)
    try:
        assert [checked.path for checked in verify(here, stores()).faulty] == [path]
    finally:
        file.write_bytes(good)


def test_missing_and_shortened_files_are_found(here):
    (Path(here.path) / "vae/config.json").unlink()
    (Path(here.path) / BIG).resolve().write_bytes(b"")
    faults = {file.path: file.fault for file in verify(here, stores()).faulty}
    assert faults == {"vae/config.json": "is missing", BIG: f"has 0 bytes, not {len(NEEDED[BIG]):,}"}


def test_what_other_tools_downloaded_is_verified_by_the_names_of_blobs(here, source):
    model = foreign(here)
    if source == Source.MODELSCOPE:
        with pytest.raises(ModelNotFound, match="no checksums") as caught:
            verify(model, stores())
        assert "--repair" in caught.value.hint
        return
    assert not verify(model, stores()).faulty
    (Path(here.path) / BIG).resolve().write_bytes(b"x")
    assert [file.path for file in verify(model, stores()).faulty] == [BIG]


def test_what_other_tools_downloaded_in_part_does_not_verify(here):
    """Checksums of what is there say nothing of what is not."""
    lost = ("text_encoder/config.json", "vae/diffusion_pytorch_model.safetensors", BIG)
    for path in lost:
        (Path(here.path) / path).unlink()
    verification = verify(foreign(here), stores())
    assert {file.path: file.fault for file in verification.faulty} == dict.fromkeys(lost, "is missing")


@pytest.mark.skipif(sys.platform != "linux", reason="names are text there")
def test_a_file_whose_name_is_no_text_is_not_of_the_model(here, source):
    (Path(here.path) / os.fsdecode(b"inv\xff")).write_bytes(b"x")
    model = foreign(here)
    if source == Source.HUGGINGFACE:
        assert json.loads(verify(model, stores()).to_json())["name"] == REPO
    assert model.complete


def test_another_kind_of_model_verifies_without_what_flux_has(here, source):
    shutil.rmtree(Path(here.path) / "transformer")
    index = Path(here.path) / "model_index.json"
    index.unlink()
    index.write_text('{"_class_name": "StableDiffusionPipeline"}')
    model = foreign(here)
    assert "StableDiffusionPipeline" in model.unusable
    if source == Source.HUGGINGFACE:
        assert not verify(model, stores()).faulty


def test_a_removed_model_is_gone_and_its_bytes_are_told(here, source):
    store = stores()[source]
    planned = plan_removal(here, stores())
    assert planned.freed_bytes == here.size_bytes
    assert store.folder(REPO).exists()
    assert remove(here, stores()) == planned
    assert not store.folder(REPO).exists()
    assert cached_models(stores()) == []


def test_files_that_another_model_links_to_stay(here, source, tmp_path):
    shared = (Path(here.path) / BIG).resolve()
    other = tmp_path / "ms" / "models" / "another--one" / "snapshots" / "master"
    other.mkdir(parents=True)
    (other / "w.safetensors").symlink_to(shared)
    removed = remove(here, stores())
    assert removed.kept == (str(shared),)
    assert (other / "w.safetensors").read_bytes() == NEEDED[BIG]
    assert contents(stores()[source].folder(REPO)).keys() == {
        shared.relative_to(stores()[source].folder(REPO)).as_posix()
    }
    assert removed.freed_bytes == here.size_bytes - len(NEEDED[BIG])


def test_what_links_lead_to_outside_is_not_removed(here, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"precious")
    (Path(here.path) / "elsewhere").symlink_to(outside)
    (Path(here.path) / "precious").symlink_to(outside / "precious")
    remove(here, stores())
    assert (outside / "precious").read_bytes() == b"precious"


def test_a_file_with_another_name_elsewhere_frees_nothing(here, tmp_path):
    os.link((Path(here.path) / BIG).resolve(), tmp_path / "kept")
    assert remove(here, stores()).freed_bytes == here.size_bytes - len(NEEDED[BIG])
    assert (tmp_path / "kept").read_bytes() == NEEDED[BIG]


def test_a_model_that_is_being_downloaded_is_not_removed(here, source):
    from filelock import FileLock

    with FileLock(stores()[source].pull_lock(REPO)), pytest.raises(ServiceUnavailable, match="being downloaded"):
        remove(here, stores())
    assert contents(Path(here.path)).keys() <= flux_files().keys()
    assert (Path(here.path) / BIG).exists()
