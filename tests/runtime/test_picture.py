"""Files of pictures that were drawn together."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import pytest
from PIL import Image

from autoflux.models.request import Request
from autoflux.runtime.picture import Picture, png_files, read_request


def picture(seed: int) -> Picture:
    request = Request(prompt="a", seed=seed, steps=1, guidance=3.5, width=64, height=64)
    return Picture(Image.new("RGB", (64, 64), (seed, 0, 0)), request, "fake", "fake", 1.0)


def test_files_come_in_the_order_of_their_pictures():
    pictures = [picture(seed) for seed in range(9)]
    files = list(png_files(pictures))
    assert files == [one.png() for one in pictures]
    assert [read_request(file) for file in files] == [one.request for one in pictures]
    assert list(png_files([])) == []


@dataclass(frozen=True)
class Together(Picture):
    """Its file is only made while that of another is."""

    barrier: threading.Barrier = field(kw_only=True)

    def png(self) -> bytes:
        self.barrier.wait(60)
        return super().png()


def test_files_are_made_side_by_side(monkeypatch):
    monkeypatch.setattr("autoflux.runtime.picture.os.cpu_count", lambda: 2)
    barrier = threading.Barrier(2)
    pictures = [Together(**vars(picture(seed)), barrier=barrier) for seed in range(2)]
    assert len(list(png_files(pictures))) == 2


def test_a_file_that_cannot_be_made_is_told(monkeypatch):
    broken = picture(1)
    monkeypatch.setattr(Image.Image, "save", lambda *_args, **_kwargs: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        list(png_files([broken]))
