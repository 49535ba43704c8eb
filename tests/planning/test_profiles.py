"""Profiles: which one is taken, what it inherits, and what is wrong with a faulty one."""

from __future__ import annotations

from importlib import resources

import msgspec
import pytest

from autoflux.errors import DamagedFile
from autoflux.hardware.known import known_machine, known_names
from autoflux.models.values import Precision
from autoflux.planning.profile_files import parse_profile, parse_profiles
from autoflux.planning.profiles import for_host, select_profile
from autoflux.planning.values import HostProfile, Priors, Profile
from autoflux.plugin_manager import load_plugins

GB = 10**9
CPU = (resources.files("autoflux.profiles") / "cpu.toml").read_text()
SHIPPED = list(load_plugins(entry_points=False).profiles)
CARDS = [profile for profile in SHIPPED if isinstance(profile, Profile)]


def chosen(name: str) -> Profile:
    (card,) = known_machine(name).accelerators
    return select_profile(CARDS, card.kind, card.capability, card.name)


@pytest.mark.parametrize(
    ("machine", "profile"),
    [
        ("v100-16gb", "cuda-volta"),
        ("rtx-2060-6gb", "cuda-turing"),
        ("t4-16gb", "cuda-turing"),
        ("gtx-1650-laptop-4gb", "cuda-turing-gtx"),
        ("a100-80gb", "cuda-ampere-datacentre"),
        ("rtx-3060-12gb", "cuda-ampere"),
        ("a10g-24gb", "cuda-ampere"),
        ("rtx-4060-laptop-8gb", "cuda-ada-geforce"),
        ("l4-24gb", "cuda-ada"),
        ("h200-141gb", "cuda-hopper"),
        ("b200-180gb", "cuda-blackwell-datacentre"),
        ("rtx-5090-32gb", "cuda-blackwell-geforce"),
        ("arc-b580-12gb", "xpu"),
        ("m3-max-64gb", "mps"),
    ],
)
def test_a_known_card_gets_the_profile_of_its_generation(machine, profile):
    assert chosen(machine).name == profile


def test_eight_bit_formats_are_in_the_order_of_their_rates():
    """The order in a profile is the one that the cards' own figures give; a tie leaves it open."""
    for name in known_names():
        for card in known_machine(name).accelerators:
            rates = [card.matmul_tflops[precision].value for precision in chosen(name).eight_bit]
            assert rates == sorted(rates, reverse=True), name


def test_a_card_too_old_for_tensor_cores_computes_in_float32():
    assert select_profile(CARDS, CARDS[0].match.kind.CUDA, "6.1").precision == (Precision.FLOAT32,)


OWN = """
name = "mine"
description = "my card"
base = "cpu"
[match]
kind = "cpu"
[priors]
host_bytes = 5
[sources]
host_bytes = "counted"
"""


def test_what_is_left_out_comes_from_the_base():
    base = parse_profile(CPU, "cpu")
    own = parse_profile(OWN, "mine", [base])
    assert own.priors == base.priors.replace(host_bytes=5)
    assert own.sources == base.sources | {"host_bytes": "counted"}
    assert (own.name, own.precision, own.match) == ("mine", base.precision, base.match)


def test_bases_may_stand_in_any_order_and_be_redefined():
    texts = {"a": OWN.replace('"mine"', '"grandchild"').replace('base = "cpu"', 'base = "mine"'), "b": OWN, "c": CPU}
    grandchild, own, cpu = parse_profiles(texts)
    assert grandchild.priors == own.priors != cpu.priors
    redefined = CPU.replace("disk_gb_per_s = 0.5", "disk_gb_per_s = 7.0")
    own, _ = parse_profiles({"b": OWN, "c": redefined}, [cpu])
    assert own.priors.disk_gb_per_s == 7.0
    extended = parse_profile(OWN.replace('"mine"', '"cpu"', 1), "x", [cpu])
    assert extended.priors.host_bytes == 5


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"b": OWN}, "base 'cpu', which is not there"),
        ({"b": OWN.replace('base = "cpu"', 'base = "mine"')}, "b is its own base"),
        (
            {
                "b": OWN.replace('"cpu"', '"other"', 1),
                "c": OWN.replace('"mine"', '"other"').replace('"cpu"', '"mine"', 1),
            },
            "each other as base",
        ),
        ({"b": OWN.replace('base = "cpu"', 'base = "other"'), "c": OWN.replace('"mine"', '"other"')}, "base 'cpu'"),
        ({"b": OWN.replace('base = "cpu"', "base = 3")}, "base must be the name"),
    ],
)
def test_a_base_that_is_not_there_is_refused(texts, words):
    with pytest.raises(DamagedFile, match=words):
        parse_profiles(texts)


@pytest.mark.parametrize(
    ("old", "new", "words", "hint"),
    [
        ("[match]", "[match", "not valid TOML", None),
        ('kind = "cpu"', 'kind = "cdua"', "allowed: cuda, mps, xpu, cpu", "did you mean 'cuda'?"),
        ('"float32", ', '"float23", ', "allowed: float32, bfloat16", "did you mean 'float32'?"),
        ('"float32", ', '"bfloat16", ', "twice in precision", None),
        ('["float32", "bfloat16"]', "[]", r"precision", None),
        (
            '["float32", "bfloat16"]',
            '["float32"]\neight_bit = ["bfloat16"]',
            r"allowed: float8_e4m3fn, .*int8",
            None,
        ),
        ('["float32", "bfloat16"]', '["int8"]', "'int8' in precision; allowed: float32, bfloat16, float16$", None),
        (
            'kind = "cpu"',
            'kind = "cpu"\nmin_capability = "10.0"\nmax_capability = "9.0"',
            "matches no device: min_capability 10.0 is above max_capability 9.0",
            None,
        ),
        (
            'disk_gb_per_s = "assumed: a SATA solid-state disk"',
            'disk_gb_per_s = " "',
            "empty source for disk_gb_per_s",
            "[sources]",
        ),
        ("step_efficiency = 0.37", 'step_efficiency = "fast"', r"priors.step_efficiency", None),
        (
            "step_efficiency = 0.37",
            "step_efficiency = 3.7",
            r"priors.step_efficiency is 3.7; allowed: 0.001 to 1$",
            None,
        ),
        (
            "disk_gb_per_s = 0.5",
            "disk_gb_per_s = 0.0",
            "priors.disk_gb_per_s is 0.0; allowed: 0.0001 to 1000000$",
            None,
        ),
        ("disk_gb_per_s = 0.5", "disk_gb_per_s = inf", "priors.disk_gb_per_s is inf; allowed: ", None),
        ("disk_gb_per_s = 0.5", "disk_gb_per_s = nan", "priors.disk_gb_per_s is nan; allowed: ", None),
        ("disk_gb_per_s = 0.5", f"disk_gb_per_s = {'9' * 5000}", "not valid TOML: .*limit", None),
        ('name = "cpu"', 'name = " "', "its name is empty", 'name = "my-card"'),
        ('name = "cpu"\n', "", "it has no `name`", 'name = "my-card"'),
        ('name = "cpu"', 'name = ["cpu"]', r"its name is \['cpu'\]; allowed: text", None),
        ("step_efficiency = 0.37", "step_eficiency = 0.37", r"'step_eficiency' in \[priors\]", "'step_efficiency'"),
        ("step_efficiency = 0.37\n", "", "required field `step_efficiency`", None),
        ("[match]", "colour = 1\n[match]", "'colour' in the top level", None),
        ("[match]\nkind", "match = 3\nkind", r"unknown key 'kind'|\[match\] must be a table", None),
        ('kind = "cpu"', 'kind = "cpu"\nmin_capability = "new"', "match.min_capability", None),
        ('disk_gb_per_s = "assumed', 'disk_gb_per_sec = "assumed', r"in \[sources\]", "'disk_gb_per_s'"),
        ('disk_gb_per_s = "assumed: a SATA solid-state disk"\n', "", "no source for disk_gb_per_s", "[sources]"),
        (
            'disk_gb_per_s = "assumed: a SATA solid-state disk"',
            "disk_gb_per_s = 1.0",
            "sources.disk_gb_per_s is 1.0; allowed: text",
            "[sources]",
        ),
    ],
)
def test_a_faulty_profile_is_refused_by_file_and_key(old, new, words, hint):
    assert old in CPU
    with pytest.raises(DamagedFile, match=words) as caught:
        parse_profile(CPU.replace(old, new), "'mine.toml'")
    assert "'mine.toml'" in caught.value.message
    assert (hint or "") in (caught.value.hint or "")


@pytest.mark.parametrize("text", ["", "\n", "# nothing yet\n"])
def test_an_empty_profile_is_said_to_be_empty(text):
    with pytest.raises(DamagedFile, match=r"^the profile 'mine.toml' is empty$"):
        parse_profile(text, "'mine.toml'")


@pytest.mark.parametrize("key", [field.name for field in msgspec.structs.fields(Priors)])
def test_no_figure_is_beyond_what_a_machine_can_have(key):
    """Such figures overflowed while a plan was made of them, or were told in hundreds of digits."""
    base = parse_profile(CPU, "cpu")
    for figure in ("1e308", "-1e-320", "-1.0", "nan", "9" * 400):
        text = OWN.replace("host_bytes", key).replace(" = 5", f" = {figure}")
        with pytest.raises(
            DamagedFile, match=rf"^the profile 'x' is not valid: priors\.{key} is .*; allowed: "
        ) as caught:
            parse_profile(text, "'x'", [base])
        assert len(caught.value.message) < 150


@pytest.mark.parametrize(
    ("key", "figure", "words"),
    [
        ("denoise_activations", "1e308", "is 1e+308; allowed: 0.01 to 100000"),
        ("vae_efficiency", "1e-320", "is 1e-320; allowed: 0.001 to 1"),
        ("block_seconds", "1e300", "is 1e+300; allowed: 0 to 86400"),
        ("context_bytes", "2_000_000_000_000_000", "is 2000 TB; allowed: 0 to 100 TB"),
        ("context_bytes", "9" * 400, "is 1.00e+400; allowed: 0 to 100 TB"),
    ],
)
def test_what_was_found_and_what_is_allowed_are_told(key, figure, words):
    text = OWN.replace("host_bytes", key).replace(" = 5", f" = {figure}")
    with pytest.raises(DamagedFile) as caught:
        parse_profile(text, "'x'", [parse_profile(CPU, "cpu")])
    assert caught.value.message == f"the profile 'x' is not valid: priors.{key} {words}"


SMALL = """
name = "small"
description = "a host with 8 GB"
max_ram_bytes = 9_000_000_000
[priors]
ram_reserve_bytes = 7
[sources]
ram_reserve_bytes = "felt"
"""


def test_a_host_profile_is_laid_over_every_device_where_ram_is_low():
    small = parse_profile(SMALL, "small")
    assert isinstance(small, HostProfile)
    tight, roomy = for_host([*SHIPPED, small], 8 * GB), for_host([*SHIPPED, small], 64 * GB)
    assert {profile.priors.ram_reserve_bytes for profile in tight} == {7}
    assert {profile.priors.ram_reserve_bytes for profile in roomy} == {0}
    assert all(profile.sources["ram_reserve_bytes"] == "felt" for profile in tight)
    wished = for_host([*SHIPPED, small], 64 * GB, "small")
    assert {profile.priors.ram_reserve_bytes for profile in wished} == {7}


def test_the_shipped_one_is_for_hosts_of_16_gb():
    assert {p.priors.ram_reserve_bytes for p in for_host(SHIPPED, 16 * 2**30)} == {GB}
    assert {p.priors.ram_reserve_bytes for p in for_host(SHIPPED, 32 * 2**30)} == {0}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("ram_reserve_bytes = 7", "ram_reserve = 7", "did you mean|unknown key 'ram_reserve'"),
        ("ram_reserve_bytes = 7", "ram_reserve_bytes = -1", "priors.ram_reserve_bytes"),
        ("ram_reserve_bytes = 7", "ram_reserve_bytes = 1.5", "priors.ram_reserve_bytes"),
        (
            "ram_reserve_bytes = 7",
            "ram_reserve_bytes = 1e300",
            r"priors.ram_reserve_bytes is 1e\+300; allowed: 0 to 100 TB",
        ),
        ('ram_reserve_bytes = "felt"', "", "no source"),
        ("[priors]", '[match]\nkind = "cpu"\n[priors]', "unknown key 'match'"),
    ],
)
def test_a_faulty_host_profile_is_refused(old, new, words):
    with pytest.raises(DamagedFile, match=words):
        parse_profile(SMALL.replace(old, new), "'small.toml'")


def test_of_one_name_the_users_own_counts():
    cpu = parse_profile(CPU, "cpu")
    own = cpu.replace(description="my own")
    assert for_host([cpu, own], 64 * GB) == [own]


def test_every_prior_of_every_shipped_profile_has_a_source():
    for profile in SHIPPED:
        given = {field.name for field in msgspec.structs.fields(Priors) if field.required}
        assert isinstance(profile, HostProfile) or given <= {k for k, v in profile.sources.items() if v}
