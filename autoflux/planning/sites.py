"""Where a model could run: the devices that the wishes leave, each with its profile and its ceilings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autoflux.errors import ContradictoryWishes, DeviceUnavailable, UnknownName
from autoflux.hardware.values import LEAST_KERNEL_CAPABILITY, Accelerator, DeviceKind, Hardware
from autoflux.models.values import Model
from autoflux.planning.calibration import Calibration
from autoflux.planning.findings import NO_FINDINGS, Findings
from autoflux.planning.footprint import Footprint, footprint
from autoflux.planning.packs import Packs
from autoflux.planning.profiles import select_profile
from autoflux.planning.terms import Offload
from autoflux.planning.values import Arrangement, Picture, Profile, Wishes

ROCM = "torch_hip"
"""Of the versions on a machine that of ROCm, whose cards torch calls CUDA's."""


def sites(
    hardware: Hardware,
    profiles: Sequence[Profile],
    wishes: Wishes,
    findings: Findings = NO_FINDINGS,
) -> list[Site]:
    """The devices to choose from. Never empty. The calibration found is that of one backend.

    Raises:
        DeviceUnavailable: the wished device is not there.
        ContradictoryWishes: two wishes exclude each other.
        UnknownName: no profile of the wished name, or no such kind of device.
    """
    devices = _of_the_profile(_devices(hardware, wishes), profiles, wishes)
    found = [site_of(hardware, profiles, wishes, accelerator, findings) for accelerator in devices]
    if wishes.offload in (None, Offload.NONE):
        return found
    fitting = [site for site in found if not site.one_memory]
    if not fitting:
        kinds = ", ".join(dict.fromkeys(repr(site.kind.value) for site in found))
        raise ContradictoryWishes(
            f"offload {wishes.offload.value!r} makes no sense on {kinds}, whose memory is the host's own",
            hint="drop --offload or choose another --device",
        )
    return fitting


@dataclass(frozen=True)
class Site:
    """A device with its profile and ceilings; `accelerator` is None for the CPU."""

    accelerator: Accelerator | None
    profile: Profile
    vram_limit_bytes: int | None
    ram_limit_bytes: int
    findings: Findings = NO_FINDINGS
    """Of the model there; the profile's priors have been replaced by what runs measured of them."""

    @property
    def packs(self) -> Packs:
        return self.findings.packs

    @property
    def calibration(self) -> Calibration | None:
        return self.findings.calibration

    @property
    def kind(self) -> DeviceKind:
        return self.accelerator.kind if self.accelerator else DeviceKind.CPU

    @property
    def device(self) -> str:
        """The name torch uses."""
        return self.accelerator.device if self.accelerator else "cpu"

    @property
    def one_memory(self) -> bool:
        """Whether the device computes in the host's RAM."""
        return self.accelerator is None or self.accelerator.unified_memory

    def need(self, model: Model, arrangement: Arrangement, picture: Picture) -> Footprint:
        """Memory of an arrangement here."""
        priors, unified = self.profile.priors, self.one_memory
        return footprint(model, arrangement, self.kind, priors, picture, unified_memory=unified)

    def holds(self, need: Footprint) -> bool:
        fits_device = self.vram_limit_bytes is None or need.vram.peak <= self.vram_limit_bytes
        return fits_device and need.ram_bytes <= self.ram_limit_bytes


def _devices(hardware: Hardware, wishes: Wishes) -> list[Accelerator | None]:
    if wishes.device is None:
        # On the processor everything is where it computes, which is not what --keep asks for.
        return [*hardware.accelerators, *([] if wishes.keep and hardware.accelerators else [None])]
    kind_name, _, index = wishes.device.lower().partition(":")
    if kind_name not in set(DeviceKind) or not (index.isdecimal() or not index):
        raise UnknownName("device", wishes.device, [*DeviceKind])
    kind = DeviceKind(kind_name)
    if kind == DeviceKind.CPU and not int(index or 0):
        return [None]
    accelerator = hardware.accelerator(kind, int(index or 0))
    if accelerator is None:
        raise _unavailable(hardware, wishes.device)
    return [accelerator]


def site_of(
    hardware: Hardware,
    profiles: Sequence[Profile],
    wishes: Wishes,
    accelerator: Accelerator | None,
    findings: Findings = NO_FINDINGS,
) -> Site:
    profile = _profile(profiles, wishes, accelerator)
    if not _runs_kernels(hardware, accelerator):
        priors = profile.priors
        more = priors.denoise_activations * priors.unfused_activations
        profile = profile.replace(priors=priors.replace(denoise_activations=more))
    if findings.calibration:
        device = accelerator.device if accelerator else DeviceKind.CPU.value
        profile = profile.replace(priors=findings.calibration.priors(profile.priors, device))
    vram_limit = None
    if accelerator:
        usable = accelerator.usable_bytes.value - profile.priors.reserve_bytes
        vram_limit = max(0, min(usable, wishes.vram_bytes or usable))
    available = max(0, hardware.host.available_bytes.value - profile.priors.ram_reserve_bytes)
    return Site(accelerator, profile, vram_limit, min(available, wishes.ram_bytes or available), findings)


def _runs_kernels(hardware: Hardware, accelerator: Accelerator | None) -> bool:
    """Whether kernels of our own are expected to run there; what else they need shows when one is tried."""
    there = "triton" in hardware.versions and ROCM not in hardware.versions
    return there and accelerator is not None and accelerator.is_at_least(LEAST_KERNEL_CAPABILITY)


def _of_the_profile(
    devices: list[Accelerator | None], profiles: Sequence[Profile], wishes: Wishes
) -> list[Accelerator | None]:
    """Those of the kind that the wished profile is for; all when none was wished."""
    if wishes.profile is None:
        return devices
    named = {p.name: p for p in profiles}
    if wishes.profile not in named:
        raise UnknownName("profile", wishes.profile, named, hint="`autoflux plugins` lists the profiles")
    kind = named[wishes.profile].match.kind
    matching = [a for a in devices if (a.kind if a else DeviceKind.CPU) == kind]
    if not matching:
        raise ContradictoryWishes(
            f"the profile {wishes.profile!r} is for {kind.value!r}, and no such device is to be used here",
            hint="drop --profile, or plan for another --device",
        )
    return matching


def _unavailable(hardware: Hardware, wished: str) -> DeviceUnavailable:
    present = [a.device for a in hardware.accelerators] + ["cpu"]
    why = next((f" ({p.message})" for p in hardware.problems if p.subject in ("cuda", "nvml", wished)), "")
    return DeviceUnavailable(
        f"there is no device {wished!r}; there is {', '.join(present)}{why}",
        hint="`autoflux doctor` says why a card is not seen; drop --device to let autoflux choose",
    )


def _profile(profiles: Sequence[Profile], wishes: Wishes, accelerator: Accelerator | None) -> Profile:
    if wishes.profile is None:
        if accelerator is None:
            return select_profile(profiles, DeviceKind.CPU)
        return select_profile(profiles, accelerator.kind, accelerator.capability, accelerator.name)
    return next(p for p in profiles if p.name == wishes.profile)
