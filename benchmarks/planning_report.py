"""What `benchmarks.planning` measures and keeps: settings, rows, the file they are kept in, and what they come to."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from autoflux.errors import DamagedFile, UsageError
from autoflux.files import write_atomic
from autoflux.planning.terms import Quality

CAPS_GB = (4, 6, 8, 10, 12, 16, 24, 48, 140)
SIZES = ((512, 512), (1024, 1024), (1344, 768))
BATCHES = (1, 4)
QUALITIES = (Quality.EXACT, Quality.BALANCED)
REGRET_CAPS_GB = (6, 12, 24, 48)

BOUNDS = {"median_step_error": 0.05, "worst_step_error": 0.12, "highest_planned_share": 1.07, "regret": 0.05}
"""What predictions are to keep to: shares of what was measured, or of the best alternative."""


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What is planned for and drawn."""

    cap_gb: float
    quality: Quality
    width: int
    height: int
    batch: int

    @property
    def name(self) -> str:
        return f"{self.cap_gb:g} GB {self.quality} {self.width}x{self.height} x{self.batch}"


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What a plan predicts, or what it took. A step is one of the whole batch, a picture its share of all."""

    seconds_per_step: float
    seconds_per_image: float
    peak_vram_bytes: int
    """The process on the card, its context included; 0 where there is none."""
    peak_ram_bytes: int


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One plan, run. `alternative` is empty for the one that the planner chooses, else what was done instead."""

    setting: Setting
    alternative: str = ""
    way: dict[str, Any] = msgspec.field(default_factory=dict)
    predicted: Figures | None = None
    measured: Figures | None = None
    allocated_bytes: dict[str, int] = msgspec.field(default_factory=dict)
    """The most that tensors took in each phase."""
    reserved_bytes: dict[str, int] = msgspec.field(default_factory=dict)
    """The most that torch took of the card in each phase."""
    predicted_phase_bytes: dict[str, int] = msgspec.field(default_factory=dict)
    context_bytes: int = 0
    exceeded: bool = False
    """What was planned of the card was not enough, and more was taken."""
    given_back: int | None = None
    """How often torch gave back all pieces that it held while steps were timed, as far as that was counted: steps wait
    for that."""
    error: str | None = None
    """Why nothing was planned or drawn."""
    refused: bool = False
    """The planner said that it does not fit."""
    setup_seconds: float = 0.0
    """Loading, 0 if what was loaded for the row before has served this one too."""
    seconds: float = 0.0

    @property
    def key(self) -> tuple[Setting, str]:
        return self.setting, self.alternative

    @property
    def step_error(self) -> float | None:
        """By how much too long a step is predicted, as a share of what it took."""
        if not (self.predicted and self.measured):
            return None
        return self.predicted.seconds_per_step / self.measured.seconds_per_step - 1

    def planned_share(self, field: str) -> float | None:
        """Planned bytes in units of those measured; None where nothing was measured."""
        if not (self.predicted and self.measured and getattr(self.measured, field)):
            return None
        share: float = getattr(self.predicted, field) / getattr(self.measured, field)
        return share

    @property
    def tensors_share(self) -> float | None:
        """Of what is planned of the card, what tensors and the driver's context took at most."""
        if not (self.predicted and self.predicted.peak_vram_bytes and self.context_bytes):
            return None
        return (max(self.allocated_bytes.values(), default=0) + self.context_bytes) / self.predicted.peak_vram_bytes


class Report(msgspec.Struct, kw_only=True):
    """All rows of one machine, as they lie in the file."""

    machine: dict[str, Any]
    rows: list[Row] = msgspec.field(default_factory=list)
    summary: dict[str, Any] = msgspec.field(default_factory=dict)

    @property
    def done(self) -> set[tuple[Setting, str]]:
        return {row.key for row in self.rows}

    def save(self, file: Path | None) -> None:
        """Sum up, and replace the file if there is to be one."""
        self.summary = summary(self.rows)
        if file is not None:
            write_atomic(file, msgspec.json.format(msgspec.json.encode(self)))


def resume(file: Path | None, machine: dict[str, Any]) -> Report:
    """The report that the file holds, or an empty one.

    Raises:
        DamagedFile: it is no report.
        UsageError: it is one of another device or other versions.
    """
    if file is None or not file.exists():
        return Report(machine=machine)
    found = _read(file)
    if found.machine != machine:
        raise UsageError(
            f"{str(file)!r} holds rows of {found.machine}, and this is {machine}", hint="name another file with --json"
        )
    return found


def merged(files: Sequence[Path]) -> Report:
    """One report of all rows, by cap; of rows for the same, the first.

    Raises:
        DamagedFile: a file is not there, or is no report.
        UsageError: they are of different devices or versions.
    """
    reports = [_read(file) for file in files]
    for file, report in zip(files, reports, strict=True):
        if report.machine != reports[0].machine:
            raise UsageError(
                f"{str(file)!r} holds rows of {report.machine}, the first file those of {reports[0].machine}",
                hint="merge what was measured on cards of one kind with the same versions",
            )
    rows: dict[tuple[Setting, str], Row] = {}
    for row in chain.from_iterable(report.rows for report in reports):
        rows.setdefault(row.key, row)
    return Report(machine=reports[0].machine, rows=sorted(rows.values(), key=lambda row: row.setting.cap_gb))


def _read(file: Path) -> Report:
    try:
        return msgspec.json.decode(file.read_bytes(), type=Report)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DamagedFile(f"{str(file)!r} is no report of this benchmark: {error}", hint="name another file") from error


def settings(caps_gb: Iterable[float], sizes: Sequence[tuple[int, int]], batches: Sequence[int]) -> list[Setting]:
    """Every combination, caps last to change: what one loads may serve the next."""
    return [
        Setting(cap_gb=cap, quality=quality, width=width, height=height, batch=batch)
        for cap in caps_gb
        for quality in QUALITIES
        for width, height in sizes
        for batch in batches
    ]


def telling(highest_gb: float) -> list[Setting]:
    """Twelve that tell the most: each cap that streams, both qualities, each size, both batches; the best first."""
    exact, balanced = QUALITIES
    chosen = (
        (8, balanced, 1024, 1024, 1), (12, exact, 1024, 1024, 1), (4, balanced, 1024, 1024, 1),
        (24, exact, 1024, 1024, 1), (140, balanced, 1024, 1024, 1), (140, exact, 1024, 1024, 1),
        (6, exact, 512, 512, 1), (10, exact, 1024, 1024, 4), (16, balanced, 1344, 768, 4),
        (4, exact, 1344, 768, 1), (48, exact, 512, 512, 4), (6, balanced, 512, 512, 1),
    )  # fmt: skip
    made = (
        Setting(cap_gb=cap, quality=quality, width=width, height=height, batch=batch)
        for cap, quality, width, height, batch in chosen
    )
    return [setting for setting in made if setting.cap_gb <= highest_gb]


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """What the rows come to, over all and by quality, and the regret of each setting with alternatives."""
    chosen = [row for row in rows if not row.alternative]
    groups = {"all": chosen} | {str(q): [row for row in chosen if row.setting.quality == q] for q in QUALITIES}
    return {name: _summed(group) for name, group in groups.items()} | {"regret": list(_regrets(rows))}


def _summed(rows: Sequence[Row]) -> dict[str, Any]:
    errors = [(abs(row.step_error), row) for row in rows if row.step_error is not None]
    worst = max(errors, key=lambda pair: pair[0], default=None)
    return {
        "measured": len(errors),
        "refused": sum(row.refused for row in rows),
        "failed": [row.setting.name for row in rows if row.error and not row.refused],
        "exceeded": [row.setting.name for row in rows if row.exceeded],
        "given_back": [row.setting.name for row in rows if row.given_back],
        "given_back_counted": sum(row.given_back is not None for row in rows),
        "median_step_error": statistics.median(error for error, _ in errors) if errors else None,
        "worst_step_error": worst and worst[0],
        "worst_step": worst and worst[1].setting.name,
        "vram": _shares(rows, "peak_vram_bytes"),
        "tensors": _tensors(rows),
        "ram": _shares(rows, "peak_ram_bytes"),
    }


def _shares(rows: Iterable[Row], field: str) -> dict[str, Any]:
    """Planned bytes in units of those measured: below 1 the plan was broken."""
    known = {row.setting.name: share for row in rows if (share := row.planned_share(field)) is not None}
    return {
        "above_planned": [name for name, share in known.items() if share < 1],
        "lowest_planned_share": min(known.values(), default=None),
        "median_planned_share": statistics.median(known.values()) if known else None,
        "highest_planned_share": max(known.values(), default=None),
    }


def _tensors(rows: Iterable[Row]) -> dict[str, float | None]:
    """Of what is planned of the card, what tensors and the context took."""
    known = [share for row in rows if (share := row.tensors_share) is not None]
    return {"lowest_share": min(known, default=None), "highest_share": max(known, default=None)}


def _regrets(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Of each setting with alternatives, how much longer a picture took as chosen than in the best other way."""
    for chosen in rows:
        others = [r for r in rows if r.alternative and r.setting == chosen.setting and r.measured is not None]
        if chosen.alternative or chosen.measured is None or not others:
            continue
        best = min(others, key=lambda row: row.measured.seconds_per_image if row.measured else 0.0)
        fastest = best.measured.seconds_per_image if best.measured else 0.0
        yield {
            "setting": chosen.setting.name,
            "alternatives": len(others),
            "seconds_per_image": chosen.measured.seconds_per_image,
            "best_alternative": best.alternative,
            "best_seconds_per_image": fastest,
            "regret": max(0.0, chosen.measured.seconds_per_image / fastest - 1),
        }


def told(row: Row) -> str:
    """A line of the table."""
    name = f"{row.setting.name:38s} {row.alternative[:40]:40s}" if row.alternative else f"{row.setting.name:38s}"
    if row.predicted is None or row.measured is None:
        return f"{name} {row.error}"
    planned, taken = row.predicted, row.measured
    memory = "  ".join(
        f"{what} {getattr(planned, field) / 1e9:6.2f} planned {getattr(taken, field) / 1e9:6.2f} taken"
        for what, field in (("VRAM", "peak_vram_bytes"), ("RAM", "peak_ram_bytes"))
    )
    return (
        f"{name} {planned.seconds_per_step:7.4f} s predicted {taken.seconds_per_step:7.4f} taken "
        f"({row.step_error or 0:+.1%})  {memory}  loaded in {row.setup_seconds:.1f} s, {row.seconds:.1f} s in all"
    )
