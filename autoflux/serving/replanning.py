"""Planning again, when runs of a model have taught something."""

from __future__ import annotations

from dataclasses import dataclass, field

from autoflux.api import packs_of, plan_for
from autoflux.hardware.values import Hardware
from autoflux.models.values import Model
from autoflux.planning.calibration import Calibration
from autoflux.planning.findings import Findings
from autoflux.planning.values import Plan, Wishes
from autoflux.plugin_manager import Plugins
from autoflux.runtime.calibration_store import CalibrationStore


@dataclass(frozen=True)
class Replanner:
    """Plans a model again on this machine when runs of it have taught something, and keeps that."""

    model: Model
    wishes: Wishes
    plugins: Plugins
    store: CalibrationStore = field(default_factory=CalibrationStore)

    def known(self, hardware: Hardware) -> Calibration | None:
        """What earlier runs have measured; what cannot be used counts as nothing."""
        return self.store.load(hardware, self.model)[0]

    def plan(self, hardware: Hardware, calibration: Calibration) -> Plan:
        """The best plan with that."""
        findings = Findings(packs=packs_of(self.model), calibration=calibration)
        return plan_for(self.model, self.wishes, self.plugins, hardware, findings)

    def keep(self, calibration: Calibration) -> None:
        """Remember it; where nothing can be written, it holds for this run only."""
        self.store.save(calibration, self.model)
