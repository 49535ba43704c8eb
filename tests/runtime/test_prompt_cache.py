"""Encoded prompts kept in RAM and on disk: when they are found again, what is let go first, and everything that can be
wrong with the folder."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from autoflux.api import find_model, open_session, plan_for
from autoflux.errors import UsageError
from autoflux.models.values import Precision
from autoflux.planning.terms import Placement
from autoflux.planning.values import Wishes
from autoflux.plugin_manager import load_plugins
from autoflux.runtime.prompt_cache import (
    DISK_BYTES,
    PromptCache,
    PromptFolder,
    disk_limit,
    encoder_identity,
)
from autoflux.runtime.session import Session
from autoflux.testing import FakeConditioning, FakePipeline, fake_model, fake_plan
from tests.conftest import card

LONG = "a red circle on a blue background " * 30
KEYS = [f"{number:064x}" for number in range(10)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where sessions of this test keep prompts."""
    monkeypatch.setenv("AUTOFLUX_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("AUTOFLUX_PROMPT_CACHE", raising=False)
    return tmp_path / "prompts"


@pytest.fixture
def opened(machine, folder):
    """Open a session of the real pipeline, on a machine that needs no measuring."""

    def opened(model: Path, hardware=None, **wishes: object) -> Session:
        plugins = load_plugins(entry_points=False)
        found = find_model(str(model), plugins)
        plan = plan_for(found, Wishes(**{"device": "cpu", **wishes}), plugins, hardware or machine())
        return open_session(plan, found, plugins)

    return opened


@dataclass
class Counting(FakePipeline):
    """Writes down what it encodes, and packs it into tensors."""

    encoded: list[str] = field(default_factory=list)
    packed_by: str = "prompt"

    def encode(self, prompts):
        self.encoded += prompts
        return super().encode(prompts)

    def pack(self, conditioning):
        return {self.packed_by: torch.frombuffer(bytearray(conditioning.prompt.encode()), dtype=torch.uint8) ^ 255}

    def unpack(self, tensors, prompt):
        assert bytes((tensors[self.packed_by] ^ 255).tolist()) == prompt.encode()
        return FakeConditioning(prompt)


def encoded_by(*prompts: str, **plan: object) -> list[str]:
    """What a new session has to encode to draw those prompts."""
    pipeline = Counting()
    with Session(pipeline, fake_plan().replace(**plan), fake_model()) as session:
        for prompt in prompts:
            session.generate(prompt, seed=1, steps=1)
    return pipeline.encoded


def tensors(number: int = 0, count: int = 10_000) -> dict[str, torch.Tensor]:
    return {"a": torch.full((1, count // 2), number, dtype=torch.bfloat16), "b": torch.tensor(float(number))}


def equal(found: dict[str, torch.Tensor] | None, expected: dict[str, torch.Tensor]) -> bool:
    return found is not None and found.keys() == expected.keys() and all(_same(found[n], expected[n]) for n in expected)


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left.cpu(), right.cpu())


FILE_BYTES = 10_000 + 500
"""A file of `tensors()`, generously."""


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


# When a prompt is found again


def test_after_a_restart_a_known_prompt_is_not_encoded(folder):
    assert encoded_by("a", "b", "a") == ["a", "b"]
    assert encoded_by("a", "c", "b") == ["c"]
    assert encoded_by("a", "b", "c") == []


def test_a_prompt_is_its_exact_text(folder):
    variants = ["a", "A", "a ", "a.", "ä", "a\u0308"]
    assert encoded_by(*variants) == variants
    assert encoded_by(*reversed(variants)) == []


def test_everything_that_changes_the_encoding_changes_the_key(tiny_copy):
    model, plan = fake_model().replace(path=str(tiny_copy)), fake_plan()
    encoder = plan.component("text_encoder")

    def with_encoder(**changes: object):
        return plan.replace(components=(encoder.replace(**changes), *plan.components[1:]))

    identities = [
        encoder_identity(model, plan),
        encoder_identity(model.replace(revision="other"), plan),
        encoder_identity(model.replace(defaults=model.defaults.replace(text_tokens=65)), plan),
        encoder_identity(model, with_encoder(arithmetic=Precision.BFLOAT16)),
        encoder_identity(model, with_encoder(storage=Precision.INT8)),
        encoder_identity(model, plan.replace(device="cuda")),
        encoder_identity(model, plan.replace(backend="other")),
    ]
    for part in ("text_encoder_2/model.safetensors", "tokenizer/tokenizer.json"):
        os.utime(tiny_copy / part, ns=(1, 1))
        identities.append(encoder_identity(model, plan))
    assert len(set(identities)) == len(identities)


def test_what_does_not_change_the_encoding_does_not_change_the_key(tiny_copy):
    model, plan = fake_model().replace(path=str(tiny_copy)), fake_plan().replace(device="cuda:0")
    before = encoder_identity(model, plan)
    os.utime(tiny_copy / "transformer/diffusion_pytorch_model.safetensors", ns=(1, 1))
    transformer = plan.component("transformer").replace(arithmetic=Precision.BFLOAT16)
    others = [transformer if c.name == "transformer" else c for c in plan.components]
    changed = plan.replace(device="cuda:1", max_batch=7, components=tuple(others))
    assert encoder_identity(model.replace(name="other"), changed) == before


def test_it_counts_what_computes_the_encoders_not_where_they_wait():
    model, plan = fake_model(), fake_plan()

    def identity(device: str, placement: Placement, *names: str) -> str:
        parts = [c.replace(placement=placement) if c.name in names else c for c in plan.components]
        return encoder_identity(model, plan.replace(device=device, components=tuple(parts)))

    encoders = [c.name for c in plan.components if c.name.startswith("text_encoder")]
    on_card, on_host = identity("cuda", Placement.DEVICE), identity("cpu", Placement.DEVICE)
    assert identity("cuda", Placement.STREAMED, *encoders) == on_card
    assert identity("cuda", Placement.HOST, "vae") == on_card
    assert identity("cuda", Placement.HOST, *encoders) == identity("cpu", Placement.HOST, *encoders) == on_host
    # One of several on the processor gives something else than all there, or all on the card.
    apart = [identity("cuda", Placement.HOST, name) for name in encoders if len(encoders) > 1]
    assert len({on_card, on_host, *apart}) == 2 + len(apart)


def test_weights_of_the_same_layout_are_told_apart(opened, tiny_copy):
    """Training an encoder further leaves the model's revision as it is."""
    from safetensors.torch import load_file, save_file

    draw = {"seed": 3, "steps": 1}
    with opened(tiny_copy) as session:
        before, revision = session.generate("a red circle", **draw)[0].png(), session.model.revision
    weights = tiny_copy / "text_encoder_2" / "model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    with opened(tiny_copy) as session:
        assert session.model.revision == revision
        assert session.generate("a red circle", **draw)[0].png() != before


def test_what_a_pipeline_cannot_unpack_is_encoded_anew(folder):
    assert encoded_by("a") == ["a"]
    newer = Counting(packed_by="text")
    for _ in range(2):
        with Session(newer, fake_plan(), fake_model()) as session:
            session.generate("a", seed=1)
    assert newer.encoded == ["a"]


def test_a_pipeline_that_packs_nothing_is_not_kept(folder):
    with Session(FakePipeline(), fake_plan(), fake_model()) as session:
        session.generate("a", seed=1)
    assert not folder.exists()


# The real pipeline


@pytest.mark.parametrize("prompt", ["a red circle", LONG, "zwölf Boxkämpfer 🥊 jagen"])
def test_pictures_are_the_same_with_and_without_the_cache(opened, folder, tiny_model, monkeypatch, prompt):
    def drawn(session: Session) -> tuple[bytes, tuple[str, ...]]:
        (picture,) = session.generate(prompt, seed=7)
        return picture.image.tobytes(), picture.warnings

    with monkeypatch.context() as patch:
        patch.setenv("AUTOFLUX_PROMPT_CACHE", "off")
        session = opened(tiny_model)
    with session:
        expected = drawn(session)
    assert not folder.exists()
    assert bool(expected[1]) == (prompt == LONG)
    with opened(tiny_model) as session:
        assert drawn(session) == expected
        session.pipeline.encode = None
        assert drawn(session) == expected
    with opened(tiny_model) as session:
        session.pipeline.encode = None
        assert drawn(session) == expected


def _check_round_trip(session: Session) -> None:
    for prompt in ("a red circle", LONG, ""):
        (made,) = session.pipeline.encode([prompt])
        session._prompts.keep(prompt, session.pipeline.pack(made))
        session._prompts.clear()
        again = session.pipeline.unpack(session._prompts.find(prompt), prompt)
        assert again.dropped_text == made.dropped_text
        for name in ("tokens", "pooled", "token_ids"):
            left, right = getattr(made, name), getattr(again, name)
            assert _same(left, right)
            assert left.device == right.device


@pytest.mark.parametrize("precision", [Precision.FLOAT32, Precision.BFLOAT16])
def test_packing_is_exact(opened, tiny_model, precision):
    with opened(tiny_model, precision=precision) as session:
        _check_round_trip(session)


@pytest.mark.gpu
def test_packing_is_exact_on_a_card(opened, machine, tiny_model):
    with opened(tiny_model, machine(card()), device="cuda") as session:
        _check_round_trip(session)


# What is let go


def test_in_memory_the_least_recently_used_go_first():
    cache = PromptCache("encoder", memory_bytes=35_000)
    for number in range(3):
        cache.keep(str(number), tensors(number))
    assert cache.find("0") is not None
    cache.keep("3", tensors(3))
    assert cache.find("1") is None
    assert all(equal(cache.find(str(number)), tensors(number)) for number in (0, 2, 3))
    cache.keep("3", tensors(4))  # takes no more room than before
    assert equal(cache.find("3"), tensors(4))
    assert cache.find("0") is not None
    cache.forget("3")
    cache.keep("5", tensors(5))
    assert cache.find("2") is not None
    cache.keep("6", tensors(count=36_000))  # larger than all that may be kept
    assert cache.find("6") is None
    cache.keep("7", tensors(7))
    assert equal(cache.find("7"), tensors(7))
    cache.clear()
    assert cache.find("7") is None


def test_memory_is_the_cache_s_own():
    cache = PromptCache("encoder")
    part = torch.arange(12.0).reshape(3, 4).t()[1:]
    cache.keep("a", {"part": part})
    expected = part.clone()
    part.zero_()
    assert torch.equal(cache.find("a")["part"], expected)


def test_on_disk_the_least_recently_used_go_first(tmp_path):
    limit = int(3.5 * FILE_BYTES)
    for number in range(3):
        PromptFolder(tmp_path, limit).write(KEYS[number], tensors(number))
    assert PromptFolder(tmp_path, limit).read(KEYS[0]) is not None
    PromptFolder(tmp_path, limit).write(KEYS[3], tensors(3))
    assert files(tmp_path) == [f"{KEYS[number]}.safetensors" for number in (0, 2, 3)]
    assert all(equal(PromptFolder(tmp_path, limit).read(KEYS[n]), tensors(n)) for n in (0, 2, 3))
    PromptFolder(tmp_path, limit).write(KEYS[4], tensors(count=4 * FILE_BYTES))  # larger than all that may be kept
    assert len(files(tmp_path)) == 3


def test_one_process_never_exceeds_the_limit(tmp_path):
    limit = 40 * FILE_BYTES
    kept = PromptFolder(tmp_path, limit)
    used = []
    for number in range(120):
        kept.write(f"{number:064x}", tensors(number, count=100 * (number % 100 + 1)))
        used.append(sum(file.stat().st_size for file in tmp_path.iterdir()))
    assert max(used) <= limit
    assert min(used[80:]) > 0.8 * limit
    assert kept.read(f"{119:064x}") is not None


def test_what_a_killed_process_left_half_written_goes_too_and_nothing_else(tmp_path):
    half = tmp_path / f".{KEYS[0]}.safetensors.abc123"
    foreign = tmp_path / "notes.txt"
    for file in (half, foreign):
        file.write_bytes(bytes(2 * FILE_BYTES))
        os.utime(file, ns=(1, 1))
    PromptFolder(tmp_path, 2 * FILE_BYTES).write(KEYS[1], tensors())
    assert files(tmp_path) == [f"{KEYS[1]}.safetensors", "notes.txt"]


# Files that are not what they should be


def _flip(at: float):
    def damage(data: bytes) -> bytes:
        position = int(at * (len(data) - 1))
        return data[:position] + bytes([data[position] ^ 8]) + data[position + 1 :]

    return damage


DAMAGE = {
    "empty": lambda _: b"",
    "cut in the length": lambda data: data[:5],
    "cut in the header": lambda data: data[:50],
    "cut in the numbers": lambda data: data[:-5000],
    "one byte short": lambda data: data[:-1],
    "longer": lambda data: data + b"x",
    "not safetensors": lambda _: b"PNG or so" * 100,
    "of another program": lambda _: save({"a": torch.zeros(3)}),
    "without its hash": lambda _: save(tensors()),
    "with a hash of another shape": lambda _: save({**tensors(), "autoflux.sha256": torch.zeros(2)}),
    "zeros": lambda data: bytes(len(data)),
    **{f"a bit flipped at {at}": _flip(at) for at in (0, 0.0005, 0.005, 0.01, 0.02, 0.1, 0.5, 0.9, 1)},
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_removed_and_made_anew(tmp_path, damage):
    kept = PromptFolder(tmp_path, 10**6)
    kept.write(KEYS[0], tensors(1))
    file = tmp_path / f"{KEYS[0]}.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    assert kept.read(KEYS[0]) is None
    assert files(tmp_path) == []
    kept.write(KEYS[0], tensors(1))
    assert equal(kept.read(KEYS[0]), tensors(1))


def test_the_file_of_another_prompt_is_not_taken_for_it(tmp_path):
    kept = PromptFolder(tmp_path, 10**6)
    kept.write(KEYS[0], tensors(1))
    (tmp_path / f"{KEYS[0]}.safetensors").rename(tmp_path / f"{KEYS[1]}.safetensors")
    assert kept.read(KEYS[1]) is None


def test_with_damaged_files_a_session_encodes_and_goes_on(folder):
    assert encoded_by("a") == ["a"]
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    assert encoded_by("a") == ["a"]
    assert encoded_by("a") == []


# Folders that cannot be used


@contextlib.contextmanager
def _without_root_s_rights():
    """Root may read and write everything; be nobody for a while."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def _goes_on_with_one_warning(kept: PromptFolder, caplog: pytest.LogCaptureFixture) -> None:
    cache = PromptCache("encoder", kept)
    with caplog.at_level(logging.WARNING):
        for number in range(3):
            assert cache.find(str(number)) is None
            cache.keep(str(number), tensors(number))
            assert equal(cache.find(str(number)), tensors(number))
    (line,) = caplog.messages
    assert "not kept on disk" in line


@pytest.mark.parametrize("mode", [0o500, 0o000])
def test_a_folder_that_may_not_be_written_or_read_costs_one_warning(caplog, mode):
    above = Path(tempfile.mkdtemp())
    try:
        above.chmod(0o755)
        (above / "prompts").mkdir()
        if not os.geteuid():
            os.chown(above / "prompts", 65534, -1)
        (above / "prompts").chmod(mode)
        with _without_root_s_rights():
            _goes_on_with_one_warning(PromptFolder(above / "prompts", 10**6), caplog)
    finally:
        (above / "prompts").chmod(0o700)
        shutil.rmtree(above)


def test_what_is_in_a_folder_that_may_only_be_read_is_found():
    above = Path(tempfile.mkdtemp())
    try:
        PromptFolder(above / "prompts", 10**6).write(KEYS[0], tensors(1))
        above.chmod(0o755)
        for path in (above / "prompts", *(above / "prompts").iterdir()):
            if not os.geteuid():
                os.chown(path, 65534, -1)
            path.chmod(0o500 if path.is_dir() else 0o400)
        with _without_root_s_rights():
            assert equal(PromptFolder(above / "prompts", 10**6).read(KEYS[0]), tensors(1))
    finally:
        (above / "prompts").chmod(0o700)
        shutil.rmtree(above)


def test_a_file_in_place_of_the_folder_costs_one_warning(tmp_path, caplog):
    (tmp_path / "prompts").write_text("something else")
    _goes_on_with_one_warning(PromptFolder(tmp_path / "prompts", 10**6), caplog)


def test_a_full_disk_costs_one_warning_and_leaves_nothing_behind(tmp_path, caplog):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # to write more fails, as on a full disk
    try:
        _goes_on_with_one_warning(PromptFolder(tmp_path / "prompts", 10**6), caplog)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert files(tmp_path / "prompts") == []


def test_a_folder_in_place_of_a_file_costs_one_warning(tmp_path, caplog):
    (tmp_path / f"{KEYS[0]}.safetensors").mkdir()
    kept = PromptFolder(tmp_path, 10**6)
    with caplog.at_level(logging.WARNING):
        assert kept.read(KEYS[0]) is None
        kept.write(KEYS[0], tensors())
        kept.write(KEYS[1], tensors())
    assert len(caplog.messages) == 1
    assert equal(kept.read(KEYS[1]), tensors())


# Several processes


WRITER = """
    import random, sys
    import torch
    from pathlib import Path
    from autoflux.runtime.prompt_cache import PromptFolder

    kept, chance = PromptFolder(Path(sys.argv[1]), int(sys.argv[2])), random.Random(int(sys.argv[3]))
    found = 0
    for _ in range(150):
        number = chance.randrange(30)
        tensors = kept.read(f"{number:064x}")
        if tensors is None:
            kept.write(f"{number:064x}", {"a": torch.full((10_000,), number, dtype=torch.uint8)})
        else:
            found += 1
            assert tensors["a"].tolist() == [number] * 10_000
    print(found)
"""


def test_several_processes_use_one_folder(tmp_path):
    limit = 20 * FILE_BYTES
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path / "prompts"), str(limit)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen([*command, str(seed)], **pipes) for seed in range(3)]
    for writer in writers:
        out, err = writer.communicate(timeout=120)
        assert (writer.returncode, err) == (0, "")
        assert int(out) > 10
    left = list((tmp_path / "prompts").iterdir())
    assert all(file.suffix == ".safetensors" for file in left)
    # Each process may go beyond the limit by what it writes between two looks at the folder.
    assert 10 * FILE_BYTES < sum(file.stat().st_size for file in left) <= limit + 3 * max(FILE_BYTES, limit // 16)
    kept = PromptFolder(tmp_path / "prompts", limit)
    assert all(kept.read(file.stem) is not None for file in left)


# What others may see


def test_the_folder_is_its_owner_s_alone_and_holds_no_prompt(opened, folder, tiny_model):
    before = os.umask(0)
    try:
        with opened(tiny_model) as session:
            session.generate(LONG, seed=1)
    finally:
        os.umask(before)
    (file,) = folder.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    content = file.name.encode() + file.read_bytes()
    assert not [word for word in ("circle", "blue", "background") if word.encode() in content]


def test_a_folder_that_others_may_read_is_closed(tmp_path):
    tmp_path.chmod(0o755)
    PromptFolder(tmp_path, 10**6).write(KEYS[0], tensors())
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


# Settings


@pytest.mark.parametrize(
    ("setting", "limit"),
    [(None, DISK_BYTES), ("", DISK_BYTES), ("off", 0), (" OFF ", 0), ("0", 0), ("500MB", 500_000_000), ("1GiB", 2**30)],
)
def test_the_environment_sets_the_size_of_the_folder(setting, limit):
    assert disk_limit(setting) == limit


@pytest.mark.parametrize("setting", ["of", "-1", "lots", "500 apples"])
def test_a_setting_that_cannot_be_read_is_an_error(setting):
    with pytest.raises(UsageError, match="neither 'off' nor a size"):
        disk_limit(setting)


def test_switched_off_nothing_is_read_or_written(folder, monkeypatch):
    assert encoded_by("a") == ["a"]
    monkeypatch.setenv("AUTOFLUX_PROMPT_CACHE", "off")
    assert encoded_by("a", "b", "a") == ["a", "b"]
    assert len(files(folder)) == 1


def test_a_session_that_encodes_nothing_new_needs_no_torch(tmp_path):
    code = """
        import sys
        from autoflux.runtime.session import Session
        from autoflux.testing import FakePipeline, fake_model, fake_plan
        with Session(FakePipeline(), fake_plan(), fake_model()) as session:
            session.generate("a", seed=1)
        sys.exit(bool({"torch", "safetensors"} & set(sys.modules)))
    """
    environment = {**os.environ, "AUTOFLUX_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, check=True)
