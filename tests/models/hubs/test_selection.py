"""Which files are needed, and which lists of files are refused."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoflux.errors import AutofluxError, DamagedDownload, ModelNotFound, UnsafeCheckpoint, UnsupportedModel
from autoflux.models.hubs.selection import check_paths, is_inside, needed_files
from autoflux.models.hubs.values import RemoteFile
from tests.models.hubs.conftest import NEEDED, SHARDS, flux_files


def listed(*paths: str) -> list[RemoteFile]:
    return [RemoteFile(path=path, size_bytes=5_000_000_000) for path in paths]


def needed(*paths: str, patterns: tuple[str, ...] = ()) -> set[str]:
    return {file.path for file in needed_files(listed(*paths), patterns)}


def test_of_a_diffusers_folder_the_networks_tokenizers_scheduler_and_licence_are_needed():
    assert needed(*flux_files()) == {*NEEDED, f"transformer/{SHARDS}.safetensors.index.json"}


def test_a_network_in_one_file_needs_no_index():
    paths = [p for p in flux_files() if not p.startswith("transformer/")]
    chosen = needed(*paths, "transformer/config.json", f"transformer/{SHARDS}.safetensors")
    assert f"transformer/{SHARDS}.safetensors" in chosen


@pytest.mark.parametrize("part", ["vae", "tokenizer_2", "transformer"])
def test_a_missing_part_is_named(part):
    with pytest.raises(UnsupportedModel, match=f"no part '{part}'"):
        needed(*(p for p in flux_files() if not p.startswith(f"{part}/")))


def test_a_network_in_pickles_only_is_refused():
    paths = [p for p in flux_files() if p != "text_encoder/model.safetensors"]
    with pytest.raises(UnsafeCheckpoint, match=r"text_encoder/pytorch_model\.bin"):
        needed(*paths)
    with pytest.raises(UnsafeCheckpoint, match=r"flux\.CKPT"):
        needed("flux.CKPT")


def test_a_repository_that_is_one_file_needs_that_file():
    assert needed("README.md", "majicflus_v134.safetensors", "a.png") == {"majicflus_v134.safetensors"}
    assert needed("q8/model.gguf", "LICENSE") == {"q8/model.gguf", "LICENSE"}


def test_several_single_files_are_listed_to_choose_from():
    with pytest.raises(ModelNotFound, match=re.escape("flux-Q4_0.gguf (5.00 GB), flux-Q8_0.gguf")) as caught:
        needed("flux-Q4_0.gguf", "flux-Q8_0.gguf")
    assert "--file" in caught.value.hint
    assert needed("flux-Q4_0.gguf", "flux-Q8_0.gguf", patterns=("*Q8_0*",)) == {"flux-Q8_0.gguf"}


@pytest.mark.parametrize(
    ("paths", "patterns", "error"),
    [
        (["model.ckpt"], (), UnsafeCheckpoint),
        (["model.ckpt"], ("*",), UnsafeCheckpoint),
        (["a.safetensors"], ("b*",), ModelNotFound),
        (["README.md"], (), UnsupportedModel),
        ([], (), UnsupportedModel),
    ],
)
def test_what_cannot_be_run_is_refused(paths, patterns, error):
    with pytest.raises(error):
        needed(*paths, patterns=patterns)


OUTSIDE = [
    "../x",
    "a/../../x",
    "/etc/passwd",
    "a//b",
    "./a",
    "a/.",
    "..",
    "",
    "C:\\x",
    "a\\..\\b",
    "a:b",
    "a\0b",
    "a\nb",
]


@pytest.mark.parametrize("path", OUTSIDE)
def test_a_path_that_leads_out_is_refused(path):
    with pytest.raises(DamagedDownload, match="lies outside"):
        check_paths(listed("config.json", path))


def test_a_path_twice_and_a_negative_size_are_refused():
    with pytest.raises(DamagedDownload, match="not sound"):
        check_paths(listed("a", "a"))
    with pytest.raises(DamagedDownload, match="not sound"):
        check_paths([RemoteFile(path="a", size_bytes=-1)])


@given(st.text(alphabet="a./\\:\0-", max_size=12))
def test_every_accepted_path_stays_inside(tmp_path_factory, path):
    base = tmp_path_factory.getbasetemp()
    if is_inside(path):
        joined = (base / path).resolve()
        assert joined.is_relative_to(base)
        assert joined != base


@given(st.lists(st.sampled_from([*flux_files(), "x.gguf", "y.bin", "vae/../x"]), unique=True))
def test_any_list_ends_in_files_of_it_or_an_error(paths):
    try:
        chosen = needed(*paths)
    except AutofluxError:
        return
    assert chosen
    assert chosen <= set(paths)
