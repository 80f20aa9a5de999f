"""User and password in a web address: sent to its host alone, and shown to nobody."""

from __future__ import annotations

import base64
import urllib.request
from email.message import Message
from io import BytesIO
from pathlib import Path

import pytest
from web_server import serving

from svd import storage
from svd.core.errors import UserError
from svd.storage import http

LOGIN = "user:SECRET p@ss"


def test_whole_files_and_ranges_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"0123456789")
    with serving(tmp_path, login=LOGIN) as (address, _):
        place = address.replace("://", "://user:SECRET%20p%40ss@") + "/a.bin?token=SECRET"
        assert storage.download(place, tmp_path / "copy").read_bytes() == b"0123456789"
        assert storage.read_range(place, 2, 3) == b"234"
        for read in (storage.size, lambda wrong: storage.download(wrong, tmp_path / "copy")):
            with pytest.raises(UserError) as caught:
                read(place.replace("user", "other"))
            assert str(caught.value).startswith(f"{address}/a.bin: the server answers 401")
    with pytest.raises(UserError, match=r"^http://host/a b: no valid address"):
        http.download_address("http://host/a b?token=SECRET", tmp_path / "copy")


def test_a_redirect_takes_no_login_along() -> None:
    request = http._request("https://user:SECRET%20p%40ss@host/a?b=1")
    assert request.full_url == "https://host/a?b=1"
    assert request.get_header("Authorization") == f"Basic {base64.b64encode(LOGIN.encode()).decode()}"
    handler = urllib.request.HTTPRedirectHandler()
    again = handler.redirect_request(request, BytesIO(), 302, "", Message(), "https://other/")
    assert again is not None and again.get_header("Authorization") is None
