"""Errors, units, values and files."""

from __future__ import annotations

import errno
import inspect
import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoflux import errors
from autoflux.errors import AutofluxError, DamagedFile, OutputUnwritable, UnknownName, UsageError, describe
from autoflux.files import check_writable, write_atomic
from autoflux.planning.terms import Offload
from autoflux.planning.values import Wishes
from autoflux.units import format_bytes, format_seconds, parse_bytes, parse_rate


def test_the_tree_at_the_top_of_errors_names_every_error_with_its_exit_code():
    tree = inspect.getdoc(errors) or ""
    kinds = [c for c in vars(errors).values() if inspect.isclass(c) and issubclass(c, AutofluxError)]
    assert len(kinds) > 10
    for kind in kinds:
        assert kind.__name__ in tree
    assert {k.code for k in kinds if k.exit_code == 3} == {"does_not_fit"}
    assert len({k.code for k in kinds}) == len(kinds)


def test_an_unknown_name_lists_what_is_known_and_guesses():
    error = UnknownName("frontend", "gradoi", ["gradio", "api"])
    assert error.message == "no frontend named 'gradoi'; known: api, gradio"
    assert error.hint == "did you mean 'gradio'?"
    assert UnknownName("frontend", "zzz", ["gradio"], hint="look").hint == "look"


def test_an_unexpected_exception_is_described_without_a_traceback():
    report = describe(ZeroDivisionError("division by zero"))
    assert report.code == "internal"
    assert "division by zero" in report.message
    assert "AUTOFLUX_DEBUG" in (report.hint or "")


def test_a_file_that_the_system_refuses_is_no_mistake_of_the_program():
    report = describe(PermissionError(errno.EACCES, "Permission denied", "/locked/token"))
    assert (report.code, report.message) == ("system", "cannot use '/locked/token': Permission denied")
    assert describe(PermissionError("no file is named")).code == "internal"
    assert describe(FileNotFoundError(errno.ENOENT, "No such file", "/x")).code == "internal"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GB", 8 * 10**9),
        ("8 GiB", 2**33),
        ("7.5gib", int(7.5 * 2**30)),
        ("512", 512),
        ("300m", 300 * 10**6),
        ("1k", 1000),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, expected: int):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "8 apples", "1e9", "nan", "8GBB", "٨GB "])
def test_what_is_no_size_is_refused(text: str):
    with pytest.raises(UsageError, match="size"):
        parse_bytes(text)


def test_rates_are_read_with_their_unit():
    assert [parse_rate(text) for text in ("6.8GB/s", "500 MB/s", " 1GiB/s ", "2g/S")] == [6.8, 0.5, 1.073741824, 2.0]
    for text in ("", "6.8", "6.8GB", "6.8/s", "GB/s", "0GB/s", "-1GB/s", "5GB/min", "5GB/s/s"):
        with pytest.raises(UsageError, match="rate"):
            parse_rate(text)


@given(st.integers(1, 10**15))
def test_a_printed_size_reads_back_within_its_three_figures(count: int):
    assert parse_bytes(format_bytes(count).replace(" ", "")) == pytest.approx(count, rel=0.006, abs=1)


def test_times_are_printed_in_units_that_suit_them():
    assert [format_seconds(s) for s in (0.118, 0.9996, 4.21, 59.97, 74.2)] == [
        "118 ms",
        "1.00 s",
        "4.21 s",
        "1 min 0 s",
        "1 min 14 s",
    ]


def test_a_value_survives_json_and_refuses_what_it_does_not_know():
    wishes = Wishes(device="cuda:1", offload=Offload.COMPONENT, vram_bytes=8 * 10**9)
    assert Wishes.from_json(wishes.to_json()) == wishes
    assert wishes.replace(device=None).vram_bytes == 8 * 10**9
    for text in ('{"devise": "cpu"}', '{"vram_bytes": "8GB"}', "[]", "{", "\xff"):
        with pytest.raises(DamagedFile, match="wishes"):
            Wishes.from_json(text.encode("latin-1"), origin="wishes.json")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "picture.png"
    write_atomic(target, b"first")
    write_atomic(target, b"second")
    assert target.read_bytes() == b"second"
    assert stat.S_IMODE(target.stat().st_mode) & 0o077 == 0o077 & ~_umask() & 0o066
    with pytest.raises(OutputUnwritable, match="missing"):
        write_atomic(tmp_path / "missing" / "a.png", b"x")
    assert [f.name for f in tmp_path.iterdir()] == ["picture.png"]


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputUnwritable):
        write_atomic(tmp_path / "folder", b"x")
    assert [f.name for f in tmp_path.iterdir()] == ["folder"]


def test_whether_a_folder_can_be_written_is_found_out_without_a_trace(tmp_path):
    check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OutputUnwritable):
        check_writable(tmp_path / "missing")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
