"""Ids as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoflux.errors import AutofluxError, ContradictoryWishes, UsageError
from autoflux.models.catalogue import CATALOGUE, find
from autoflux.models.hubs.names import default_source, is_repo_id, is_revision, parse_reference
from autoflux.models.hubs.values import Source

HF, MS = Source.HUGGINGFACE, Source.MODELSCOPE
DEV, DEV_MS = "black-forest-labs/FLUX.1-dev", "AI-ModelScope/FLUX.1-dev"

WRITTEN = {
    "flux.1-dev": [(HF, DEV), (MS, DEV_MS)],
    "FLUX.1-dev": [(HF, DEV), (MS, DEV_MS)],
    "flux-dev": [(HF, DEV), (MS, DEV_MS)],
    DEV: [(HF, DEV), (MS, DEV_MS)],
    "black-forest-labs/flux.1-DEV": [(HF, DEV), (MS, DEV_MS)],
    DEV_MS: [(MS, DEV_MS), (HF, DEV)],
    "MAILAND/majicflus_v1": [(HF, "MAILAND/majicflus_v1"), (MS, "MAILAND/majicflus_v1")],
    " someone/model ": [(HF, "someone/model"), (MS, "someone/model")],
    f"https://huggingface.co/{DEV}": [(HF, DEV)],
    f"http://huggingface.co/{DEV}/": [(HF, DEV)],
    f"huggingface.co/{DEV}": [(HF, DEV)],
    f"hf.co/{DEV}": [(HF, DEV)],
    f"https://huggingface.co/{DEV}?library=diffusers#files": [(HF, DEV)],
    f"https://modelscope.cn/models/{DEV_MS}": [(MS, DEV_MS)],
    f"https://www.modelscope.cn/models/{DEV_MS}/summary": [(MS, DEV_MS)],
    f"https://www.modelscope.cn/models/{DEV_MS}/files": [(MS, DEV_MS)],
}


@pytest.mark.parametrize("text", WRITTEN)
def test_a_model_is_understood(text):
    reference = parse_reference(text)
    assert [(i.source, i.repo_id) for i in reference.ids] == WRITTEN[text]
    assert (reference.revision, reference.file) == (None, None)


def test_an_address_may_lead_to_a_revision_or_a_file():
    tree = parse_reference(f"https://huggingface.co/{DEV}/tree/abc123")
    assert (tree.revision, tree.file) == ("abc123", None)
    blob = parse_reference(f"https://huggingface.co/{DEV}/blob/main/vae/config.json")
    assert (blob.revision, blob.file) == ("main", "vae/config.json")
    resolve = parse_reference(f"https://modelscope.cn/models/{DEV_MS}/resolve/master/flux1-dev.safetensors")
    assert (resolve.revision, resolve.file) == ("master", "flux1-dev.safetensors")


def test_the_source_that_was_asked_for_is_the_only_one():
    assert [i.repo_id for i in parse_reference("flux.1-dev", MS).ids] == [DEV_MS]
    assert [i.repo_id for i in parse_reference(DEV, MS).ids] == [DEV_MS]
    assert [i.repo_id for i in parse_reference(DEV_MS, HF).ids] == [DEV]
    assert [i.repo_id for i in parse_reference(f"https://huggingface.co/{DEV}", MS).ids] == [DEV_MS]
    assert [i.source for i in parse_reference("a/b", MS).ids] == [MS]


def test_the_usual_source_comes_first():
    assert [i.source for i in parse_reference("flux.1-dev", usual=MS).ids] == [MS, HF]
    assert [i.source for i in parse_reference("a/b", usual=MS).ids] == [MS, HF]


def test_an_address_on_the_other_hub_is_a_contradiction():
    with pytest.raises(ContradictoryWishes, match="is on Hugging Face, but --source asks for ModelScope"):
        parse_reference("https://huggingface.co/a/b", MS)


@pytest.mark.parametrize(
    "text", ["", "sample", "./a/b", "/a/b", "../b", "a/../b", "a/b/c", "a/", "/", "C:\\a\\b", "a b/c"]
)
def test_other_things_are_no_models_of_hubs(text):
    assert parse_reference(text) is None


@pytest.mark.parametrize("text", ["https://huggingface.co/", "hf.co/x", "https://hf.co/../x", "hf.co/%2e%2e/x"])
def test_an_address_without_a_model_is_refused(text):
    with pytest.raises(UsageError, match="not the address of a model"):
        parse_reference(text)


@given(st.text(max_size=60))
def test_no_text_leads_out_of_the_cache(text):
    try:
        reference = parse_reference(text) or parse_reference(f"hf.co/{text}")
    except AutofluxError:
        return
    for hub_id in reference.ids if reference else ():
        owner, name = hub_id.repo_id.split("/")
        assert is_repo_id(hub_id.repo_id)
        assert not {owner, name} & {"", ".", ".."}


@pytest.mark.parametrize("text", ["..", "a/../b", "/a", "a/", "-x", "a//b", "a b", "", "a\nb"])
def test_odd_revisions_are_refused(text):
    assert not is_revision(text)


def test_the_default_source_comes_from_the_environment():
    assert default_source({}) == HF
    assert default_source({"AUTOFLUX_SOURCE": "ModelScope"}) == MS
    with pytest.raises(UsageError, match="'modelscop'"):
        default_source({"AUTOFLUX_SOURCE": "modelscop"})


def test_names_in_the_catalogue_mean_one_model_each():
    names = [name.lower() for entry in CATALOGUE for name in (entry.name, *entry.aliases, entry.huggingface)]
    assert len(names) == len(set(names))
    assert all(find(name.upper()) for name in names)
    assert find("flux.2") is None
    assert all(is_repo_id(e.huggingface) and is_repo_id(e.modelscope) for e in CATALOGUE)
