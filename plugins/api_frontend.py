"""The frontend `api`: jobs over HTTP and JSON. The server has it at `/api`, whatever other frontends there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import autoflux

if TYPE_CHECKING:
    from collections.abc import Callable


class ApiFrontend:
    """Offers the routes of `api_routes`."""

    name: ClassVar[str] = "api"
    description: ClassVar[str] = "jobs, events and pictures over HTTP and JSON, always at /api"

    def missing(self) -> str | None:
        return None

    def build(self, desk: autoflux.Desk) -> autoflux.AsgiApp:
        from .api_routes import make_api  # noqa: PLC0415 — imports starlette, which only a server needs

        return make_api(desk)


@autoflux.hookimpl
def register_frontends(register: Callable[[autoflux.Frontend], None]) -> None:
    register(ApiFrontend())
