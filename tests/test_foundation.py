"""Errors, units, values and files."""

from __future__ import annotations

import errno
import inspect
import os
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoflux import errors
from autoflux.errors import AutofluxError, DamagedFile, OutputUnwritable, UnknownName, UsageError, describe
from autoflux.files import check_target, check_writable, write_atomic, write_new
from autoflux.paths import expanded
from autoflux.planning.terms import Offload
from autoflux.planning.values import Wishes
from autoflux.units import (
    counted,
    format_bytes,
    format_number,
    format_seconds,
    parse_bytes,
    parse_rate,
    size_option,
    told_apart,
)


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
    assert describe(OSError(errno.ENAMETOOLONG, "File name too long", "a" * 300)).code == "system"
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
        (".5GB", 500_000_000),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, expected: int):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "8 apples", "1e9", "nan", "8GBB", "٨GB ", ".GB"])
def test_what_is_no_size_is_refused(text: str):
    with pytest.raises(UsageError, match="size"):
        parse_bytes(text)


def test_rates_are_read_with_their_unit():
    assert [parse_rate(text) for text in ("6.8GB/s", "500 MB/s", " 1GiB/s ", "2g/S")] == [6.8, 0.5, 1.073741824, 2.0]
    for text in ("", "6.8", "6.8GB", "6.8/s", "GB/s", "0GB/s", "-1GB/s", "5GB/min", "5GB/s/s"):
        with pytest.raises(UsageError, match="rate"):
            parse_rate(text)


def test_rates_that_may_be_in_bits_or_that_no_machine_has_are_refused():
    for text, bits, as_bytes in (("6.8Gb/s", "0.85GB/s", "6.8GB/s"), ("800 mb/s", "100MB/s", "800MB/s")):
        with pytest.raises(UsageError, match="may be in bits or in bytes") as caught:
            parse_rate(text)
        assert caught.value.hint == f"write {bits} if it is in bits, {as_bytes} if in bytes"
    with pytest.raises(UsageError, match="may be in bits or in bytes") as caught:
        parse_rate("1000000000b/s")
    assert caught.value.hint == "write 125000000B/s if it is in bits, 1000000000B/s if in bytes"
    for text in ("1B/s", "999kB/s"):
        with pytest.raises(UsageError, match="below 1 MB/s"):
            parse_rate(text)


@given(st.integers(1, 10**15))
def test_a_printed_size_reads_back_within_its_three_figures(count: int):
    assert parse_bytes(format_bytes(count).replace(" ", "")) == pytest.approx(count, rel=0.006, abs=1)


def test_times_are_printed_in_units_that_suit_them():
    assert [format_seconds(s) for s in (0.118, 0.9996, 4.21, 59.97, 74.2, 3599.6, 18_840)] == [
        "118 ms",
        "1.00 s",
        "4.21 s",
        "1 min 0 s",
        "1 min 14 s",
        "1 h 0 min",
        "5 h 14 min",
    ]


@pytest.mark.parametrize(
    ("need", "have", "words"),
    [
        (12_604_000_000, 12_600_000_000, ("12.604 GB", "12.600 GB")),
        (1_104_000_000, 1_099_000_000, ("1.104 GB", "1.099 GB")),
        (10**12 + 1, 10**12, ("1.000000000001 TB", "1.000000000000 TB")),
        (3 * 10**9, 10**9, ("3.00 GB", "1.00 GB")),
        (5, 5, ("5 B", "5 B")),
    ],
)
def test_need_and_have_are_told_apart(need: int, have: int, words: tuple[str, str]):
    assert told_apart(need, have) == words


@given(st.integers(1, 10**15))
def test_a_size_for_an_option_is_not_smaller_and_hardly_larger(count: int):
    assert count * (1 - 1e-9) <= parse_bytes(size_option(count)) <= count * 1.011 + 1


def test_numbers_are_told_without_powers_of_ten():
    assert [format_number(number) for number in (0.0313, 1.5, 12.345, 1462.4)] == ["0.0313", "1.5", "12.3", "1462"]
    assert [format_number(number) for number in (1e-5, 1.234e-9, 0, 2e6)] == [
        "0.00001",
        "0.00000000123",
        "0",
        "2000000",
    ]


def test_one_thing_is_not_several():
    assert [counted(count, "file") for count in (0, 1, 2, 1234)] == ["0 files", "1 file", "2 files", "1,234 files"]


def test_the_home_of_nobody_leaves_a_path_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/x") == tmp_path / "x"
    assert expanded("~nosuchuser/x") == Path("~nosuchuser/x")


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


def test_every_name_that_the_file_system_takes_can_be_written(tmp_path):
    write_atomic(tmp_path / ("a" * 255), b"x")
    with pytest.raises(OutputUnwritable, match="too long") as caught:
        check_target(tmp_path / ("a" * 256))
    assert "shorter" in caught.value.hint


@pytest.mark.skipif(sys.platform == "win32", reason="needs devices that are files")
def test_whether_a_file_can_be_written_is_found_out_without_a_trace(tmp_path):
    check_target(tmp_path / "new")
    (tmp_path / "folder").mkdir()
    for target, words in {"folder": "a folder is there", "/dev/null": "no regular file", "no/where": "no'"}.items():
        with pytest.raises(OutputUnwritable, match=words):
            check_target(tmp_path / target)
    assert [f.name for f in tmp_path.iterdir()] == ["folder"]


def test_a_new_file_takes_a_name_that_nobody_has(tmp_path):
    target = tmp_path / "a.png"
    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(lambda number: write_new(target, str(number).encode()), range(8)))
    assert {f.name for f in names} == {"a.png", *(f"a-{number}.png" for number in range(2, 9))}
    assert [name.read_bytes() for name in names] == [str(number).encode() for number in range(8)]
    (tmp_path / "a-9.png").symlink_to("nowhere")
    assert write_new(target, b"x").name == "a-10.png"


def test_a_new_file_has_a_name_of_its_own_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    names = [write_new(tmp_path / "a.png", data).name for data in (b"1", b"2")]
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == dict(zip(names, (b"1", b"2"), strict=True))


def test_a_new_file_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_new(tmp_path / "a.png", "no bytes")
    assert list(tmp_path.iterdir()) == []


def test_whether_a_folder_can_be_written_is_found_out_without_a_trace(tmp_path):
    check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OutputUnwritable):
        check_writable(tmp_path / "missing")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
