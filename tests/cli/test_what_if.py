"""`autoflux plan --on`, `--save` and `--plan`, `autoflux machines`, as a user types them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import autoflux
from autoflux.api import other_machine
from autoflux.cli.main import run
from autoflux.errors import PlanUnusable, UnknownName
from autoflux.hardware.known import known_machine, known_names
from autoflux.hardware.values import Problem
from autoflux.planning.values import Plan


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def plan(tiny_model: Path, here: Path, capsys: pytest.CaptureFixture[str]):
    """Run `autoflux plan` on the tiny model; gives its exit code, what it printed, and what it complained of."""

    def run_plan(*arguments: str) -> tuple[int, str, str]:
        code = run(["plan", "--model", str(tiny_model), *arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run_plan


def test_another_machine_is_named_on_the_first_line(plan):
    code, out, err = plan("--on", "rtx-3060-12gb", "--explain")
    assert code == 0
    first = out.splitlines()[0]
    assert "for rtx-3060-12gb, not for this machine, and cannot be run here" in first
    assert "cuda:0" in out
    assert "nothing of rtx-3060-12gb was measured" in err
    assert "from the profile" not in err


def test_memory_and_rates_of_the_other_machine_can_be_changed(plan):
    wishes = ("--vram", "4GB", "--ram", "8GB", "--link", "3GB/s", "--device", "cuda")
    code, out, _ = plan("--on", "rtx-3060-12gb", *wishes, "--json")
    made = json.loads(out)["data"]
    assert code == 0
    assert made["machine"] == "rtx-3060-12gb"
    assert made["vram_limit_bytes"] < 4e9
    assert made["ram_limit_bytes"] < 8e9


def test_a_rate_that_was_said_is_told_without_powers_of_ten(plan):
    assert "--link 2000000 GB/s is what you said" in plan("--on", "rtx-3060-12gb", "--link", "2000000GB/s")[2]


def test_problems_of_the_machine_are_told_in_json_too(plan, here):
    problem = Problem(subject="link", message="half as fast as it should be")
    other = known_machine("rtx-3060-12gb").replace(problems=(problem,))
    (here / "other.json").write_bytes(other.to_json().encode())
    code, out, _ = plan("--on", "other.json", "--device", "cuda", "--json")
    assert code == 0, out
    assert "link: half as fast as it should be" in json.loads(out)["data"]["warnings"]
    assert "link: half as fast as it should be" in plan("--on", "other.json", "--device", "cuda")[2]


def test_a_ceiling_in_the_environment_is_not_for_the_other_machine(plan, monkeypatch):
    monkeypatch.setenv("AUTOFLUX_VRAM", "2GB")
    made = json.loads(plan("--on", "rtx-3060-12gb", "--device", "cuda", "--json")[1])["data"]
    assert made["vram_limit_bytes"] > 10e9


def test_a_probe_of_another_machine_is_planned_for(plan, here):
    there = known_machine("rtx-4090-24gb").replace(fingerprint="theirs")
    for name, text in {
        "plain": there.to_json(),
        "envelope": json.dumps({"schema": 1, "ok": True, "data": there.to_data(), "error": None}),
    }.items():
        (here / f"{name}.json").write_text(text)
        code, out, _ = plan("--on", f"{name}.json", "--device", "cuda", "--json")
        made = json.loads(out)["data"]
        assert (code, made["machine"], made["fingerprint"], made["device"]) == (0, name, "theirs", "cuda:0")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_a_probe_saved_by_a_shell_that_writes_another_encoding_is_read(plan, here, encoding):
    there = known_machine("rtx-4090-24gb").replace(fingerprint="theirs")
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    (here / "box.json").write_text(mark + there.to_json(), encoding=encoding)
    code, out, _ = plan("--on", "box.json", "--device", "cuda", "--json")
    assert (code, json.loads(out)["data"]["fingerprint"]) == (0, "theirs")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot read 'box.json'"),
        ("[" * 100_000, "is not JSON"),
        ("no JSON", "give what `autoflux probe --json` wrote"),
        ("", "not JSON"),
        ("{}", "as Hardware"),
        ("{}", "give what `autoflux probe --json` wrote"),
        (known_machine("rtx-4090-24gb").to_json().replace('"8.9"', '"8.9a"'), "accelerators[0].capability is '8.9a'"),
        (
            json.dumps({"schema": 3, "backend": "x", "components": [], "predicted": {}}),
            "it is something else, with back",
        ),
        ('{"schema": 99}', "of version 99 and this autoflux reads version"),
        (known_machine("rtx-3060-12gb").to_json().replace('"value": 12', '"value": -12', 1), "cannot be right"),
    ],
)
def test_a_file_that_is_no_probe_is_refused(plan, here, content, words):
    if content is not None:
        (here / "box.json").write_text(content)
    code, out, err = plan("--on", "box.json")
    assert (code, out) == (1, "")
    assert words in err


@pytest.mark.parametrize(
    ("machine", "arguments"),
    [
        ("rtx-3060-12gb", ("--device", "cuda", "--vram", "1GB")),
        ("rtx-3060-12gb", ("--device", "cuda", "--vram", "100MB")),
        ("cpu-8-core-32gb", ("--ram", "4.2GB")),
        ("cpu-8-core-32gb", ("--ram", "2GB")),
    ],
)
def test_what_would_fit_fits(plan, machine, arguments):
    code, _, err = plan("--on", machine, *arguments)
    assert code == 3
    option, size = re.search(r"(--vram|--ram) (\S+) would fit", err).groups()
    wished = [*arguments[:-2], option, size]
    assert arguments[-2] == option
    assert plan("--on", machine, *wished)[0] == 0


def test_what_another_machine_lacks_is_not_to_be_freed(here, capsys):
    for machine, words in (("cpu-8-core-32gb", "more RAM"), ("rtx-3060-12gb", "without --offload it would fit")):
        assert run(["plan", "--model", "flux.1-dev", "--on", machine, "--offload", "none"]) == 3
        said = capsys.readouterr().err
        assert words in said
        assert "free" not in said


def test_no_room_for_a_saved_plan_on_another_machine_is_not_to_be_freed(plan, here):
    assert plan("--on", "rtx-3060-12gb", "--device", "cuda", "--save", "p.json")[0] == 0
    made = json.loads((here / "p.json").read_text())
    made["ring_bytes"], made["vram_limit_bytes"] = 14 * 10**9, 16 * 10**9
    (here / "p.json").write_text(json.dumps(made))
    code, _, err = plan("--on", "rtx-3060-12gb", "--plan", "p.json")
    assert (code, "of memory on cuda:0 and rtx-3060-12gb has 12.6 GB for it" in err, "free" in err) == (3, True, False)


def test_mistakes_are_explained(plan):
    for arguments, code, words in (
        (("--on", "rtx-3060-12bg"), 2, "did you mean 'rtx-3060-12gb'?"),
        (("--on", ""), 2, "--on was given nothing\n"),
        (("--on", ""), 2, "`autoflux machines` lists the names"),
        (("--on", "cpu-8-core-32gb", "--vram", "8GB"), 2, "none with a memory"),
        (("--on", "rtx-3060-12gb", "--link", "6.8"), 2, "such as 6.8GB/s"),
        (("--on", "rtx-3060-12gb", "--link", "0GB/s"), 2, "above zero"),
        (("--on", "rtx-3060-12gb", "--link", "1B/s"), 2, "below 1 MB/s"),
        (("--on", "rtx-3060-12gb", "--link", "6.8Gb/s"), 2, "write 0.85GB/s if it is in bits"),
        (("--on", "rtx-3060-12gb", "--link", "1000000000b/s"), 2, "write 125000000B/s if it is in bits"),
        (("--block-size", "1KB"), 2, "'1KB' is only 1.00 kB"),
        (("--profile", "nope"), 2, "known: cpu, cuda,"),
        (("--profile", "low-rom"), 2, "did you mean 'low-ram'?"),
        (("--profile", ""), 2, "no profile named ''"),
        (("--on", "rtx-3060-12gb", "--device", "cuda", "--vram", "1GB"), 3, "on rtx-3060-12gb: "),
        (("--on", "rtx-3060-12gb", "--vram", "8"), 2, "'8' is only 8 B; write a unit, such as 8GB"),
        (("--on", "rtx-3060-12gb", "--refresh"), 2, "--refresh measures this machine again"),
        (
            ("--on", "rtx-3060-12gb", "--device", "mps"),
            1,
            "on rtx-3060-12gb: there is no device 'mps'; there is cuda:0",
        ),
        (("--on", "rtx-3060-12gb", "--device", "mps"), 1, "`autoflux machines rtx-3060-12gb` says what it has"),
        (("--base", "flux.1-schnell"), 2, "has all its parts"),
        (("--profile", "nowhere.toml"), 1, "cannot read 'nowhere.toml'"),
        (("--profile", "cuda-touring"), 2, "did you mean 'cuda-turing'?"),
        (("--plan", "nowhere.json"), 1, "cannot read 'nowhere.json'"),
    ):
        got, out, err = plan(*arguments)
        assert (got, out) == (code, ""), arguments
        assert words in err
        assert "Traceback" not in err


def test_a_machine_without_a_name_is_not_the_folder_that_it_runs_in():
    with pytest.raises(UnknownName, match="no machine named ''"):
        other_machine("")


def test_names_of_devices_may_be_in_capitals(plan):
    for device in ("CPU", "Cuda:0", "CUDA"):
        code, out, err = plan("--on", "rtx-3060-12gb", "--device", device, "--json")
        assert (code, json.loads(out)["data"]["device"]) == (0, "cpu" if device == "CPU" else "cuda:0"), err


def test_there_is_one_processor(plan):
    assert plan("--device", "cpu:0")[0] == 0
    code, _, err = plan("--device", "cpu:7")
    assert (code, "there is no device 'cpu:7'" in err) == (1, True)


def test_a_profile_with_a_mark_of_byte_order_is_read(plan, here):
    text = 'name = "mine"\ndescription = "x"\nbase = "cuda"\n[match]\nkind = "cuda"\n'
    (here / "mine.toml").write_text(text, encoding="utf-8-sig")
    code, out, err = plan("--on", "rtx-3060-12gb", "--profile", "mine.toml", "--json")
    assert (code, json.loads(out)["data"]["profile"]) == (0, "mine"), err


def test_a_plan_that_was_changed_by_hand_to_what_cannot_be_is_refused(plan, here):
    plan("--device", "cpu", "--save", "p.json")
    good = json.loads((here / "p.json").read_text())
    (here / "p.json").write_text(json.dumps(good | {"ring_bytes": -1}))
    code, out, err = plan("--plan", "p.json")
    assert (code, out) == (1, "")
    assert "'p.json' holds a figure that cannot be right: ring_bytes is -1" in err


@pytest.mark.parametrize("drawn", [("--drawing",), ("--svg", "p.svg")])
def test_a_plan_whose_step_takes_no_time_is_refused_before_anything_is_shown(plan, here, drawn):
    plan("--device", "cpu", "--save", "p.json")
    good = json.loads((here / "p.json").read_text())
    (here / "p.json").write_text(json.dumps(good | {"predicted": good["predicted"] | {"seconds_per_step": 0}}))
    code, out, err = plan("--plan", "p.json", *drawn)
    assert (code, out) == (1, "")
    assert "'p.json' holds a figure that cannot be right: predicted.seconds_per_step is 0.0" in err
    assert not (here / "p.svg").exists()


def test_what_is_told_of_a_plan_is_reckoned_and_not_what_its_file_says(plan, here, tiny_model):
    told = plan("--device", "cpu", "--save", "p.json")[1].splitlines()
    good = json.loads((here / "p.json").read_text())
    predicted = good["predicted"] | {"peak_ram_bytes": 0, "pinned_bytes": 5}
    (here / "p.json").write_text(json.dumps(good | {"predicted": predicted, "model": "foo"}))
    code, out, _ = plan("--plan", "p.json")
    assert (code, out.splitlines()) == (0, told)
    (here / "p.json").write_text(json.dumps(good | {"ram_limit_bytes": 1}))
    code, _, err = plan("--plan", "p.json")
    assert (code, "and its ram_limit_bytes allows 1 B" in err) == (2, True)


def test_a_probe_is_no_plan_of_another_version(plan, here):
    (here / "box.json").write_text(known_machine("rtx-3060-12gb").to_json())
    code, _, err = plan("--plan", "box.json")
    assert (code, "it is something else, with accelerators, disk" in err) == (1, True)
    assert "give what `autoflux plan --save` wrote" in err


def test_a_profile_from_a_file(plan, here):
    text = 'name = "mine"\ndescription = "x"\nbase = "cuda-ampere"\n[match]\nkind = "cuda"\n'
    (here / "mine.toml").write_text(text + "[priors]\nreserve_bytes = 9_000_000_000\n[sources]\nreserve_bytes = 'I'\n")
    made = json.loads(plan("--on", "rtx-3060-12gb", "--profile", "mine.toml", "--json")[1])["data"]
    assert made["profile"] == "mine"
    assert made["vram_limit_bytes"] < 4e9
    (here / "mine.toml").write_text(text + "[prior]\n")
    code, _, err = plan("--on", "rtx-3060-12gb", "--profile", "mine.toml")
    assert (code, "'mine.toml'" in err, "did you mean 'priors'?" in err) == (1, True, True)
    for wrong, words in (
        ("", "'mine.toml' is empty"),
        (text.partition("\n")[2], "'mine.toml' is not valid: it has no `name`"),
    ):
        (here / "mine.toml").write_text(wrong)
        code, _, err = plan("--on", "rtx-3060-12gb", "--profile", "mine.toml")
        assert (code, words in err) == (1, True), err
    (here / "mine.toml").write_text('precision = ["int8"]\n' + text)
    code, _, err = plan("--on", "rtx-3060-12gb", "--profile", "mine.toml")
    assert (code, "has 'int8' in precision" in err) == (1, True)


def test_a_host_profile_can_be_wished_where_ram_is_not_low(plan):
    usual, tight = (
        json.loads(plan("--on", "rtx-3060-12gb", "--device", "cuda", "--json", *wish)[1])["data"]
        for wish in ((), ("--profile", "low-ram"))
    )
    assert usual["ram_limit_bytes"] - tight["ram_limit_bytes"] == 10**9
    assert usual["profile"] == tight["profile"] == "cuda-ampere"


def test_a_saved_plan_is_followed(plan, here, capsys):
    assert plan("--device", "cpu", "--precision", "bfloat16", "--size", "64", "--save", "p.json")[0] == 0
    assert Plan.from_json((here / "p.json").read_bytes()).device == "cpu"
    code, out, _ = plan("--plan", "p.json", "--json")
    assert (code, json.loads(out)["data"]["components"][0]["storage"]) == (0, "bfloat16")
    (here / "envelope.json").write_text(out)
    assert run(["generate", "a circle", "--plan", "envelope.json", "--seed", "1", "--out", "a.png", "--json"]) == 0
    drawn = json.loads(capsys.readouterr().out)["data"]["plan"]
    assert drawn["components"][0]["storage"] == "bfloat16"


def test_a_plan_leaves_no_room_for_wishes_but_ignores_the_environments(plan, here, monkeypatch):
    plan("--device", "cpu", "--save", "p.json")
    for wish in (("--vram", "8GB"), ("--steps", "3"), ("--size", "64"), ("--link", "3GB/s"), ("--refresh",)):
        code, _, err = plan("--plan", "p.json", *wish)
        assert (code, wish[0] in err) == (2, True)
    monkeypatch.setenv("AUTOFLUX_DEVICE", "cuda")
    assert plan("--plan", "p.json")[0] == 0


def test_a_plan_for_another_machine_is_shown_there_and_not_run_here(plan, here, tiny_model, capsys):
    assert plan("--on", "rtx-3060-12gb", "--save", "p.json")[0] == 0
    assert plan("--on", "rtx-3060-12gb", "--plan", "p.json")[0] == 0
    assert plan("--on", "rtx-4090-24gb", "--plan", "p.json")[0] == 2
    assert plan("--plan", "p.json")[0] == 2
    assert plan("--on", "rtx-3060-12gb", "--vram", "8GB", "--save", "less.json")[0] == 0
    for other in ((), ("--vram", "10GB")):
        code, _, err = plan("--on", "rtx-3060-12gb", "--plan", "less.json", *other)
        assert (code, "give --vram and --ram as when it was saved" in err) == (2, True)
    assert plan("--on", "rtx-3060-12gb", "--plan", "less.json", "--vram", "8GB")[0] == 0
    assert plan("--on", "rtx-3060-12gb", "--plan", "less.json", "--vram", "8GB", "--quant", "int8")[0] == 2
    assert run(["generate", "x", "--plan", "p.json", "--model", str(tiny_model)]) == 2
    assert "for another machine, 'rtx-3060-12gb', and cannot be run on this one" in capsys.readouterr().err
    assert not list(here.glob("*.png"))


def test_a_plan_of_a_model_that_is_not_here_names_the_command_that_brings_it(here, capsys):
    assert run(["plan", "--model", "flux.1-dev", "--on", "h200-141gb", "--save", "p.json"]) == 0
    assert run(["plan", "--plan", "p.json", "--on", "h200-141gb"]) == 0
    capsys.readouterr()
    assert run(["generate", "x", "--plan", "p.json"]) == 1
    assert "autoflux models pull flux.1-dev" in capsys.readouterr().err


def test_a_plan_of_a_model_that_changed_since_is_refused(here, tiny_model, capsys):
    copy = shutil.copytree(tiny_model, here / "copy")
    assert run(["plan", "--model", str(copy), "--save", "p.json"]) == 0
    config = copy / "vae" / "config.json"
    config.write_text(config.read_text().replace('"scaling_factor": 0.4', '"scaling_factor": 0.5'))
    capsys.readouterr()
    assert run(["generate", "x", "--plan", "p.json"]) == 2
    assert "one of its files changed" in capsys.readouterr().err


def test_a_plan_that_cannot_be_saved_is_told(plan, here):
    code, _, err = plan("--save", "no/where/p.json")
    assert (code, "create the folder" in err) == (1, True)


def test_machines_are_listed_with_their_figures(capsys):
    assert run(["machines"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in known_names())
    assert run(["machines", "rtx-4060-8gb-windows"]) == 0
    assert "assumed" in capsys.readouterr().out
    assert run(["machines", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["data"]) == set(known_names())
    assert run(["machines", "rtx-9999"]) == 2


def test_python_refuses_a_plan_of_another_machine_too(plan, here, tiny_model):
    assert plan("--on", "rtx-3060-12gb", "--save", "p.json")[0] == 0
    with pytest.raises(PlanUnusable, match="rtx-3060-12gb"):
        autoflux.load(str(tiny_model), plan=autoflux.saved_plan("p.json"))
