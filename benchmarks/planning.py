"""Do predictions come true? FLUX.1-dev at full size (random weights) under memory caps: planned, run, compared.

    python -m benchmarks.planning --json FILE              # 9 caps, 2 qualities, 3 sizes, 2 batches: 108 rows
    python -m benchmarks.planning --json FILE --minutes 9  # stop in time; the next call goes on from the file
    python -m benchmarks.planning --quick                  # 12 telling rows, some minutes on an H200
    python -m benchmarks.planning --regret 8 --json FILE   # instead, at 4 caps: the plan and the 8 best alternatives
    python -m benchmarks.planning --merge A B --json FILE  # what several cards of one kind have measured, in one file
    python -m benchmarks.planning --tiny                   # the same with a miniature, on any processor, in seconds

Each row: autoflux plans for the cap, loads what it planned, and twice draws a few steps and decodes. Of that come
seconds a step (the median of those in both pictures, in the second where blocks are compiled, the first three not
counted; they follow each other as in a picture, nothing waits between them), seconds a picture (encode, first steps,
all others, decode), the most that the card had to give (torch's reserve and what the driver takes beside it) and the
most RAM. As in commands, torch is told to take no more of the card than is planned, and more only where that is not
enough, and takes what steps are planned to take before them; so what tensors took of it is told, too, which shows plans
that count too much; while weights are loaded, no more than the cap leaves beside the context. Caps above the card's
memory are skipped. Weights are made once and lie in RAM, whence each plan's are copied as a loader would read them;
that RAM is not counted, and neither is what plans before have left in the process: while weights are loaded, a process
that has drawn before has more in it than a new one, and that is taken off. Pinned memory is handed on from plan to
plan; what the one that runs has no use for is not counted either. With `--direct` what is streamed is copied straight
to where it waits, as from a pack, also in 8 bits, and planned so: quicker, but what a loader takes of RAM before that
is not seen.

Rows are written as they come. Delete the file when the planner has changed: what is in it is not run again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autoflux.errors import AutofluxError
from autoflux.planning.terms import Quality
from autoflux.runtime import allocator
from benchmarks.planning_report import (
    BATCHES,
    BOUNDS,
    CAPS_GB,
    QUALITIES,
    REGRET_CAPS_GB,
    SIZES,
    Report,
    Setting,
    merged,
    resume,
    settings,
    telling,
    told,
)

if TYPE_CHECKING:
    from benchmarks.planning_runs import Bench

TINY_CAPS_GB = (1.115, 1.13, 1.23)
"""With a miniature on a card that takes 1.1 GB for itself: too little for some pictures, streamed, and all on it."""
TINY_SIZES = ((128, 128),)
TINY_BATCHES = (1, 2)


class Clock:
    """Says when another row would take too long."""

    def __init__(self, minutes: float | None) -> None:
        self._began = time.monotonic()
        self._limit = minutes * 60 if minutes else None
        self._longest = 0.0

    def took(self, seconds: float) -> None:
        self._longest = max(self._longest, seconds)

    def is_over(self) -> bool:
        """Whether another row as long as the longest would end too late."""
        return self._limit is not None and time.monotonic() - self._began + self._longest > self._limit


def wanted(options: argparse.Namespace, highest_gb: float) -> list[Setting]:
    """The settings to measure on a card of that memory."""
    if options.quick and not options.tiny:
        return telling(highest_gb)
    caps = options.caps or (TINY_CAPS_GB if options.tiny else CAPS_GB)
    sizes, batches = (TINY_SIZES, TINY_BATCHES) if options.tiny else (SIZES, BATCHES)
    every = settings([cap for cap in caps if cap <= highest_gb], sizes, batches)
    return [setting for setting in every if options.quality in (None, setting.quality)]


def run(bench: Bench, options: argparse.Namespace, report: Report, clock: Clock) -> bool:
    """Measure what the report lacks; whether nothing is left."""
    every = _regretted(options, bench.highest_gb) if options.regret else wanted(options, bench.highest_gb)
    for setting in every:
        others = bench.alternatives(setting, options.regret) if options.regret else []
        for alternative in ("", *others):
            missing = (setting, alternative) not in report.done
            if missing and not _add(bench, report, setting, alternative, options, clock):
                return False
    return True


def _regretted(options: argparse.Namespace, highest_gb: float) -> list[Setting]:
    """The settings whose alternatives are run: one picture of the usual size at each cap."""
    caps = options.caps or (TINY_CAPS_GB[1:2] if options.tiny else REGRET_CAPS_GB)
    size = TINY_SIZES if options.tiny else SIZES[1:2]
    every = settings([cap for cap in caps if cap <= highest_gb], size, (1,))
    return [setting for setting in every if setting.quality == (options.quality or Quality.BALANCED)]


def _add(
    bench: Bench, report: Report, setting: Setting, alternative: str, options: argparse.Namespace, clock: Clock
) -> bool:
    """Measure a row and write it down; whether there was time for it."""
    if clock.is_over():
        return False
    row = bench.row(setting, alternative)
    clock.took(row.seconds)
    report.rows.append(row)
    report.save(options.json)
    print(told(row), flush=True)
    return True


def show(report: Report) -> None:
    """Print what the rows come to."""
    for name in ("all", "exact", "balanced"):
        held = report.summary[name]
        if not held["measured"]:
            continue
        print(f"\n{name}: {held['measured']} measured, {held['refused']} refused, {len(held['failed'])} failed")
        print(f"  what was planned of the card was not enough in {', '.join(held['exceeded']) or 'none'}")
        given_back, counted = ", ".join(held["given_back"]) or "none", held["given_back_counted"]
        print(f"  while steps were timed torch gave memory back in {given_back} (of {counted} where that was counted)")
        print(
            f"  a step: median error {held['median_step_error']:.1%} (<= {BOUNDS['median_step_error']:.0%}), "
            f"worst {held['worst_step_error']:.1%} (<= {BOUNDS['worst_step_error']:.0%}) at {held['worst_step']}"
        )
        for what in ("vram", "ram"):
            shares = held[what]
            if shares["median_planned_share"] is None:
                continue
            print(
                f"  {what}: planned {shares['lowest_planned_share']:.3f} to {shares['highest_planned_share']:.3f} of "
                f"what was taken (1 to {BOUNDS['highest_planned_share']}); more than planned in "
                f"{', '.join(shares['above_planned']) or 'none'}"
            )
        lowest, highest = held["tensors"]["lowest_share"], held["tensors"]["highest_share"]
        if lowest is not None:
            print(f"  vram: tensors and the context took {lowest:.3f} to {highest:.3f} of what was planned")
    for regret in report.summary["regret"]:
        print(
            f"regret {regret['regret']:.1%} (<= {BOUNDS['regret']:.0%}) of {regret['alternatives']} alternatives at "
            f"{regret['setting']}: {regret['seconds_per_image']:.2f} s a picture; {regret['best_alternative']} "
            f"{regret['best_seconds_per_image']:.2f} s"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write down and sum up; 75 if time was up before all was done."""
    options = _options(arguments)
    if options.merge:
        return merge(options)
    clock = Clock(options.minutes)
    allocator.apply(os.environ)  # torch reads it when it is imported
    os.environ["AUTOFLUX_PROMPT_CACHE"] = "off"  # prompts are to be encoded
    from benchmarks.planning_runs import Bench

    try:
        with Bench(tiny=options.tiny, steps=options.steps, direct=options.direct) as bench:
            report = resume(options.json, bench.machine)
            complete = run(bench, options, report, clock)
    except AutofluxError as error:
        return _failed(error)
    report.save(options.json)
    show(report)
    if options.tiny:
        print("\npredictions are for a made-up card and the processor ran them: the figures say nothing")
    if not complete:
        print(f"\ntime was up before all was measured; call again{'' if options.json else ' with --json FILE'}")
    return 0 if complete else 75


def merge(options: argparse.Namespace) -> int:
    """Put rows of several files together, sum them up and write them down."""
    try:
        report = merged(options.merge)
    except AutofluxError as error:
        return _failed(error)
    report.save(options.json)
    show(report)
    return 0


def _failed(error: AutofluxError) -> int:
    print(f"error: {error.message}" + (f"; {error.hint}" if error.hint else ""), file=sys.stderr)
    return error.exit_code


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--caps", type=float, nargs="+", metavar="GB", help="of device memory, the context included")
    parser.add_argument("--steps", type=int, default=4, help="of each of two pictures that are timed")
    parser.add_argument("--regret", type=int, default=0, metavar="N", help="run the N best alternatives too")
    parser.add_argument(
        "--quality", type=Quality, choices=QUALITIES, help="only this (balanced with --regret, else both)"
    )
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="measure nothing, put these together")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows there; those in it are not run again")
    parser.add_argument("--minutes", type=float, help="begin no row that would end later")
    parser.add_argument("--direct", action="store_true", help="spare the copy that a loader makes; quicker")
    parser.add_argument("--quick", action="store_true", help="the most telling rows only")
    parser.add_argument("--tiny", action="store_true", help="a miniature on a made-up card, computed by the processor")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
