"""What is drawn of a plan is what the plan says, and both forms of the drawing show it."""

from __future__ import annotations

import re
from itertools import pairwise
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoflux.errors import DoesNotFit
from autoflux.hardware.values import DeviceKind
from autoflux.planning.drawing import Drawing, DrawnPhase, Part, draw
from autoflux.planning.drawing_svg import COLOURS, WIDTH, to_svg
from autoflux.planning.drawing_text import to_text
from autoflux.planning.planner import make_plan
from autoflux.planning.terms import Offload, Quality, Waiting
from autoflux.planning.values import Plan, Wishes
from tests.conftest import GB, card, size
from tests.planning.test_planner import FLUX as WITHOUT_BLOCKS
from tools.plan_drawing import flux_dev, machine, shipped_profiles

FLUX, PROFILES = flux_dev(), shipped_profiles()


def drawn(vram_gb: float, *, tflops: float = 100.0, model=FLUX, hardware=None, **wishes) -> tuple[Drawing, Plan]:
    hardware = hardware or machine(vram_gb=vram_gb, tflops=tflops)
    plan = make_plan(
        hardware, model, PROFILES, Wishes(**{"device": "cuda", "quality": Quality.EXACT, **wishes}), ("diffusers",)
    )
    return draw(plan, model), plan


def cases() -> dict[str, tuple[Drawing, Plan]]:
    """One of each kind of plan."""
    on_cpu = machine(vram_gb=12, tflops=100).replace(accelerators=())
    apple = on_cpu.replace(accelerators=(card(48, kind=DeviceKind.MPS),))
    small_ram = machine(vram_gb=8, tflops=100, ram_gb=16)
    little_pinned = small_ram.host.replace(available_bytes=size(64 * GB), pinnable_bytes=size(4 * GB))
    return {
        "streamed": drawn(12),
        "streamed, waiting for copies": drawn(12, tflops=690),
        "smallest": drawn(3),
        "pageable": drawn(8, hardware=small_ram.replace(host=little_pinned)),
        "disk": drawn(8, hardware=small_ram),
        "component": drawn(30, offload=Offload.COMPONENT),
        "resident": drawn(48, offload=Offload.NONE),
        "all there": drawn(48),
        "cpu": drawn(0, hardware=on_cpu, device="cpu"),
        "mps": drawn(0, hardware=apple, device="mps"),
        "without blocks": drawn(30, model=WITHOUT_BLOCKS),
    }


CASES = cases()
each = pytest.mark.parametrize(("drawing", "plan"), CASES.values(), ids=CASES)


def test_the_cases_are_what_they_are_called():
    waiting = {name: plan.waiting for name, (_, plan) in CASES.items() if plan.offload == Offload.STREAM}
    assert waiting == {
        "streamed": Waiting.PINNED,
        "streamed, waiting for copies": Waiting.PINNED,
        "smallest": Waiting.PINNED,
        "pageable": Waiting.PAGEABLE,
        "disk": Waiting.DISK,
        "all there": Waiting.PINNED,
    }
    assert CASES["all there"][1].keep_modulation
    assert CASES["streamed, waiting for copies"][1].park_for_decode
    assert CASES["smallest"][1].tile_decode


@each
def test_memory_adds_up_to_what_was_predicted(drawing, plan):
    assert [phase.name for phase in drawing.phases] == ["encode", "denoise", "decode"]
    totals = [phase.nbytes for phase in drawing.phases]
    if plan.vram_limit_bytes is None:
        assert (max(totals), drawing.ceiling_bytes) == (plan.predicted.peak_ram_bytes, plan.ram_limit_bytes)
        assert drawing.memory == "RAM"
    else:
        peaks = plan.predicted.peak_vram_bytes
        assert totals == [peaks.encode, peaks.denoise, peaks.decode]
        assert drawing.ceiling_bytes == plan.vram_limit_bytes


@each
def test_the_step_takes_what_was_predicted_and_lanes_fill_it(drawing, plan):
    assert drawing.seconds_per_step == pytest.approx(plan.predicted.seconds_per_step)
    for lane in drawing.lanes:
        edges = [0.0, *(edge for s in lane.stretches for edge in (s.begin, s.end)), drawing.seconds_per_step]
        assert all(begin <= end + 1e-9 for begin, end in pairwise(edges))
        assert sum(s.seconds for s in lane.stretches) == pytest.approx(drawing.seconds_per_step, rel=1e-3)


@each
def test_what_is_streamed_is_copied_once_and_all_compute_once(drawing, plan):
    blocks = range(len(drawing.blocks))
    streamed = {i for i in blocks if drawing.blocks[i].part == Part.STREAMED}
    lanes = {lane.name: lane for lane in drawing.lanes}
    assert ("copy" in lanes) == bool(streamed)
    if not drawing.blocks:
        assert not lanes
        return
    assert [s.block for s in lanes["compute"].stretches if s.block is not None] == list(blocks)
    if plan.offload == Offload.STREAM:
        assert streamed == set(blocks) - set(plan.component("transformer").resident)
    if plan.offload == Offload.STREAM and streamed:
        assert {s.block for s in lanes["copy"].stretches} - {None} == streamed
        whole = sum(drawing.blocks[i].nbytes for i in streamed)
        busy = drawing.seconds_per_step - lanes["copy"].waiting_seconds
        speed = whole / busy
        for i in streamed:
            copied = sum(s.seconds for s in lanes["copy"].stretches if s.block == i)
            assert copied * speed == pytest.approx(drawing.blocks[i].nbytes, rel=1e-6)


def test_captions_tell_what_stays_and_who_waits():
    streamed, _ = CASES["streamed"]
    waiting, _ = CASES["streamed, waiting for copies"]
    assert "of 19 double" in streamed.blocks_caption
    assert "arithmetic never waits for copies" in streamed.step_caption
    assert "arithmetic waits" in waiting.step_caption
    assert "leaves the device while the picture is decoded" in waiting.memory_caption
    assert "no weights are copied" in CASES["resident"][0].step_caption
    assert "once a picture" in CASES["component"][0].blocks_caption
    joined, _ = drawn(12, block_bytes=GB)
    assert re.match(r"no block stays; all, [\d.]+ GB, pass through a ring of", joined.blocks_caption)
    assert "not made of blocks" in CASES["without blocks"][0].blocks_caption


@given(vram=st.floats(3, 40), tflops=st.sampled_from([20.0, 100.0, 690.0]), link=st.floats(3, 60))
@settings(max_examples=15, deadline=None)
def test_any_streamed_plan_is_drawn_as_predicted(vram, tflops, link):
    hardware = machine(vram_gb=vram, tflops=tflops, link_gb_per_s=link, ram_gb=128)
    try:
        drawing, plan = drawn(0, hardware=hardware, offload=Offload.STREAM)
    except DoesNotFit:
        return
    assert drawing.seconds_per_step == pytest.approx(plan.predicted.seconds_per_step)
    assert max(phase.nbytes for phase in drawing.phases) == plan.predicted.peak_vram_bytes.peak


@each
def test_the_text_fits_its_columns(drawing, plan):
    for columns in (40, 72, 100):
        for unicode in (True, False):
            text = to_text(drawing, columns=columns, unicode=unicode)
            assert max(map(len, text.splitlines())) <= columns
            assert text.isascii() != unicode
    assert max(map(len, to_text(drawing, columns=400).splitlines())) <= 100


def test_the_text_shows_each_block_and_what_waits():
    drawing, plan = CASES["streamed, waiting for copies"]
    lines = to_text(drawing, unicode=False).splitlines()
    singles = next(line for line in lines if line.startswith("single ")).split()[1]
    resident = plan.component("transformer").resident
    assert [i + 19 for i, glyph in enumerate(singles) if glyph == "#"] == [i for i in resident if i >= 19]
    assert len(singles) == 38
    doubles = next(line for line in lines if line.startswith("double ")).split()[1]
    assert doubles[::2] == doubles[1::2] == "".join("#" if i in resident else "~" for i in range(19))
    computing = next(line for line in lines if line.startswith("compute ")).split("|")[1]
    assert len(set(computing)) > 3


def _svg(drawing: Drawing) -> ET.Element:
    return ET.fromstring(to_svg(drawing))


def _named(root: ET.Element, tag: str) -> list[ET.Element]:
    return list(root.iter(f"{{http://www.w3.org/2000/svg}}{tag}"))


@each
def test_everything_lies_inside_the_picture(drawing, plan):
    root = _svg(drawing)
    _, _, width, height = map(float, root.get("viewBox").split())
    assert width == WIDTH
    for rect in _named(root, "rect"):
        x, y, w, h = (float(rect.get(name)) for name in ("x", "y", "width", "height"))
        assert min(x, y, w, h) >= 0
        assert x + w <= width
        assert y + h <= height
    assert all(0 <= float(text.get("y")) <= height for text in _named(root, "text"))


@each
def test_a_reader_of_screens_hears_what_is_seen(drawing, plan):
    root = _svg(drawing)
    title, desc = (next(iter(_named(root, tag))) for tag in ("title", "desc"))
    assert title.text == drawing.title
    assert drawing.memory_caption in desc.text
    assert root.get("role") == "img"
    assert set(root.get("aria-labelledby").split()) == {title.get("id"), desc.get("id")}
    shown = {text.text for text in _named(root, "text")}
    assert {drawing.label(part) for part in drawing.parts} <= shown


def test_blocks_are_as_wide_as_their_bytes():
    drawing, _ = CASES["streamed"]
    tips = {block.name: block for block in drawing.blocks}
    widths = {}
    for rect in _named(_svg(drawing), "rect"):
        words = "".join(rect.itertext()).partition(":")[0]
        if words in tips:
            widths[words] = float(rect.get("width")) + 1
            assert rect.get("class") == tips[words].part.value
    assert widths.keys() == tips.keys()
    scale = {round(widths[name] / block.nbytes * GB, 1) for name, block in tips.items()}
    assert len(scale) == 1


@given(name=st.text())
def test_no_name_of_a_model_breaks_the_drawing(name):
    drawing = CASES["resident"][0].replace(title=f"{name} on cuda:0")
    # The parser knows no line end but a line feed.
    assert ET.fromstring(to_svg(drawing).encode()).find("{http://www.w3.org/2000/svg}title").text.endswith("cuda:0")
    assert to_text(drawing, unicode=False).isascii()
    assert max(map(len, to_text(drawing).splitlines())) <= 100


def test_need_beyond_the_ceiling_and_far_below_it_are_drawn():
    drawing, _ = CASES["resident"]
    huge = drawing.replace(phases=(DrawnPhase(name="denoise", parts={Part.STAYS: 500 * GB}),))
    tiny = drawing.replace(phases=(DrawnPhase(name="denoise", parts={Part.STAYS: GB}),))
    assert "far off this scale" in to_svg(tiny)
    assert "far off this scale" in to_text(tiny)
    for text in (to_svg(huge), to_text(huge)):
        assert "500 GB" in text
        assert "far off" not in text


def _luminance(colour: str) -> float:
    """Relative luminance as WCAG 2.2 defines it."""
    shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _contrast(one: str, other: str) -> float:
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_contrast_is_enough_to_read(theme):
    paper = COLOURS["paper"][theme]
    for ink in ("ink", "faint"):
        assert _contrast(COLOURS[ink][theme], paper) >= 4.5
    for part in Part:
        fill = COLOURS[part.value][theme]
        assert _contrast(fill, paper) >= 3
        on = COLOURS["on-stays" if part == Part.STAYS else "on"]
        assert _contrast(on[theme], fill) >= 4.5
