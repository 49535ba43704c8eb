"""What a streamer reports while it runs, and how to read it: waits, copies and computing by unit."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from autoflux.runtime.lanes import Lane, Mark


class Recorder(Protocol):
    """Told when a unit is asked for, has arrived, and has computed, and when its copy begins and ends."""

    def asked(self, index: int, /) -> None: ...

    def began(self, index: int, /) -> None: ...

    def ended(self, index: int, /) -> None: ...

    def sending(self, index: int, /) -> None: ...

    def sent(self, index: int, /) -> None: ...


class Silent:
    """Records nothing and costs nothing."""

    def asked(self, index: int, /) -> None: ...

    def began(self, index: int, /) -> None: ...

    def ended(self, index: int, /) -> None: ...

    def sending(self, index: int, /) -> None: ...

    def sent(self, index: int, /) -> None: ...


SILENT = Silent()


class UnitTimes(NamedTuple):
    """Seconds on the device's clock, from the first mark of the recording."""

    unit: int
    wait_began: float
    compute_began: float
    compute_ended: float
    copy_began: float
    copy_ended: float

    @property
    def waited(self) -> float:
        """Seconds the device had nothing to compute because this unit was not there."""
        return self.compute_began - self.wait_began


class Recording:
    """Keeps marks on the device for the units of the passes since it was made; read it between passes."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._origin = self._mark_computed()
        self._runs: list[tuple[int, tuple[Mark, ...]]] = []
        self._copies: dict[int, tuple[Mark, Mark]] = {}
        self._asked: dict[int, tuple[Mark, ...]] = {}
        self._copy_began = self._origin

    def asked(self, index: int, /) -> None:
        self._asked[index] = (self._mark_computed(),)

    def began(self, index: int, /) -> None:
        self._asked[index] += (self._mark_computed(),)

    def ended(self, index: int, /) -> None:
        # Nothing is known of a unit whose first block was skipped, or that began before the recording did.
        if began := self._asked.pop(index, None):
            # The next copy of this unit has not been asked for, so that the last one is what was used.
            copy = self._copies.get(index, (self._origin, self._origin))
            self._runs.append((index, (*began, self._mark_computed(), *copy)))

    def sending(self, _index: int, /) -> None:
        self._copy_began = self._mark_copied()

    def sent(self, index: int, /) -> None:
        self._copies[index] = (self._copy_began, self._mark_copied())

    def times(self) -> list[UnitTimes]:
        """Every unit that has run, in order; waits until the device has come to the last of them.

        The copies of units that were already there when the recording began are unknown and given as its beginning.
        """
        return [UnitTimes(index, *map(self._seconds, marks)) for index, marks in self._runs]

    def _seconds(self, mark: Mark) -> float:
        mark.synchronize()
        return self._origin.elapsed_time(mark) / 1000

    def _mark_computed(self) -> Mark:
        mark = self._lane.mark(timing=True)
        self._lane.set_computed(mark)
        return mark

    def _mark_copied(self) -> Mark:
        mark = self._lane.mark(timing=True)
        self._lane.set_copied(mark)
        return mark
