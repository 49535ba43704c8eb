"""`autoflux models pack`, and what the other commands do with packs."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from autoflux.cli.main import run
from autoflux.cli.models_pack_rm import RemovedPacks, remove_packs_of
from autoflux.models.pack_shelf import Shelf, packs_wanted
from autoflux.models.packs import INDEX, KEY_DIGITS, PACK_SCHEMA, WEIGHTS
from autoflux.models.values import ModelEntry
from autoflux.plugin_manager import Plugins
from tests.refusals import refuse


@pytest.fixture(autouse=True)
def shelf(tmp_path, monkeypatch) -> Shelf:
    for name, folder in (("AUTOFLUX_CACHE_DIR", "cache"), ("HF_HUB_CACHE", "hf"), ("MODELSCOPE_CACHE", "ms")):
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.delenv("AUTOFLUX_NO_PACK", raising=False)
    return Shelf()


def asked(capsys, *arguments: str, code: int = 0) -> dict:
    assert run(["models", *arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)["data"]


KILLED = "f" * KEY_DIGITS
"""Key of a pack whose making was ended."""


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_pack_list_verify_and_remove(tiny_copy, shelf, capsys):
    made = asked(capsys, "pack", str(tiny_copy), "--precision", "int8")["packs"]
    assert [(pack["component"], pack["storage"], pack["arithmetic"]) for pack in made] == [
        ("text_encoder", "bfloat16", "bfloat16"),
        ("text_encoder_2", "bfloat16", "bfloat16"),
        ("transformer", "int8", "bfloat16"),
        ("vae", "bfloat16", "bfloat16"),
    ]
    more = asked(capsys, "pack", str(tiny_copy), "--precision", "float8_e4m3fn")["packs"]
    assert [pack["key"] for pack in more if pack not in made] == [more[2]["key"]], "encoders are shared"
    assert asked(capsys, "list")["packs"] == [pack for pack in asked(capsys, "list")["packs"] if "tensors" not in pack]
    assert {p["key"] for p in asked(capsys, "list")["packs"]} == {p["key"] for p in made + more}
    checked = asked(capsys, "verify", str(tiny_copy))
    assert checked["whole"]
    assert len(checked["packs"]) == 5
    removed = asked(capsys, "pack", str(tiny_copy), "--rm")
    assert len(removed["removed"]) == 5
    assert removed["freed_bytes"] == sum(pack["nbytes"] for pack in [*made, more[2]])
    assert shelf.packs() == []


def in_words(capsys, *arguments: str, code: int = 0) -> str:
    assert run(["models", *arguments]) == code
    said = capsys.readouterr()
    return said.out + said.err


def downloaded(tiny_copy: Path, owner: str, name: str) -> Path:
    """`tiny_copy`, moved to a hub's cache."""
    snapshot = tiny_copy.parent / "hf" / f"models--{owner}--{name}" / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    tiny_copy.rename(snapshot)
    (refs := snapshot.parents[1] / "refs").mkdir()
    (refs / "main").write_text("a" * 40)
    return snapshot


def file_with_base(tiny_copy: Path) -> Path:
    """A transformer in one file, and `tiny_copy` as its base."""
    file = tiny_copy.parent / "file.safetensors"
    shutil.copy(next((tiny_copy / "transformer").glob("*.safetensors")), file)
    return file


def test_people_are_told_sizes(tiny_copy, shelf, capsys):
    assert run(["models", "pack", str(tiny_copy)]) == 0
    assert "transformer: " in capsys.readouterr().out
    assert run(["models", "list"]) == 0
    assert "transformer" in capsys.readouterr().out
    assert run(["models", "verify", str(tiny_copy)]) == 0
    assert "4 packs" in capsys.readouterr().out
    assert run(["models", "pack", str(tiny_copy), "--rm"]) == 0
    assert "removed 4 packs" in capsys.readouterr().out


def test_verify_says_when_there_is_nothing_to_compare_with(tiny_copy, shelf, capsys):
    assert run(["models", "verify", str(tiny_copy)]) == 0
    assert "from no hub and without packs" in capsys.readouterr().out


def test_verify_finds_what_changed_and_drops_it(tiny_copy, shelf, capsys):
    made = asked(capsys, "pack", str(tiny_copy), "--precision", "int8")["packs"]
    flip(shelf.folder(made[2]["key"]) / WEIGHTS)
    checked = asked(capsys, "verify", str(tiny_copy), code=1)
    assert not checked["whole"]
    assert [pack["component"] for pack in checked["packs"] if pack["fault"]] == ["transformer"]
    assert shelf.find(made[2]["key"]) is None
    assert asked(capsys, "verify", str(tiny_copy))["whole"]
    assert asked(capsys, "pack", str(tiny_copy), "--precision", "int8")["packs"] == made


def test_verify_reads_packs_that_it_cannot_keep_from_removal(tiny_copy, shelf, capsys):
    made = asked(capsys, "pack", str(tiny_copy))["packs"]
    shutil.rmtree(shelf.root / "locks")
    (shelf.root / "locks").write_text("no lock can be taken, as where nothing can be written")
    assert "4 packs, 601 kB, all as they should be" in in_words(capsys, "verify", str(tiny_copy))
    flip(shelf.folder(made[3]["key"]) / WEIGHTS)
    said = in_words(capsys, "verify", str(tiny_copy), code=1)
    assert "the packed vae in bfloat16 is damaged: 'encoder.mid_block.resnets.1.norm2.weight'\n" in said
    assert "3 packs, " in said


def test_a_pack_of_another_version_is_removed_and_no_fault(tiny_copy, shelf, capsys):
    key = asked(capsys, "pack", str(tiny_copy))["packs"][3]["key"]
    index = shelf.folder(key) / INDEX
    made, former = index.read_text(), f'"schema": {PACK_SCHEMA - 1}'
    index.write_text(made.replace(f'"schema": {PACK_SCHEMA}', former))
    assert former in index.read_text()
    checked = asked(capsys, "verify", str(tiny_copy))
    assert checked["whole"]
    assert [(p["key"], p["outdated"], p["removed"]) for p in checked["packs"] if p["fault"]] == [(key, True, True)]
    assert not shelf.folder(key).exists()
    asked(capsys, "pack", str(tiny_copy))
    index.write_text(made.replace(f'"schema": {PACK_SCHEMA}', former))
    said = in_words(capsys, "verify", str(tiny_copy))
    assert f"is of no use any more: the pack {str(shelf.folder(key))!r} is of version {PACK_SCHEMA - 1}" in said
    assert "3 packs, " in said


def respell(folder: Path, old: str, new: str) -> None:
    """Change what the index of a pack says."""
    made = (folder / INDEX).read_text()
    assert old in made
    (folder / INDEX).write_text(made.replace(old, new))


SPOILED = {
    "truncated": lambda folder: os.truncate(folder / WEIGHTS, 5000),
    "without weights": lambda folder: (folder / WEIGHTS).unlink(),
    "an index that cannot be read": lambda folder: (folder / INDEX).write_text("{"),
    "an index with the name of no file": lambda folder: respell(folder, '"sources": [', '"sources": ["a\\u0000b",'),
    "an index with the path of no model": lambda folder: respell(folder, '"model_path": "', '"model_path": "\\u0000'),
}


@pytest.mark.parametrize("how", SPOILED)
def test_what_is_no_pack_any_more_is_named_and_removed(tiny_copy, shelf, capsys, how):
    key = asked(capsys, "pack", str(tiny_copy))["packs"][3]["key"]
    SPOILED[how](shelf.folder(key))
    checked = asked(capsys, "verify", str(tiny_copy), code=1)
    assert not checked["whole"]
    assert [(pack["key"], pack["removed"]) for pack in checked["packs"] if pack["fault"]] == [(key, True)]
    assert len(checked["packs"]) == 4
    assert not shelf.folder(key).exists()
    asked(capsys, "pack", str(tiny_copy))
    SPOILED[how](shelf.folder(key))
    (shelf.root / f".{KILLED}.partial").mkdir()
    removed = asked(capsys, "pack", str(tiny_copy), "--rm")
    assert key in removed["removed"]
    assert set(removed["remains"]) == {key, KILLED}
    assert [left.name for left in shelf.root.iterdir()] == ["locks"]


def test_what_remains_is_not_counted_among_packs_and_other_folders_stay(tiny_copy, shelf, capsys):
    asked(capsys, "pack", str(tiny_copy))
    (shelf.root / "mynotes").mkdir()
    (shelf.root / f".{KILLED}.partial").mkdir()
    assert "removed 4 packs and what remained of 1 pack: 601 kB freed" in in_words(
        capsys, "pack", str(tiny_copy), "--rm"
    )
    assert "there are no packs to remove" in in_words(capsys, "pack", str(tiny_copy), "--rm")
    assert (shelf.root / "mynotes").is_dir()


@pytest.mark.parametrize("name", [INDEX, WEIGHTS])
def test_packs_that_cannot_be_read_now_stay(tiny_copy, shelf, capsys, monkeypatch, name):
    made = asked(capsys, "pack", str(tiny_copy), "--precision", "int8")["packs"]
    with monkeypatch.context() as refused:
        refuse(refused, name, errno.EACCES)
        checked = asked(capsys, "verify", str(tiny_copy), code=1)
        said = in_words(capsys, "verify", str(tiny_copy), code=1)
    assert not checked["whole"]
    assert [(pack["checked"], pack["removed"]) for pack in checked["packs"]] == [(False, False)] * 4
    assert "Permission denied" in said
    assert "check who may read" in said
    assert "what is told above" not in said
    assert {pack.key for pack in shelf.packs()} == {pack["key"] for pack in made}


def test_one_damaged_pack_is_said_in_the_singular(tiny_copy, shelf, capsys):
    first, *others = asked(capsys, "pack", str(tiny_copy))["packs"]
    for pack in others:
        shelf.remove(pack["key"])
    assert "1 pack, " in in_words(capsys, "verify", str(tiny_copy))
    flip(shelf.folder(first["key"]) / WEIGHTS)
    assert "the packed text_encoder in bfloat16 is damaged" in in_words(capsys, "verify", str(tiny_copy), code=1)


def test_a_model_larger_than_the_limit_is_refused_before_anything_is_written(tiny_copy, shelf, capsys, monkeypatch):
    monkeypatch.setenv("AUTOFLUX_PACK_LIMIT", "600kB")  # of 601 kB, of which the transformer's are 318 kB
    said = in_words(capsys, "pack", str(tiny_copy), code=1)
    assert "the packs of this model would take 601 kB, and packs may take 600 kB" in said
    assert "raise AUTOFLUX_PACK_LIMIT" in said
    assert shelf.packs() == []


def test_a_limit_that_is_no_size_is_told_with_the_name_of_its_variable(tiny_copy, shelf, capsys, monkeypatch):
    monkeypatch.setenv("AUTOFLUX_PACK_LIMIT", "abc")
    said = in_words(capsys, "pack", str(tiny_copy), code=2)
    assert "AUTOFLUX_PACK_LIMIT='abc' is neither 0 nor a size" in said


def test_the_packs_of_a_model_do_not_make_room_for_each_other(tiny_copy, shelf, capsys, monkeypatch):
    asked(capsys, "pack", str(tiny_copy), "--precision", "int8")
    monkeypatch.setenv("AUTOFLUX_PACK_LIMIT", "610kB")
    made = asked(capsys, "pack", str(tiny_copy))["packs"]
    assert sorted(pack.key for pack in shelf.packs()) == sorted(pack["key"] for pack in made)


def test_packs_that_cannot_be_deleted_are_not_called_in_use(tiny_copy, shelf, capsys):
    made = asked(capsys, "pack", str(tiny_copy))["packs"]
    shutil.rmtree(shelf.root / "locks")
    (shelf.root / "locks").write_text("")
    assert "error: cannot delete the pack" in in_words(capsys, "pack", str(tiny_copy), "--rm", code=1)
    assert run(["models", "pack", str(tiny_copy), "--rm", "--json"]) == 1
    envelope = json.loads(capsys.readouterr().out)
    assert envelope["error"]["code"] == "output_unwritable"
    assert set(envelope["data"]["failed"]) == {pack["key"] for pack in made}
    assert len(shelf.packs()) == 4


def test_packs_are_removed_by_the_name_they_are_listed_under_also_of_a_model_that_is_gone(tiny_copy, shelf, capsys):
    asked(capsys, "pack", str(tiny_copy))
    shutil.rmtree(tiny_copy)
    assert {pack["model"] for pack in asked(capsys, "list")["packs"]} == {"tiny"}
    assert "removed 4 packs" in in_words(capsys, "pack", "tiny", "--rm")
    assert "no model named 'tiny'" in in_words(capsys, "pack", "tiny", "--rm", code=2)


def test_all_packs_listed_under_a_name_go_without_a_base_and_what_another_model_uses_stays(tiny_copy, shelf, capsys):
    file = file_with_base(tiny_copy)
    asked(capsys, "pack", str(file), "--base", str(tiny_copy))
    assert len(asked(capsys, "pack", str(file), "--rm")["removed"]) == 4
    assert "there are no packs to remove" in in_words(capsys, "pack", str(file), "--rm")

    own = asked(capsys, "pack", str(file), "--base", str(tiny_copy), "--precision", "int8")["packs"][2]
    asked(capsys, "pack", str(tiny_copy))
    removed = asked(capsys, "pack", "file", "--rm")
    assert removed["removed"] == [own["key"]]
    assert list(removed["shared"].values()) == [["tiny"]] * 3
    assert "kept, since they are also of 'tiny': 3 packs" in in_words(capsys, "pack", "file", "--rm")
    assert len(asked(capsys, "pack", str(tiny_copy), "--rm")["removed"]) == 4
    assert shelf.packs() == []


@pytest.mark.parametrize("formats", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_two_wide_formats_exclude_each_other(tiny_copy, shelf, capsys, formats):
    precision, arithmetic = formats
    given = ("pack", str(tiny_copy), "--precision", precision, "--arithmetic", arithmetic)
    said = in_words(capsys, *given, code=2)
    assert f"--precision {precision} and --arithmetic {arithmetic} exclude each other" in said
    assert "give one of the two" in said
    assert shelf.packs() == []
    assert "there are no packs to remove" in in_words(capsys, *given, "--rm"), "what was made before can be removed"


@pytest.mark.parametrize("given", [("--precision", "float16"), ("--arithmetic", "float16")])
def test_one_wide_format_is_that_of_everything(tiny_copy, shelf, capsys, given):
    made = asked(capsys, "pack", str(tiny_copy), *given)["packs"]
    assert {(pack["storage"], pack["arithmetic"]) for pack in made} == {("float16", "float16")}


def test_a_path_that_is_there_is_not_also_the_name_of_a_model_elsewhere(tiny_copy, shelf, capsys, monkeypatch):
    other = shutil.copytree(tiny_copy, tiny_copy.parent / "n" / "tiny", copy_function=shutil.copyfile)
    others = {pack["key"] for pack in asked(capsys, "pack", str(tiny_copy))["packs"]}
    monkeypatch.chdir(other.parent)
    assert asked(capsys, "pack", "tiny", "--rm")["removed"] == []
    made = {pack["key"] for pack in asked(capsys, "pack", "tiny")["packs"]}
    assert not made & others
    assert set(asked(capsys, "pack", "tiny", "--rm")["removed"]) == made

    assert {pack["key"] for pack in asked(capsys, "pack", "tiny")["packs"]} == made
    shutil.rmtree(other)
    assert set(asked(capsys, "pack", "tiny", "--rm")["removed"]) == made, "it was there when it was packed"
    assert set(asked(capsys, "pack", "tiny", "--rm")["removed"]) == others, "no path any more, but a name"


def test_the_name_of_a_registered_model_is_neither_a_path_nor_that_of_a_folder(tiny_copy, shelf, capsys, monkeypatch):
    other = shutil.copytree(tiny_copy, tiny_copy.parent / "n" / "tiny", copy_function=shutil.copyfile)
    monkeypatch.chdir(other.parent)
    asked(capsys, "pack", "tiny")
    made = {pack["key"] for pack in asked(capsys, "pack", str(tiny_copy))["packs"]}
    plugins = Plugins()
    plugins.models.add("test", ModelEntry(name="tiny", path=str(tiny_copy), description=""))
    assert set(remove_packs_of("tiny", plugins).removed) == made
    assert remove_packs_of("tiny", plugins) == RemovedPacks()
    assert len(shelf.packs()) == 4


def test_only_packs_of_the_formats_that_are_named_are_removed(tiny_copy, shelf, capsys):
    def pack(*formats: str) -> dict[str, str]:
        return {made["component"]: made["key"] for made in asked(capsys, "pack", str(tiny_copy), *formats)["packs"]}

    def remove(*formats: str) -> set[str]:
        return set(asked(capsys, "pack", str(tiny_copy), *formats, "--rm")["removed"])

    wide, narrow, half = pack(), pack("--precision", "int8"), pack("--precision", "int8", "--arithmetic", "float16")
    os.truncate(shelf.folder(half["transformer"]) / WEIGHTS, 5000)
    assert remove("--precision", "float8_e4m3fn") == set()
    assert remove("--precision", "int8", "--arithmetic", "bfloat16") == {narrow["transformer"]}
    assert remove("--precision", "int8") == {half["transformer"]}
    assert remove("--precision", "bfloat16") == {wide["transformer"]}
    assert remove("--arithmetic", "float16") == set(half.values()) - {half["transformer"]}
    assert remove() == set(wide.values()) - {wide["transformer"]}


def test_what_others_remove_meanwhile_is_not_counted(tiny_copy, shelf, capsys, monkeypatch):
    made = asked(capsys, "pack", str(tiny_copy))["packs"]
    bytes_of = Shelf.bytes_of

    def raced(self: Shelf, key: str) -> int:
        if key != made[0]["key"]:
            shelf.remove(key)
        return bytes_of(self, key)

    monkeypatch.setattr(Shelf, "bytes_of", raced)
    removed = asked(capsys, "pack", str(tiny_copy), "--rm")
    assert removed["removed"] == [made[0]["key"]]
    assert removed["in_use"] == []


def test_lines_for_programs_are_not_broken(tiny_copy, shelf, capsys):
    snapshot = downloaded(tiny_copy, "o" * 60, "n" * 60)
    listed = in_words(capsys, "list").splitlines()
    assert [line for line in listed if str(snapshot) in line and "complete" in line]


def test_packs_in_use_stay(tiny_copy, shelf, capsys):
    made = asked(capsys, "pack", str(tiny_copy))["packs"]
    opened = shelf.open(made[0]["key"])
    assert opened
    removed = asked(capsys, "pack", str(tiny_copy), "--rm")
    assert removed["in_use"] == [made[0]["key"]]
    opened.close()


def test_a_model_that_is_not_there_is_told(capsys):
    assert run(["models", "pack", "no-such-model", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "unknown_name"
    assert run(["models", "pack", "flux.1-dev", "--json"]) == 1
    assert "pull" in json.loads(capsys.readouterr().out)["error"]["hint"]


def test_no_pack_holds_as_long_as_the_command(tiny_copy, capsys):
    asked(capsys, "pack", str(tiny_copy))
    assert run(["generate", "a red circle", "--model", "no-such-model", "--no-pack"]) == 2
    assert packs_wanted()


def test_rm_removes_the_packs_of_a_downloaded_model(tiny_copy, shelf, capsys):
    snapshot = downloaded(tiny_copy, "someone", "tiny")
    assert len(asked(capsys, "pack", "someone/tiny")["packs"]) == 4
    assert len(asked(capsys, "rm", "someone/tiny", "--yes")["packs"]["removed"]) == 4
    assert shelf.packs() == []
    assert not snapshot.exists()


def test_rm_of_a_model_whose_packs_cannot_be_deleted_is_no_success(tiny_copy, shelf, capsys):
    downloaded(tiny_copy, "someone", "tiny")
    asked(capsys, "pack", "someone/tiny")
    shutil.rmtree(shelf.root / "locks")
    (shelf.root / "locks").write_text("")
    assert run(["models", "rm", "someone/tiny", "--yes", "--json"]) == 1
    envelope = json.loads(capsys.readouterr().out)
    assert not envelope["ok"]
    assert envelope["error"]["code"] == "output_unwritable"
    assert len(envelope["data"]["packs"]["failed"]) == 4
