"""Which names a page answers to: none that another site could point at this machine (DNS rebinding)."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence

from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse


def is_own_host(host: str, names: Sequence[str] = ()) -> bool:
    """Return whether a request to `host` is meant for this machine: an address, localhost, its name, or in `names`."""
    try:
        ipaddress.ip_address(host.strip("[]"))
        return True
    except ValueError:
        return host.lower() in {"localhost", socket.gethostname().lower(), *(name.lower() for name in names)}


def refuse_foreign_hosts(app: FastAPI, names: Sequence[str] = ()) -> None:
    """Let `app` answer 421 to requests for other hosts than this machine and `names`."""

    @app.middleware("http")
    async def check(request: Request, forward: Callable[[Request], Awaitable[Response]]) -> Response:
        host = request.url.hostname or ""
        if is_own_host(host, names):
            return await forward(request)
        return PlainTextResponse(f"this page is not served under the name '{host}'", status_code=421)
