"""A drawn picture and its PNG file with everything needed to draw it again."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from autoflux import __version__
from autoflux.models.request import Request

if TYPE_CHECKING:
    from PIL.Image import Image


COMPRESSION = 4
"""zlib's level. Noise of many scales, 1024x1024, takes 0.27 s on one EPYC, at the usual 6 0.76 s and 3 % more bytes."""


@dataclass(frozen=True)
class Picture:
    """One picture, the request it answers, and how long it took.

    `image` is RGB; `seconds` is its share of the time from the start of the encode to the end of the decode of
    the pictures it was drawn with.
    """

    image: Image
    request: Request
    model: str
    revision: str
    seconds: float
    warnings: tuple[str, ...] = ()

    def png(self) -> bytes:
        """The PNG file with an A1111 `parameters` text chunk and an `autoflux` JSON chunk."""
        from PIL.PngImagePlugin import PngInfo  # noqa: PLC0415 — keeps PIL out of light starts

        info = PngInfo()
        info.add_itxt("parameters", parameters_text(self.request, self.model))
        info.add_itxt("autoflux", metadata_json(self.request, self.model, self.revision))
        file = io.BytesIO()
        self.image.save(file, "png", pnginfo=info, compress_level=COMPRESSION)
        return file.getvalue()


def png_files(pictures: Sequence[Picture]) -> Iterator[bytes]:
    """The file of each, in their order, made side by side: a device waits for it, and zlib lets other threads compute.

    Four of 1024x1024 take 0.44 s instead of 0.84 on two cores.
    """
    with ThreadPoolExecutor(max(1, min(len(pictures), os.cpu_count() or 1))) as pool:
        yield from pool.map(lambda picture: picture.png(), pictures)


def parameters_text(request: Request, model: str) -> str:
    """What the A1111 web UI writes and most tools read: the prompt, then `Key: value` pairs on the last line."""
    pairs = {
        "Steps": str(request.steps),
        "Sampler": "Euler",
        "Schedule type": "Simple",
        "CFG scale": "1",
        "Distilled CFG Scale": f"{request.guidance:g}",
        "Seed": str(request.seed),
        "Size": f"{request.width}x{request.height}",
        "Model": model,
        "Version": f"autoflux {__version__}",
    }
    return request.prompt + "\n" + ", ".join(f"{key}: {_quoted(value)}" for key, value in pairs.items())


def metadata_json(request: Request, model: str, revision: str) -> str:
    """The request as autoflux reads it back. Holds no path and no host name."""
    content = {"schema": 1, "version": __version__, "model": model, "revision": revision, "request": request}
    return msgspec.json.encode(content).decode()


def read_request(png: bytes) -> Request | None:
    """The request that a PNG of ours was drawn from; None for other files.

    Raises:
        OSError: not a picture.
    """
    from PIL import Image  # noqa: PLC0415

    with Image.open(io.BytesIO(png)) as image:
        text = image.info.get("autoflux")
    if text is None:
        return None
    try:
        return msgspec.convert(msgspec.json.decode(str.__str__(text))["request"], Request)
    except (msgspec.MsgspecError, KeyError, TypeError):
        return None


def _quoted(value: str) -> str:
    return msgspec.json.encode(value).decode() if any(c in value for c in ',:\n"') else value
