"""GGUF headers: read as their own library reads them, and not believed."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoflux.errors import AutofluxError, DamagedCheckpoint, UnsupportedModel
from autoflux.models.formats import GGML
from autoflux.models.gguf import read_gguf
from tests.layouts import write_gguf

Q = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    arrays = {f"a.{form.name}": np.ones((3, 64), np.float32) for form in (Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0)}
    arrays["bias.F32"] = np.ones(7, np.float32)
    made = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return write_gguf(made, arrays, lambda name, _array: Q[name.partition(".")[2]])


def test_formats_are_those_of_the_library():
    for number, (name, form) in GGML.items():
        assert (form.block_items, form.block_bytes) == gguf.GGML_QUANT_SIZES[Q(number)]
        assert Q(number).name == name


def test_a_header_is_read_as_the_library_reads_it(file):
    header, reader = read_gguf(file), gguf.GGUFReader(str(file))
    assert [(t.name, t.format, t.offset, t.nbytes) for t in header.tensors] == [
        (t.name, t.tensor_type.name, t.data_offset, t.n_bytes) for t in reader.tensors
    ]
    assert [t.shape for t in header.tensors] == [tuple(int(n) for n in t.shape[::-1]) for t in reader.tensors]
    assert header.metadata["general.architecture"] == "flux"


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _tensor(name: str = "a", shape: tuple[int, ...] = (32, 2), kind: int = 0, offset: int = 0) -> bytes:
    return _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def _gguf(*tensors: bytes, counts: tuple[int, int] | None = None, entries: bytes = b"", data: int = 256) -> bytes:
    count, pairs = counts or (len(tensors), 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, count, pairs) + entries + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


LYING = {
    "sound": (_gguf(_tensor()), None, ""),
    "too many tensors": (_gguf(_tensor(), counts=(2**60, 0)), DamagedCheckpoint, "announces"),
    "too many entries": (_gguf(_tensor(), counts=(1, 2**60)), DamagedCheckpoint, "announces"),
    "a name without end": (_gguf(struct.pack("<Q", 2**62)), DamagedCheckpoint, "announces"),
    "an array without end": (
        _gguf(_tensor(), counts=(1, 1), entries=_string("k") + struct.pack("<IIQ", 9, 4, 2**61)),
        DamagedCheckpoint,
        "announces",
    ),
    "an array of more than can be read": (
        _gguf(_tensor(), counts=(1, 1), entries=_string("k") + struct.pack("<IIQ", 9, 8, 2**20) + bytes(8 * 2**20)),
        DamagedCheckpoint,
        "announces more than 1,048,576 entries",
    ),
    "an array of many numbers": (
        _gguf(_tensor(), counts=(1, 1), entries=_string("k") + struct.pack("<IIQ", 9, 0, 2**24) + bytes(2**24)),
        None,
        "",
    ),
    "nested without end": (
        _gguf(_tensor(), counts=(1, 1), entries=_string("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9),
        DamagedCheckpoint,
        "nests",
    ),
    "an unknown kind of value": (
        _gguf(_tensor(), counts=(1, 1), entries=_string("k") + struct.pack("<I", 99)),
        DamagedCheckpoint,
        "unknown kind",
    ),
    "alignment of nothing": (
        _gguf(_tensor(), counts=(1, 1), entries=_string("general.alignment") + struct.pack("<II", 4, 0)),
        DamagedCheckpoint,
        "alignment",
    ),
    "larger than the file": (_gguf(_tensor(shape=(2**20, 2**20))), DamagedCheckpoint, "would end at byte"),
    "larger than any file": (_gguf(_tensor(shape=(2**63, 2**63, 2**63))), DamagedCheckpoint, "would end at byte"),
    "beyond the end": (_gguf(_tensor(offset=1024)), DamagedCheckpoint, "would end at byte"),
    "offset of 2^63": (_gguf(_tensor(offset=2**63)), DamagedCheckpoint, "would end at byte"),
    "askew": (_gguf(_tensor(offset=3)), DamagedCheckpoint, "not aligned"),
    "overlapping": (_gguf(_tensor("a"), _tensor("b", offset=128)), DamagedCheckpoint, "overlaps"),
    "twice": (_gguf(_tensor("a"), _tensor("a", offset=256), data=512), DamagedCheckpoint, "same name"),
    "trailing bytes": (_gguf(_tensor(), data=256 + 4096), DamagedCheckpoint, "for 4,096 bytes after"),
    "part of a block": (_gguf(_tensor(shape=(33, 2), kind=8)), DamagedCheckpoint, "whole blocks"),
    "no elements": (_gguf(_tensor(shape=(0, 2))), DamagedCheckpoint, "whole blocks"),
    "five dimensions": (_gguf(_tensor(shape=(1, 1, 1, 1, 64))), DamagedCheckpoint, "5 dimensions"),
    "no dimensions": (_gguf(_tensor(shape=())), DamagedCheckpoint, "0 dimensions"),
    "an unknown format": (_gguf(_tensor(kind=77)), UnsupportedModel, "format number 77"),
    "a name that is no text": (_gguf(struct.pack("<Q", 1) + b"\xff" + bytes(60)), DamagedCheckpoint, "UTF-8"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), UnsupportedModel, "version 1"),
    "nothing after the magic": (b"GGUF", DamagedCheckpoint, "ends within its header"),
    "cut in the header": (_gguf(_tensor())[:40], DamagedCheckpoint, "ends within|announces"),
}


@pytest.mark.parametrize("case", LYING)
def test_a_lying_header_is_found_out(tmp_path, case):
    content, kind, words = LYING[case]
    (tmp_path / "x.gguf").write_bytes(content)
    if kind is None:
        assert read_gguf(tmp_path / "x.gguf").tensors[0].nbytes == 256
        return
    with pytest.raises(kind, match=words):
        read_gguf(tmp_path / "x.gguf")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_damage_is_one_of_our_errors_or_a_header(file, data):
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 400))
        content[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    target = file.with_name("damaged.gguf")
    target.write_bytes(content)
    try:
        header = read_gguf(target)
    except AutofluxError as error:
        assert error.message  # noqa: PT017 — either outcome is right
    else:
        assert all(t.offset + t.nbytes <= len(content) for t in header.tensors)
