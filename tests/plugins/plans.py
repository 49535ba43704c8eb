"""Plans made from one with everything on the device."""

from __future__ import annotations

from autoflux import Offload, Placement, Plan, Waiting

STREAMED_WAYS = (
    ("pinned", True, False),
    ("pinned", True, True),
    ("pinned", False, False),
    ("pageable", True, False),
    ("disk", True, False),
    ("disk", True, True),
)
"""Where weights wait, whether modulation is computed beforehand, and whether its weights stay."""


def streamed(plan: Plan, *, resident=(), waiting="pinned", hoist=True, keep=False) -> Plan:
    """Everything streamed, but for those blocks of the transformer, and modulation if that is to be kept; what stays
    leaves the device for the decode."""
    parts = tuple(
        component.replace(
            placement=Placement.STREAMED,
            waiting=Waiting(waiting),
            resident=resident if component.name == "transformer" else (),
        )
        for component in plan.components
    )
    return plan.replace(
        offload=Offload.STREAM,
        components=parts,
        ring_bytes=400_000,
        hoist_modulation=hoist,
        keep_modulation=keep,
        park_for_decode=hoist,
    )


def native(plan: Plan, backend: str) -> Plan:
    """Everything left to the backend."""
    parts = tuple(component.replace(placement=Placement.NATIVE) for component in plan.components)
    return plan.replace(backend=backend, offload=Offload.NATIVE, components=parts)


def changed(plan: Plan, names=("transformer",), **fields: object) -> Plan:
    """With those fields of the components of those names."""
    return plan.replace(components=tuple(c.replace(**fields) if c.name in names else c for c in plan.components))
