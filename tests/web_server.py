"""A web server of one folder that answers ranged requests, as object stores and content networks do."""

from __future__ import annotations

import base64
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@contextmanager
def serving(folder: Path, ranges: bool = True, login: str = "") -> Iterator[tuple[str, list[int]]]:
    """Serve `folder`; gives the address, and a list that gets the number of bytes of every answer.

    login: `user:password` that it demands.
    """
    expected = f"Basic {base64.b64encode(login.encode()).decode()}" if login else None
    sent: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.headers.get("Authorization") != expected:
                self.send_error(401)
                return
            path = folder / self.path.split("?")[0].strip("/")
            if not path.is_file():
                self.send_error(404)
                return
            data, total = path.read_bytes(), path.stat().st_size
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if ranges else None
            if asked:
                start, end = int(asked[1]), min(int(asked[2] or total), total - 1)
                data = data[start : end + 1]
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{end}/{total}")
            else:
                self.send_response(200)
            sent.append(len(data))
            self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", sent
    finally:
        server.shutdown()
        server.server_close()
