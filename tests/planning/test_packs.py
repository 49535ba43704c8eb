"""What packs allow and spare, as the planner sees them."""

from __future__ import annotations

import pytest

from autoflux.errors import DoesNotFit
from autoflux.hardware.known import known_machine
from autoflux.hardware.values import Hardware
from autoflux.models.values import Precision
from autoflux.planning.findings import Findings
from autoflux.planning.packs import NO_PACKS, PackedPart, Packs
from autoflux.planning.planner import make_plan
from autoflux.planning.streaming import block_bytes_of
from autoflux.planning.terms import Offload, Placement, Quality, Waiting
from autoflux.planning.values import Plan, Wishes
from autoflux.planning.weights import component_bytes
from tests.conftest import GB, figure, size
from tests.planning.test_planner import PROFILES
from tests.planning.test_ways import SMALL

NARROW = {"storage": Precision.INT8, "arithmetic": Precision.BFLOAT16}


def packs(**nbytes: int) -> Packs:
    """The transformer in int8, the others in bfloat16."""
    return Packs(
        parts=tuple(
            PackedPart(
                component=name,
                storage=Precision.INT8 if name == "transformer" else Precision.BFLOAT16,
                arithmetic=Precision.BFLOAT16,
                nbytes=count,
            )
            for name, count in nbytes.items()
        )
    )


def poor(ram_gb: float, card: str = "rtx-4060-8gb") -> Hardware:
    """A card beside little RAM."""
    machine = known_machine(card)
    return machine.replace(host=machine.host.replace(available_bytes=size(int(ram_gb * GB))))


def plan(hardware: Hardware, held: Packs = NO_PACKS, **wishes) -> Plan:
    return make_plan(
        hardware,
        SMALL,
        PROFILES,
        Wishes(**{"device": "cuda", "vram_bytes": 3 * GB, **wishes}),
        ("d",),
        Findings(packs=held),
    )


def topic(made: Plan, name: str) -> str | None:
    return next((f"{c.value}: {c.reason}" for c in made.choices if c.topic == name), None)


RAM_GB = 5.2
"""Too little for the small model's weights in 8 bits beside the process."""


def test_eight_bits_wait_on_the_disk_only_where_they_are_packed():
    wide = plan(poor(RAM_GB))
    assert (wide.waiting, wide.component("transformer").storage) == (Waiting.DISK, Precision.BFLOAT16)
    narrow = plan(poor(RAM_GB), packs(transformer=2 * GB))
    assert (narrow.waiting, narrow.component("transformer").storage) == (Waiting.DISK, Precision.INT8)
    assert narrow.component("transformer").placement == Placement.STREAMED
    assert narrow.predicted.seconds_per_step < 0.7 * wide.predicted.seconds_per_step
    assert narrow.predicted.peak_ram_bytes <= narrow.ram_limit_bytes


def test_where_packing_would_help_the_plan_says_so():
    (warning,) = [w for w in plan(poor(RAM_GB)).warnings if "models pack" in w]
    assert "--precision int8" in warning
    told = [
        plan(poor(RAM_GB), packs(transformer=2 * GB)),
        plan(poor(RAM_GB), quality=Quality.EXACT),
        plan(poor(64)),
    ]
    assert not [warning for made in told for warning in made.warnings if "models pack" in warning]


def test_the_start_is_predicted_by_what_is_read_and_made_narrow():
    hardware = poor(64)
    hardware = hardware.replace(
        disk=hardware.disk.replace(read_gb_per_s=figure(2.0)), host=hardware.host.replace(copy_gb_per_s=figure(5.0))
    )
    unpacked = plan(hardware, quant=Precision.INT8)
    disk = SMALL.component("transformer").disk_bytes
    packed = plan(hardware, packs(transformer=disk // 2), quant=Precision.INT8)
    spared = unpacked.predicted.seconds_to_start - packed.predicted.seconds_to_start
    narrow = sum(block_bytes_of(SMALL, unpacked.component("transformer")))
    # Two bytes a number go to the device and one comes back.
    assert spared == pytest.approx((disk - disk // 2) / (2 * GB) + 3 * narrow / (5 * GB), rel=0.01)
    assert "transformer" in (topic(packed, "packs") or "")
    assert topic(unpacked, "packs") is None


def test_what_is_read_from_packs_takes_no_ram_before_it_is_where_it_will_be():
    card = "rtx-3060-12gb"
    wishes = {"vram_bytes": 12 * GB, "quality": Quality.EXACT, "offload": Offload.NONE}
    every = {component.name: component.disk_bytes for component in SMALL.components}
    wide = Packs(
        parts=tuple(
            PackedPart(component=name, storage=Precision.BFLOAT16, arithmetic=Precision.BFLOAT16, nbytes=nbytes)
            for name, nbytes in every.items()
        )
    )
    unpacked, packed = (plan(poor(64, card), held, **wishes) for held in (NO_PACKS, wide))
    assert {c.name: c.packed_bytes for c in packed.components} == every
    assert not any(c.packed_bytes for c in unpacked.components)
    host = packed.priors.host_bytes
    assert packed.predicted.peak_ram_bytes == host
    assert unpacked.predicted.peak_ram_bytes == host + max(every.values())
    # So a host has room for it that would have none for the files.
    low = (host + max(every.values()) // 2) / GB
    assert plan(poor(low, card), wide, **wishes).offload == Offload.NONE
    with pytest.raises(DoesNotFit):
        plan(poor(low, card), **wishes)


def test_what_is_read_from_packs_to_where_it_waits_joins_what_was_made_narrow_from_files():
    hardware = poor(64)
    wide = Precision.BFLOAT16
    sizes = {part.name: part.disk_bytes for part in SMALL.components}
    encoder = PackedPart(component="text_encoder_2", storage=wide, arithmetic=wide, nbytes=sizes["text_encoder_2"])
    made = plan(hardware, Packs(parts=(encoder,)), quant=Precision.INT8, compiled=False)
    t5, transformer = (made.component(name) for name in ("text_encoder_2", "transformer"))
    assert (t5.placement, transformer.placement) == (Placement.STREAMED, Placement.STREAMED)
    assert t5.packed_bytes
    assert not transformer.packed_bytes
    # Not while the transformer is read, whose largest block is there in its own width too; but when both are there.
    both = component_bytes(SMALL, t5) + component_bytes(SMALL, transformer)
    assert 0 <= made.predicted.peak_ram_bytes - made.priors.host_bytes - both < 0.3 * GB


def test_packs_in_other_formats_are_not_reckoned_with():
    hardware = known_machine("rtx-4060-8gb")
    held = packs(transformer=GB)
    wide = {"quant": Precision.BFLOAT16}
    assert plan(hardware, held, **wide).predicted == plan(hardware, **wide).predicted


def test_a_pack_is_found_by_component_and_both_formats():
    held = packs(transformer=5, vae=3)
    assert held.find("transformer", **NARROW) == held.parts[0]
    assert held.find("transformer", Precision.FLOAT8, Precision.BFLOAT16) is None
    assert held.find("transformer", Precision.INT8, Precision.FLOAT16) is None
    assert held.find("vae", **NARROW) is None
