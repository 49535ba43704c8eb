"""Saved plans: read again, and refused where they do not hold."""

from __future__ import annotations

import json
import re

import pytest

from autoflux.errors import DamagedFile, DoesNotFit, PlanUnusable
from autoflux.hardware.changes import Changes, changed
from autoflux.planning.planner import make_plan
from autoflux.planning.saved import check_consistency, check_plan, read_plan
from autoflux.planning.terms import Offload
from autoflux.planning.values import PLAN_SCHEMA, ComponentPlan, PhaseBytes, Plan, Wishes
from tests.conftest import GB, card
from tests.planning.test_planner import FLUX, PROFILES
from tests.planning.test_streaming import FLUX as STREAMABLE


@pytest.fixture
def hardware(machine):
    return machine(card(30))


@pytest.fixture
def plan(hardware):
    return make_plan(hardware, FLUX, PROFILES, Wishes(device="cuda"), ("diffusers",))


def envelope(data: object, **changes: object) -> str:
    return json.dumps({"schema": 1, "ok": True, "data": data, "error": None} | changes)


def test_a_plan_is_read_with_its_envelope_and_without(plan, hardware):
    for text in (plan.to_json(), envelope(plan.to_data())):
        assert read_plan(text, "'p.json'") == plan
    check_plan(plan, hardware, FLUX)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ('{"schema": 1', "not JSON"),
        ("[]", "as Plan"),
        ("null", "as Plan"),
        (b"\xff\xfe", "not JSON"),
        ('{"schema": 1}', f"of version 1 and this autoflux reads version {PLAN_SCHEMA}"),
        (envelope({"schema": 7}), "of version 7"),
        (envelope(None, ok=False, error={"code": "x", "message": "no card"}), "holds an error: no card"),
        (envelope(None, ok=False), "holds an error"),
        (envelope(None), "as Plan"),
    ],
)
def test_what_is_no_plan_is_refused_by_file(text, words):
    with pytest.raises(DamagedFile, match=words) as caught:
        read_plan(text, "'p.json'")
    assert caught.value.message.startswith("'p.json'")


def test_any_cut_of_a_plan_is_refused(plan):
    text = plan.to_json()
    for end in range(0, len(text) - 1, 97):
        with pytest.raises(DamagedFile):
            read_plan(text[:end], "'p.json'")


def test_a_plan_of_another_machine_is_refused(plan, hardware):
    with pytest.raises(PlanUnusable, match="other versions"):
        check_plan(plan, hardware.replace(fingerprint="other"), FLUX)
    foreign = plan.replace(machine="rtx-3060-12gb", fingerprint="that")
    with pytest.raises(PlanUnusable, match="'rtx-3060-12gb', and cannot be run on this one"):
        check_plan(foreign, hardware, FLUX)
    with pytest.raises(PlanUnusable):
        check_plan(plan, changed(hardware, Changes(vram_bytes=12 * GB)), FLUX)


def test_a_plan_of_another_model_is_refused(plan, hardware):
    with pytest.raises(PlanUnusable, match="one of its files changed"):
        check_plan(plan, hardware, FLUX.replace(revision="2"))
    without_vae = plan.replace(components=plan.components[:-1])
    with pytest.raises(PlanUnusable, match=r"consists of .*vae"):
        check_plan(without_vae, hardware, FLUX)


def test_a_plan_at_odds_with_itself_is_refused(plan, hardware):
    with pytest.raises(PlanUnusable, match="max_batch is 0, and 1 to 64 pictures"):
        check_plan(plan.replace(max_batch=0), hardware, FLUX)
    parts: tuple[ComponentPlan, ...] = tuple(c.replace(resident=(99,)) for c in plan.components)
    with pytest.raises(PlanUnusable, match="keeps block 99"):
        check_plan(plan.replace(components=parts), hardware, FLUX)
    for device in ("cuda:1", "cuda:x", "tpu", ""):
        with pytest.raises(PlanUnusable, match="does not have"):
            check_plan(plan.replace(device=device), hardware, FLUX)


def changed_prediction(plan: Plan, **fields: object) -> Plan:
    return plan.replace(predicted=plan.predicted.replace(**fields))


AT_ODDS = {
    "a picture in less than its steps": (
        lambda plan: changed_prediction(plan, seconds_per_image=plan.predicted.seconds_per_step),
        "a picture takes .*, and its 28 steps alone",
    ),
    "a transformer elsewhere than its offload says": (
        lambda plan: plan.replace(offload=Offload.COMPONENT),
        "its offload is 'component', and its transformer is placed 'streamed'",
    ),
    "a transformer on the processor": (
        lambda plan: changed_part(plan, placement="host"),
        "the processor is to compute the transformer of a plan for 'cuda:0'",
    ),
    "an attention that nothing has": (lambda plan: plan.replace(attention="foo"), "attention is 'foo'"),
    "an attention on the processor": (lambda plan: on_the_processor(plan, attention="cudnn"), "attention is 'cudnn'"),
    "graphs on the processor": (lambda plan: on_the_processor(plan, graphs=True), "CUDA graphs that are not streamed"),
    **{
        f"{name} without streaming": (
            lambda plan, name=name, value=value: on_the_processor(plan, **{name: value}),
            f"{name} is .*, and its transformer is not streamed",
        )
        for name, value in {
            "compiled": True,
            "unit": "layer",
            "block_bytes": 1,
            "ring_bytes": 10**14,
            "park_for_decode": True,
        }.items()
    },
    "modulation kept without streaming": (
        lambda plan: on_the_processor(plan, keep_modulation=True),
        "keep_modulation is true, and its modulation is not apart",
    ),
    "blocks of an encoder that stay": (
        lambda plan: on_the_processor(plan, others={"resident": (0,)}),
        "blocks of 'text_encoder' are to stay",
    ),
    "a streamed encoder alone": (
        lambda plan: on_the_processor(plan, others={"placement": "streamed"}),
        "'text_encoder' is streamed, and the transformer is not",
    ),
    "no ceiling of the card": (lambda plan: plan.replace(vram_limit_bytes=None), "vram_limit_bytes is None"),
    "a ceiling below the need": (lambda plan: plan.replace(ram_limit_bytes=1), "its ram_limit_bytes allows 1 B"),
    "copies that never arrive": (lambda plan: changed_prediction(plan, copy_gb_per_s=0.0), "copy_gb_per_s is 0"),
    "blocks without times": (
        lambda plan: changed_prediction(plan, block_seconds={"double": 0.1}),
        "says nothing of single blocks",
    ),
}


def on_the_processor(plan: Plan, others: dict[str, object] | None = None, **fields: object) -> Plan:
    """All weights there; `others` is what is changed of the first text encoder."""
    on_cpu = plan.replace(
        device="cpu",
        offload=Offload.NONE,
        vram_limit_bytes=None,
        ram_limit_bytes=100 * GB,
        ring_bytes=0,
        hoist_modulation=False,
        keep_modulation=False,
        compiled=False,
        graphs=False,
    )
    made = changed_prediction(on_cpu, copy_gb_per_s=1.0)
    for component in plan.components:
        made = changed_part(made, component.name, placement="device", resident=(), storage="bfloat16", native=False)
    return changed_part(made, "text_encoder", **(others or {})).replace(**fields)


@pytest.mark.parametrize(("change", "words"), AT_ODDS.values(), ids=AT_ODDS)
def test_plans_at_odds_with_themselves_are_refused(machine, change, words):
    hardware = machine(card(12))
    made = make_plan(hardware, STREAMABLE, PROFILES, Wishes(device="cuda", offload=Offload.STREAM), ("diffusers",))
    with pytest.raises(PlanUnusable, match=f"at odds with itself: .*{words}") as caught:
        check_consistency(check_plan(change(made), hardware, STREAMABLE), STREAMABLE)
    assert "--save" in (caught.value.hint or "")


def test_blocks_that_all_stay_have_a_rate_of_copies_too(machine):
    """Drawn layer by layer, what they would take to be copied is divided by it."""
    hardware = machine(card(40))
    made = make_plan(hardware, STREAMABLE, PROFILES, Wishes(device="cuda", offload=Offload.STREAM), ("diffusers",))
    everything = tuple(range(len(STREAMABLE.component("transformer").blocks)))
    stays = changed_part(made, resident=everything)
    check_consistency(check_plan(stays, hardware, STREAMABLE), STREAMABLE)
    with pytest.raises(PlanUnusable, match="copy_gb_per_s is 0"):
        check_consistency(check_plan(changed_prediction(stays, copy_gb_per_s=0.0), hardware, STREAMABLE), STREAMABLE)


def test_a_plan_for_the_processor_is_not_at_odds(machine):
    hardware = machine(card(12))
    made = make_plan(hardware, STREAMABLE, PROFILES, Wishes(device="cuda", offload=Offload.STREAM), ("diffusers",))
    check_consistency(check_plan(on_the_processor(made), hardware, STREAMABLE), STREAMABLE)


def test_what_comes_back_is_what_was_reckoned(machine):
    hardware = machine(card(12))
    made = make_plan(hardware, STREAMABLE, PROFILES, Wishes(device="cuda", offload=Offload.STREAM), ("diffusers",))
    assert check_plan(made, hardware, STREAMABLE) == made
    check_consistency(made, STREAMABLE)
    nothing = PhaseBytes(encode=0, denoise=0, decode=0)
    lies = changed_prediction(made, peak_vram_bytes=nothing, peak_ram_bytes=0, pinned_bytes=10**9, streamed_bytes=0)
    assert check_plan(lies.replace(model="foo", unified_memory=True), hardware, STREAMABLE) == made
    least = check_plan(made.replace(ring_bytes=0), hardware, STREAMABLE)
    assert 0 < least.ring_bytes <= made.ring_bytes


ABSURD = {
    "negative bytes": (("predicted", "peak_ram_bytes"), -1, "peak_ram_bytes is -1"),
    "a negative block": (("components", 2, "resident"), [-3], "resident[0] is -3"),
    "more bytes than there are": (("ring_bytes",), 10**18, "ring_bytes is 1000000 TB"),
    "a huge block size": (("block_bytes",), 10**15, "block_bytes is 1000 TB"),
    "a negative time": (("predicted", "seconds_per_step"), -0.5, "seconds_per_step is -0.5"),
    "a prior": (("priors", "context_bytes"), 2 * 10**15, "priors.context_bytes is 2000 TB"),
    "a prior that overflows": (
        ("priors", "decode_activations"),
        1e300,
        "priors.decode_activations is 1e+300; allowed: 0.01 to 100000",
    ),
    "a step in no time": (
        ("predicted", "seconds_per_step"),
        0,
        "predicted.seconds_per_step is 0.0, and nothing is computed in no time",
    ),
    "a step in next to no time": (("predicted", "seconds_per_step"), 5e-324, "seconds_per_step is 5e-324"),
    "a block in no time": (("predicted", "block_seconds"), {"double": 0.0}, "block_seconds.double is 0.0"),
    "a copy that takes for ever": (("predicted", "copy_gb_per_s"), 5e-324, "copy_gb_per_s is 5e-324"),
    "a picture of a light year": (("predicted", "picture", "width"), 10**30, "picture.width is 1.00e+30"),
    "hundreds of digits": (("predicted", "peak_ram_bytes"), 10**400, "peak_ram_bytes is 1.00e+400"),
    "no size": (("predicted", "picture", "width"), 0, "picture.width is 0"),
    "no picture": (("max_batch",), 0, "max_batch is 0"),
    "too many pictures": (("max_batch",), 10**9, "max_batch is 1000000000"),
}


@pytest.mark.parametrize(("way", "value", "words"), ABSURD.values(), ids=ABSURD)
def test_figures_that_no_plan_has_are_refused_by_name(plan, way, value, words):
    data = plan.to_data()
    at = data
    for key in way[:-1]:
        at = at[key]
    at[way[-1]] = value
    with pytest.raises(DamagedFile, match=re.escape(words)) as caught:
        read_plan(json.dumps(data), "'p.json'")
    assert caught.value.message.startswith("'p.json' holds a figure that cannot be right: ")
    assert "--save" in caught.value.hint


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "-1e999"])
def test_numbers_that_are_not_finite_are_refused(plan, number):
    step = plan.predicted.seconds_per_step
    text = json.dumps(plan.to_data())
    assert f'"seconds_per_step": {step}' in text
    with pytest.raises(DamagedFile, match=r"^'p\.json'"):
        read_plan(text.replace(f'"seconds_per_step": {step}', f'"seconds_per_step": {number}'), "'p.json'")


def test_what_is_arranged_counts_and_not_what_a_file_says_of_it(machine):
    hardware = machine(card(12))
    made = make_plan(hardware, STREAMABLE, PROFILES, Wishes(device="cuda", offload=Offload.STREAM), ("diffusers",))
    check_plan(made.replace(ring_bytes=0), hardware, STREAMABLE)
    everything = tuple(range(len(STREAMABLE.component("transformer").blocks)))
    for greedy in (
        changed_part(made, resident=everything, storage="bfloat16", native=False),
        changed_part(made.replace(block_bytes=20 * GB), resident=(), storage="bfloat16", native=False),
        made.replace(ring_bytes=11 * GB),
    ):
        with pytest.raises(DoesNotFit, match="of memory on cuda:0"):
            check_plan(greedy, hardware, STREAMABLE)
    with pytest.raises(PlanUnusable, match="twice"):
        check_plan(changed_part(made, resident=(1, 1)), hardware, STREAMABLE)


def changed_part(plan: Plan, name: str = "transformer", /, **fields: object) -> Plan:
    parts = (c.replace(**fields) if c.name == name else c for c in plan.components)
    return Plan.from_json(plan.replace(components=tuple(parts)).to_json())


def test_a_plan_that_needs_more_than_is_free_now_is_refused(plan, hardware):
    (had,) = hardware.accelerators
    taken = had.replace(usable_bytes=had.usable_bytes.replace(value=10 * GB))
    with pytest.raises(DoesNotFit, match=r"memory on cuda:0 and 10\.0 GB are free"):
        check_plan(plan, hardware.replace(accelerators=(taken,)), FLUX)
    host = hardware.host.replace(available_bytes=hardware.host.available_bytes.replace(value=GB))
    with pytest.raises(DoesNotFit, match="of RAM"):
        check_plan(plan, hardware.replace(host=host), FLUX)


def test_need_and_have_differ_in_what_is_told(plan, hardware):
    (had,) = hardware.accelerators
    free = plan.predicted.peak_vram_bytes.peak - 1
    nearly = hardware.replace(accelerators=(had.replace(usable_bytes=had.usable_bytes.replace(value=free)),))
    with pytest.raises(DoesNotFit) as caught:
        check_plan(plan, nearly, FLUX)
    need, have = re.search(r"needs (\S+ GB) .* and (\S+ GB) are free now", caught.value.message).groups()
    assert need != have
    assert "end what takes it" in caught.value.hint
    with pytest.raises(DoesNotFit, match=r"and box has \S+ GB for it") as caught:
        check_plan(plan, nearly, FLUX, machine="box")
    assert "end what takes it" not in caught.value.hint
