"""Packs written by the worker while it has nothing to do, so that the next start is a straight read."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable

from autoflux.errors import AutofluxError
from autoflux.hardware.host import read as read_host
from autoflux.models.pack_shelf import Shelf
from autoflux.models.packs import Recipe
from autoflux.models.values import Model
from autoflux.planning.values import Plan
from autoflux.runtime.auto_packing import lacking, used
from autoflux.runtime.priority import lower_priority
from autoflux.units import GIB

LEAST_RAM_BYTES = 2 * GIB
"""Packing holds one weight in three forms, 1 GB for the largest of FLUX.1 (T5's table of words in float32)."""

Make = Callable[[Recipe, Callable[[], None]], object]
"""Writes one pack; calls the function it is given before each piece, which may wait."""

_log = logging.getLogger(__name__)


class Packer:
    """Makes the packs that a plan lacks, in a thread of the lowest priority that stops between two pieces of 16 MiB
    whenever there is something to draw.

    It begins with the first `resume`, and a failure (no room, a cache that cannot be written) ends it with one line in
    the log. What it was about to write goes with its process; nobody takes it for a pack.

    Example::

        packer = Packer(plan, model)
        packer.resume()   # nothing to do
        packer.pause()    # a job has come
    """

    def __init__(self, plan: Plan, model: Model, *, make: Make | None = None) -> None:
        """`make` is for tests; packs are made as `pack_component` does."""
        self._plan, self._model, self._shelf = plan, model, Shelf()
        self._make = make or self._pack
        self._idle = threading.Event()
        self._thread: threading.Thread | None = None

    def resume(self) -> None:
        """There is nothing else to do."""
        self._idle.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="autoflux-packer", daemon=True)
            self._thread.start()

    def pause(self) -> None:
        """Something is to be drawn. The piece that is being written is finished meanwhile."""
        self._idle.clear()

    def join(self) -> None:
        """Wait until all is written, or has failed."""
        if self._thread:
            self._thread.join()

    def _run(self) -> None:
        lower_priority()
        try:
            if wanted := lacking(self._plan, self._model, self._shelf):
                self._make_all(wanted)
        except AutofluxError as error:
            _log.warning("no packs are written: %s", error.message)
        except Exception:  # noqa: BLE001 — pictures can be drawn without
            _log.exception("no packs are written")

    def _make_all(self, wanted: Iterable[Recipe]) -> None:
        # What the model has makes no room for what it lacks: the next start would only write it anew.
        with self._shelf.kept(recipe.key() for recipe in used(self._plan, self._model)):
            for recipe in wanted:
                if (free := read_host().available_bytes.value) < LEAST_RAM_BYTES:
                    _log.warning("no packs are written: only %.1f GB of RAM are free", free / 1e9)
                    return
                self._make(recipe, self._wait)

    def _wait(self) -> None:
        self._idle.wait()

    def _pack(self, recipe: Recipe, wait: Callable[[], None]) -> None:
        from autoflux.runtime.packing import pack_component  # noqa: PLC0415 — imports torch

        pack_component(recipe, self._model, self._shelf, on_bytes=lambda _count, _total: wait())
