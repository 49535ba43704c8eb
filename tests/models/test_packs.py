"""The shelf of packs: whole or not there, within its limit, and never away under a user."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

from autoflux.errors import DamagedPack, DiskFull, OutputUnwritable, UnreadablePack, UsageError
from autoflux.models import pack_shelf
from autoflux.models.finding import find
from autoflux.models.pack_removal import packed_models, packs_of
from autoflux.models.pack_shelf import Shelf, limit_bytes
from autoflux.models.packs import (
    INDEX,
    KEY_DIGITS,
    PACK_SCHEMA,
    PIECE_BYTES,
    WEIGHTS,
    Pack,
    Packed,
    Recipe,
    check_pack,
    header,
    lay_out,
    pieces,
    read_index,
)
from autoflux.models.values import Precision
from autoflux.models.weights import data_ranges, read_tensors
from autoflux.runtime.pack_file import checksum
from tests.refusals import refuse

A, B, C, D, E = (digit * KEY_DIGITS for digit in "abcde")


@pytest.fixture
def shelf(tmp_path) -> Shelf:
    return Shelf(tmp_path / "packs")


def put(shelf: Shelf, key: str, nbytes: int = 100_000, *, used: int | None = None) -> Pack:
    """A pack with one tensor of about that size; `used` is when it was used last."""
    data = os.urandom(nbytes)
    checksums = tuple(checksum(data[i : i + PIECE_BYTES]) for i in range(0, nbytes, PIECE_BYTES))
    tensor = Packed(name="x", format="I8", shape=(nbytes,), offset=0, nbytes=nbytes)
    head = header([tensor])
    tensor = tensor.replace(offset=len(head), checksums=checksums)
    pack = Pack(
        key=key,
        component="transformer",
        storage=Precision.INT8,
        arithmetic=Precision.BFLOAT16,
        model="m",
        model_path="/m",
        sources=("/m/x",),
        nbytes=len(head) + nbytes,
        tensors=(tensor,),
    )
    with shelf.making(key, pack.nbytes) as folder:
        assert folder is not None
        assert (folder / WEIGHTS).stat().st_size == pack.nbytes, "room is taken beforehand"
        (folder / WEIGHTS).write_bytes(head + data)
        (folder / INDEX).write_text(pack.to_json())
    if used is not None:
        os.utime(shelf.folder(key) / INDEX, ns=(used, used))
    return pack


def keys(shelf: Shelf) -> list[str]:
    return [pack.key for pack in shelf.packs()]


def left_behind(shelf: Shelf) -> list[str]:
    """All but whole packs and locks."""
    return [f.name for f in shelf.root.iterdir() if f.name != "locks" and f.name not in keys(shelf)]


def test_a_pack_is_found_again_and_is_any_tools_safetensors(shelf):
    pack = put(shelf, A)
    assert shelf.find(A) == pack
    file = shelf.folder(A) / WEIGHTS
    assert [(t.name, t.shape, t.precision) for t in read_tensors(file)] == [("x", (100_000,), "I8")]
    assert data_ranges(file)["x"] == (pack.tensors[0].offset, 100_000)
    assert pack.tensors[0].offset % 4096 == 0
    assert check_pack(shelf.folder(A), checksum) == ""


def test_pieces_cover_a_tensor():
    tensor = Packed(name="x", format="I8", shape=(), offset=7, nbytes=2 * PIECE_BYTES + 5, checksums=(1, 2, 3))
    assert list(pieces(tensor)) == [
        (7, PIECE_BYTES, 1),
        (7 + PIECE_BYTES, PIECE_BYTES, 2),
        (7 + 2 * PIECE_BYTES, 5, 3),
    ]


@pytest.mark.parametrize("at", [0, 9, 4096, 50_000, -1])
def test_every_flipped_bit_is_found(shelf, at):
    pack = put(shelf, A)
    file = shelf.folder(A) / WEIGHTS
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    if 0 <= at < 4096:
        with pytest.raises(DamagedPack, match="is not what its index says"):
            check_pack(shelf.folder(A), checksum)
        assert shelf.find(A) is None
    else:
        assert check_pack(shelf.folder(A), checksum) == "'x'"
        assert shelf.find(A) == pack, "neither index nor header tell"


def spoil(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new)


@pytest.mark.parametrize(
    "spoiled",
    [
        lambda text: "",
        lambda text: text[:-20],
        lambda text: spoil(text, f'"schema": {PACK_SCHEMA}', f'"schema": {PACK_SCHEMA + 1}'),
        lambda text: spoil(text, f'"key": "{A}"', f'"key": "{B}"'),
        lambda text: spoil(text, '"checksums": [', '"checksums": [5, '),
        lambda text: spoil(text, '"nbytes": 100000', '"nbytes": 100001000'),
        lambda text: spoil(text, '"int8"', '"int9"'),
        lambda text: spoil(text, '"format": "I8"', '"format": "ZZ"'),
        lambda text: spoil(text, '"format": "I8"', '"format": "BF16"'),
        lambda text: spoil(text, '"format": "I8"', '"format": "F8_E4M3"'),  # as many bytes
        lambda text: spoil(text, '"shape": [', '"shape": [0, '),
        lambda text: spoil(text, '"shape": [', '"shape": [1, '),  # as many bytes
        lambda text: spoil(text, '"name": "x"', '"name": "y"'),
        lambda text: spoil(text, '"offset": 4096', '"offset": 4097'),
        lambda text: spoil(text, '"/m/x"', '"/m/\\u0000x"'),
    ],
)
def test_an_index_that_cannot_be_right_is_no_pack_and_is_swept(shelf, spoiled):
    put(shelf, A)
    index = shelf.folder(A) / INDEX
    index.write_text(spoiled(index.read_text()))
    for look in (lambda: read_index(shelf.folder(A)), lambda: shelf.open(A)):
        with pytest.raises(DamagedPack):
            look()
    assert shelf.find(A) is None
    put(shelf, B)
    assert keys(shelf) == [B]
    assert left_behind(shelf) == []


def test_a_pack_of_another_version_says_so(shelf):
    put(shelf, A)
    index = shelf.folder(A) / INDEX
    index.write_text(spoil(index.read_text(), f'"schema": {PACK_SCHEMA}', '"schema": 1'))
    with pytest.raises(DamagedPack, match=f"is of version 1, and this is {PACK_SCHEMA}"):
        read_index(shelf.folder(A))


def test_a_truncated_file_is_no_pack_and_is_made_again(shelf):
    pack = put(shelf, A)
    os.truncate(shelf.folder(A) / WEIGHTS, pack.nbytes - 1)
    assert shelf.find(A) is None
    assert put(shelf, A).key == A
    assert shelf.find(A)


def test_an_error_while_making_leaves_nothing(shelf):
    def fail() -> None:
        with shelf.making(A, 5000) as folder:
            assert folder
            (folder / INDEX).write_text("{}")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert left_behind(shelf) == []
    assert put(shelf, A).key == A


def test_what_is_there_is_not_made_twice(shelf):
    put(shelf, A)
    with shelf.making(A, 5000) as folder:
        assert folder is None
    assert keys(shelf) == [A]


def test_the_least_recently_used_go_when_the_limit_asks_for_it(shelf, monkeypatch):
    for number, key in enumerate((B, A, C)):
        put(shelf, key, used=10**18 + number)
    opened = shelf.open(B)
    assert opened
    opened.close()
    monkeypatch.setenv("AUTOFLUX_PACK_LIMIT", "350kB")
    put(shelf, D)
    assert sorted(keys(shelf)) == [B, C, D], "b was used meanwhile"


def test_what_is_in_use_stays_and_the_next_one_goes(shelf, monkeypatch):
    for number, key in enumerate((A, B, C)):
        put(shelf, key, used=10**18 + number)
    opened = shelf.open(A)
    assert opened
    os.utime(shelf.folder(A) / INDEX, ns=(10**18, 10**18))
    assert not shelf.remove(A)
    monkeypatch.setenv("AUTOFLUX_PACK_LIMIT", "350kB")
    put(shelf, D)
    assert sorted(keys(shelf)) == [A, C, D]
    assert opened.weights.read_bytes()
    opened.close()
    assert shelf.remove(A)


def test_where_all_are_in_use_there_is_no_room(shelf, monkeypatch):
    put(shelf, A)
    opened = shelf.open(A)
    assert opened
    monkeypatch.setenv("AUTOFLUX_PACK_LIMIT", "150kB")
    with pytest.raises(DiskFull, match="are in use"):
        put(shelf, B)
    assert keys(shelf) == [A]
    assert left_behind(shelf) == []


def test_nothing_goes_for_what_finds_no_room_all_the_same(shelf, monkeypatch):
    for number, key in enumerate((A, B)):
        put(shelf, key, used=10**18 + number)
    monkeypatch.setenv("AUTOFLUX_PACK_LIMIT", "300kB")
    with shelf.kept([B]), pytest.raises(DiskFull, match="leave 196 kB of 300 kB"):
        put(shelf, C, 200_000)
    assert keys(shelf) == [A, B]


def test_forgetting_an_open_pack_is_as_good_as_closing_it(shelf):
    put(shelf, A)
    opened = shelf.open(A)
    del opened
    assert shelf.remove(A)
    assert left_behind(shelf) == keys(shelf) == []
    assert not list((shelf.root / "locks").glob("*.use"))


@pytest.mark.parametrize("limit", ["0", "50kB"])
def test_a_pack_larger_than_the_limit_is_refused_and_removes_nothing(shelf, monkeypatch, limit):
    put(shelf, A, 20_000)
    monkeypatch.setenv("AUTOFLUX_PACK_LIMIT", limit)
    with pytest.raises(DiskFull, match="packs may take") as raised:
        put(shelf, B)
    assert "AUTOFLUX_PACK_LIMIT" in raised.value.hint
    assert keys(shelf) == [A]


def test_the_limit_is_a_size_or_a_share_of_the_disk(shelf, monkeypatch):
    shelf.root.mkdir()
    assert 0 < limit_bytes(shelf.root) <= 120 * 2**30
    monkeypatch.setenv("AUTOFLUX_PACK_LIMIT", "plenty")
    with pytest.raises(UsageError, match="AUTOFLUX_PACK_LIMIT='plenty' is neither 0 nor a size"):
        put(shelf, A)
    assert left_behind(shelf) == []


def test_more_than_the_disk_has_is_refused_beforehand(shelf, monkeypatch):
    monkeypatch.setenv("AUTOFLUX_PACK_LIMIT", "1000000TB")
    with pytest.raises(DiskFull, match="are free at"), shelf.making(A, 10**17):
        pass
    assert left_behind(shelf) == []


def test_room_that_is_left_to_others_is_told(shelf, monkeypatch):
    monkeypatch.setenv("AUTOFLUX_PACK_LIMIT", "1TB")
    monkeypatch.setattr(pack_shelf.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_150_000_000))
    with (
        pytest.raises(DiskFull, match=r"1\.13 GB and have to leave 1\.07 GB to others, and 1\.15 GB are free at"),
        shelf.making(A, 1_130_000_000),
    ):
        pass


def test_a_small_disk_is_not_called_a_limit(shelf, monkeypatch):
    monkeypatch.delenv("AUTOFLUX_PACK_LIMIT", raising=False)
    with pytest.raises(DiskFull, match="are free at") as raised, shelf.making(A, 10**17):
        pass
    assert "AUTOFLUX_PACK_LIMIT" not in raised.value.hint


def test_packs_that_are_kept_make_no_room(shelf, monkeypatch):
    put(shelf, A)
    monkeypatch.setenv("AUTOFLUX_PACK_LIMIT", "250kB")
    with shelf.kept([A, B, C]):
        put(shelf, B)
        with pytest.raises(DiskFull, match="are in use"):
            put(shelf, C)
        assert not shelf.remove(B)
    assert keys(shelf) == [A, B]
    put(shelf, C)
    assert keys(shelf) == [B, C]
    assert not list((shelf.root / "locks").glob("*.use"))


def test_what_cannot_be_deleted_is_not_called_in_use(shelf):
    put(shelf, A)
    without_locks(shelf)
    with pytest.raises(OutputUnwritable, match="cannot delete the pack"):
        shelf.remove(A)
    assert keys(shelf) == [A]


def without_locks(shelf: Shelf) -> None:
    """Nobody can take a lock any more, as in a folder that is read-only."""
    (shelf.root / "locks").rename(shelf.root / ".before")
    (shelf.root / "locks").write_text("")


def test_what_remains_of_packs_is_told_from_packs(shelf):
    pack = put(shelf, A)
    for key in (B, C, D):
        put(shelf, key)
    os.truncate(shelf.folder(B) / WEIGHTS, pack.nbytes - 1)
    (shelf.folder(C) / INDEX).write_text("{")
    (shelf.folder(D) / INDEX).unlink()
    (shelf.root / f".{E}.partial").mkdir()
    found = {left.key: (left.told is not None, left.fault) for left in shelf.remains()}
    assert found == {
        B: (True, f"the pack {str(shelf.folder(B))!r} has 104,095 bytes of 104,096"),
        C: (False, found[C][1]),
        D: (False, ""),
        E: (False, ""),
    }
    assert "cannot be read" in found[C][1]
    assert [shelf.holds(key) for key in (A, B, D, E)] == [True, True, False, False]


def test_a_pack_that_may_not_be_looked_at_is_not_used(shelf, monkeypatch):
    put(shelf, A)
    stat = Path.stat

    def refusing(path: Path, **options):
        if path.is_relative_to(shelf.root):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refusing)
    assert shelf.open(A) is None
    assert shelf.find(A) is None
    assert shelf.packs() == []


@pytest.mark.parametrize("code", [errno.EACCES, errno.EMFILE, errno.EIO, errno.ESTALE])
def test_a_pack_that_cannot_be_read_now_stays(shelf, monkeypatch, code):
    pack = put(shelf, A)
    with monkeypatch.context() as refused:
        refuse(refused, INDEX, code)
        with pytest.raises(UnreadablePack):
            read_index(shelf.folder(A))
        assert shelf.find(A) is None
        assert [(left.key, left.unreadable) for left in shelf.remains()] == [(A, True)]
        shelf.sweep()
        assert not shelf.remove(A, only_remains=True)
        shelf.drop(A, only_remains=True)
    assert shelf.packs() == [pack]
    refuse(monkeypatch, WEIGHTS, code)
    with pytest.raises(UnreadablePack):
        check_pack(shelf.folder(A), checksum)


def test_what_is_no_pack_by_its_name_is_left_alone(shelf):
    put(shelf, A)
    others = {"mynotes", "lost+found", ".mynotes.partial", A[1:], B.upper()}
    for name in others:
        (shelf.root / name).mkdir()
        (shelf.root / name / WEIGHTS).write_bytes(bytes(1000))
    assert shelf.remains() == []
    assert shelf.used_bytes == shelf.bytes_of(A)
    shelf.sweep()
    assert set(left_behind(shelf)) == others


class Raced(Shelf):
    """Others act just after this process has looked at what remains."""

    others = staticmethod(lambda: None)

    def remains(self):
        found = super().remains()
        self.others()
        return found


@pytest.mark.parametrize(
    "clear", [Shelf.sweep, lambda shelf: [shelf.drop(r.key, only_remains=True) for r in shelf.remains()]]
)
def test_a_pack_that_is_finished_after_a_look_at_what_remains_stays(shelf, clear):
    put(shelf, A)
    whole, partial = shelf.folder(A), shelf.root / f".{A}.partial"
    whole.rename(partial)
    raced = Raced(shelf.root)
    raced.others = lambda: partial.exists() and partial.rename(whole)
    clear(raced)
    assert keys(shelf) == [A]


def test_what_a_killed_process_left_beside_a_pack_goes_without_it(shelf):
    put(shelf, A)
    (shelf.root / f".{A}.partial").mkdir()
    shelf.sweep()
    assert keys(shelf) == [A]
    assert left_behind(shelf) == []


def test_a_pack_is_given_up_only_while_nobody_makes_or_removes_it(shelf, monkeypatch):
    put(shelf, A)
    monkeypatch.setattr(pack_shelf, "OPEN_SECONDS", 0)
    with FileLock(shelf.root / "locks" / f"{A}.lock"):
        shelf.drop(A)
    assert keys(shelf) == [A]
    opened = shelf.open(A)
    shelf.drop(A)
    assert keys(shelf) == []
    assert opened.weights.exists(), "it is being read"


def test_a_pack_that_others_remove_meanwhile_makes_room(shelf, monkeypatch):
    put(shelf, A)

    class Emptied(Shelf):
        def packs(self):
            shelf.remove(A)
            return super().packs()

    monkeypatch.setenv("AUTOFLUX_PACK_LIMIT", "150kB")
    put(Emptied(shelf.root), B)
    assert keys(shelf) == [B]


def test_a_pack_that_goes_while_it_is_measured_takes_nothing(shelf, monkeypatch):
    put(shelf, A)
    stat = Path.stat

    def removing(path: Path, **options):
        found = stat(path, **options)
        if path.name == WEIGHTS:
            shutil.rmtree(path.parent)
        return found

    monkeypatch.setattr(Path, "stat", removing)
    assert shelf.used_bytes > 0
    assert shelf.used_bytes == 0


def test_packs_are_of_models_whose_files_they_are_of_and_of_those_that_take_parts_of_them():
    def pack(component: str, source: str, path: str, base: str = "") -> Pack:
        return Pack(
            key=f"{component} of {path}",
            component=component,
            storage=Precision.INT8,
            arithmetic=Precision.BFLOAT16,
            model=path.strip("/"),
            model_path=path,
            base_path=base,
            sources=(source,),
            nbytes=1,
            tensors=(),
        )

    base = pack("transformer", "/base/transformer/x", "/base")
    own, vae = (pack("transformer", "/file", "/file", "/base"), pack("vae", "/base/vae/x", "/file", "/base"))

    def users(of: Pack, *packs: Pack) -> set[str]:
        return {model.name for model in packed_models(packs) if model.uses(of)}

    assert users(vae, base, own, vae) == {"base", "file"}
    assert users(base, base, own, vae) == {"base"}, "the file has a transformer of its own"
    assert users(vae, base, vae) == {"base"}, "of the file only what its base has is packed"
    assert users(vae, own, vae) == {"file"}
    assert packs_of({Path("/base")}, [base, own, vae]) == [base, vae]
    assert packs_of({Path("/file")}, [base, own, vae]) == [own, vae]


def test_files_that_links_now_lead_to_in_a_circle_are_of_no_other_model(tmp_path):
    (loop := tmp_path / "x").symlink_to(loop)
    pack = Pack(
        key=A,
        component="transformer",
        storage=Precision.INT8,
        arithmetic=Precision.BFLOAT16,
        model="m",
        model_path=str(tmp_path),
        sources=(str(loop),),
        nbytes=1,
        tensors=(),
    )
    assert pack.is_from(tmp_path)
    assert not pack.is_from(tmp_path / "other")


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "packs").write_text("not a folder")
    with pytest.raises(OutputUnwritable, match="cannot write a pack"):
        put(Shelf(tmp_path / "packs"), A)


KILLED = f"""
import os, signal, sys
from pathlib import Path
from autoflux.models.pack_shelf import Shelf
from autoflux.models.packs import INDEX

def die():
    os.kill(os.getpid(), signal.SIGKILL)

shelf = Shelf(Path(sys.argv[1]))
if sys.argv[2] == "using":
    opened = shelf.open("{A}")
    assert opened
    die()
with shelf.making("{B}", 5000) as folder:
    if sys.argv[2] == "begun":
        die()
    (folder / INDEX).write_text((shelf.folder("{A}") / INDEX).read_text().replace("{A}", "{B}"))
    die()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
@pytest.mark.parametrize("when", ["begun", "with an index", "using"])
def test_a_process_killed_at_any_point_leaves_no_pack_and_no_lock(shelf, when):
    put(shelf, A)
    code = subprocess.run([sys.executable, "-c", KILLED, shelf.root, when], check=False).returncode
    assert code == -9
    assert keys(shelf) == [A]
    assert shelf.open(B) is None
    assert put(shelf, B).key == B
    assert left_behind(shelf) == []
    assert shelf.remove(A)


def test_what_a_killed_process_left_goes_when_another_pack_is_made(shelf):
    put(shelf, A)
    subprocess.run([sys.executable, "-c", KILLED, shelf.root, "begun"], check=False)
    assert left_behind(shelf) == [f".{B}.partial"]
    put(shelf, C)
    assert left_behind(shelf) == []


# Keys and order


def test_a_key_tells_sources_and_formats_apart(tiny_copy):
    model = find(str(tiny_copy), {})
    part = model.component("transformer")
    made = {Recipe(part, storage, arithmetic).key() for storage in Precision for arithmetic in Precision}
    assert len(made) == len(Precision) ** 2
    key = Recipe(part, Precision.INT8, Precision.BFLOAT16).key()
    assert Recipe(find(str(tiny_copy), {}).component("transformer"), Precision.INT8, Precision.BFLOAT16).key() == key
    file = Path(part.files[0])
    os.utime(file, ns=(1, 1))
    assert Recipe(part, Precision.INT8, Precision.BFLOAT16).key() != key


def test_files_of_a_hubs_cache_are_known_by_their_checksum(tiny_copy):
    file = next((tiny_copy / "vae").glob("*.safetensors"))
    blob = tiny_copy / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    file.rename(blob)
    file.symlink_to(blob)
    recipe = Recipe(find(str(tiny_copy), {}).component("vae"), Precision.BFLOAT16, Precision.BFLOAT16)
    key = recipe.key()
    os.utime(blob, ns=(1, 1))
    assert recipe.key() == key
    blob.rename(other := blob.with_name("cd" * 32))
    file.unlink()
    file.symlink_to(other)
    assert recipe.key() != key


def test_blocks_lie_in_the_order_they_run_with_the_modulation_first(tiny_model):
    part = find(str(tiny_model), {}).component("transformer")
    names = [item.packed.name for item in lay_out(Recipe(part, Precision.INT8, Precision.BFLOAT16))]
    blocks = [name.split(".")[:2] for name in names if "transformer_blocks." in name]
    order = [["transformer_blocks", str(i)] for i in range(2)] + [
        ["single_transformer_blocks", str(i)] for i in range(3)
    ]
    assert [block for i, block in enumerate(blocks) if block != blocks[i - 1]] == order
    first = [name for name in names if name.startswith("transformer_blocks.0.")]
    assert ["norm1" in name for name in first] == [True] * 4 + [False] * (len(first) - 4)
    at = names.index("transformer_blocks.0.attn.to_q.weight")
    assert names[at - 1] == "transformer_blocks.0.attn.to_q.weight_scale"


def test_nothing_lies_between_tensors(tiny_model):
    for part in find(str(tiny_model), {}).components:
        tensors = [item.packed for item in lay_out(Recipe(part, Precision.BFLOAT16, Precision.BFLOAT16))]
        end = len(header(tensors))
        for tensor in tensors:
            assert tensor.offset == end
            end += tensor.nbytes
