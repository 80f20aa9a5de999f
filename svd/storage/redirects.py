"""Where a web server may send us on to: never from the outside into this machine's own network.

An address in a list from elsewhere could otherwise read what only this machine can see: metadata of a cloud's machines,
pages of a router. Who means that sets SVD_PRIVATE_REDIRECTS=1.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import urllib.request
from typing import Any
from urllib.parse import urlsplit

import httpx

from svd.core.errors import UserError


def is_private(host: str) -> bool:
    """Return whether `host` has an address that is not of the public internet; False when it has none at all."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return any(not ipaddress.ip_address(str(item[4][0]).partition("%")[0]).is_global for item in found)


def check_redirect(address: str, target: str) -> None:
    """Raise UserError when `address`, a public one, leads to the private one `target`."""
    here, there = urlsplit(address).hostname or "", urlsplit(target).hostname or ""
    if here == there or os.environ.get("SVD_PRIVATE_REDIRECTS") == "1":
        return
    if is_private(there) and not is_private(here):
        raise UserError(
            f"{address}: leads to '{there}', an address inside this network; if that is meant, set "
            "SVD_PRIVATE_REDIRECTS=1"
        )


class _CheckedRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: urllib.request.Request, *answer: Any) -> urllib.request.Request | None:
        """Check the new address, the last of the arguments, before it is asked."""
        check_redirect(req.full_url, answer[-1])
        return super().redirect_request(req, *answer)


def opener() -> urllib.request.OpenerDirector:
    """Return an opener of web addresses that checks redirects."""
    return urllib.request.build_opener(_CheckedRedirects)


def client(address: str, timeout: float) -> httpx.Client:
    """Return a client for `address` that follows redirects and checks them."""

    def check(request: httpx.Request) -> None:
        check_redirect(address, str(request.url))

    headers = {"User-Agent": "svd-platform"}
    return httpx.Client(follow_redirects=True, timeout=timeout, headers=headers, event_hooks={"request": [check]})
