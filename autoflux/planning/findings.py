"""What is known of a model on a machine beyond its measurements: packs, what backends say, and what runs took."""

from __future__ import annotations

from autoflux.planning.backends import BackendFacts
from autoflux.planning.calibration import Calibration
from autoflux.planning.packs import NO_PACKS, Packs
from autoflux.values import Value


class Findings(Value, frozen=True, kw_only=True):
    """Everything that a plan may rest on and that may be missing."""

    packs: Packs = NO_PACKS
    """The model's on this machine."""
    facts: tuple[BackendFacts, ...] = ()
    """What is known of some of the backends."""
    calibration: Calibration | None = None
    """What the model took here in earlier runs."""

    def of_backend(self, name: str) -> Findings:
        """With what that backend's runs took."""
        return self.replace(calibration=self.calibration.of_backend(name)) if self.calibration else self

    @property
    def tuned_backend(self) -> str | None:
        """The backend of the setting that `tune` chose."""
        return self.calibration.tuned.setting.backend if self.calibration and self.calibration.tuned else None


NO_FINDINGS = Findings()
