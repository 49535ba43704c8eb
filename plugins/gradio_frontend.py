"""The frontend `gradio`: a page with a prompt, real progress and the pictures."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, ClassVar

import autoflux

if TYPE_CHECKING:
    from collections.abc import Callable


class GradioFrontend:
    """Offers the page of `gradio_page`."""

    name: ClassVar[str] = "gradio"
    description: ClassVar[str] = "a web page: prompt, progress, pictures"

    def missing(self) -> str | None:
        return None if importlib.util.find_spec("gradio") else "pip install 'autoflux[gradio]'"

    def build(self, desk: autoflux.Desk) -> autoflux.AsgiApp:
        # Read while gradio is imported: nothing is sent anywhere.
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        from .gradio_page import make_page_app  # noqa: PLC0415 — imports gradio, which takes seconds

        return make_page_app(desk)


@autoflux.hookimpl
def register_frontends(register: Callable[[autoflux.Frontend], None]) -> None:
    register(GradioFrontend())
