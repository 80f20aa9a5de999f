"""The hub client against a local server that speaks the hub's protocol: listing, redirects, ranges, hashes, errors."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from typer.testing import CliRunner

from flows.cli.app import app
from svd.core.errors import UserError
from svd.model.formats.hub import fetch_repository, resolve_weights

WEIGHTS = save({"a": torch.rand(64, 64)})
FILES = {
    "model.safetensors": WEIGHTS,
    "config.json": b"{}",
    "README.md": b"# hello",
    "model.bin": b"pickle",
    "cut.safetensors": WEIGHTS[:-10],
}
FOLDERS = {f"{part}/{name}": content for part in ("unet", "vae") for name, content in list(FILES.items())[:2]}
COMMIT, PUSHED = "0" * 40, "1" * 40


class Hub(BaseHTTPRequestHandler):
    """`ann/model` is public, `ann/gated` is gated, everything else unknown. Requests are kept in `server.requests`.

    `ann/model-parts` has folders. Where `server.pushes`, someone pushes another commit to `main` after each request.
    """

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def answer(self, status: int, body: bytes = b"", length: str = "", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", length or str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.requests.append((self.command, self.path, dict(self.headers)))  # type: ignore[attr-defined]
        if "/gated" in self.path:
            return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="gated")
        if "ann/model" not in self.path:
            return self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="no")
        if "/nowhere" in self.path:
            return self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="no")
        if self.path.startswith("/api/"):
            names = FOLDERS if "-parts" in self.path else FILES
            listing = {"id": "ann/model", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            return self.answer(200, json.dumps(listing).encode(), Content_Type="application/json")
        content = FILES.get(self.path.rsplit("/", 1)[-1])
        if self.server.pushes and "/main/" in self.path and len(self.server.requests) > 1:  # type: ignore[attr-defined]
            return self.answer(200, b"pushed", X_Repo_Commit=PUSHED, ETag=f'"{PUSHED}"')
        if content is None:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message="no")
        storage = self.server.storage  # type: ignore[attr-defined]
        if storage is None:
            return self.content(content)
        storage.signed += 1
        place = f"http://localhost:{storage.server_port}/{storage.signed}/model.safetensors"
        etag = {"X_Linked_ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X_Linked_Size": str(len(content))}
        return self.answer(302, Location=place, X_Repo_Commit=COMMIT, **etag)

    def broken(self, content: bytes, span: str | None, etag: dict[str, str]) -> None:
        """Sends 3,000 bytes of the rest and hangs up."""
        self.server.breaks -= 1  # type: ignore[attr-defined]
        start = int(span.removeprefix("bytes=").split("-")[0]) if span else 0
        extra = {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if span else {}
        self.answer(
            206 if span else 200, content[start : start + 3000], length=str(len(content) - start), **extra, **etag
        )
        self.close_connection = True

    def content(self, content: bytes) -> None:
        etag = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X_Repo_Commit": COMMIT}
        span = self.headers.get("Range")
        if self.command == "GET" and self.server.breaks:  # type: ignore[attr-defined]
            return self.broken(content, span, etag)
        if span and span.startswith("bytes=") and self.command == "GET":
            start = int(span.removeprefix("bytes=").split("-")[0])
            ranged = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self.answer(206, content[start:], Content_Range=ranged, **etag)
        return self.answer(200, content, Accept_Ranges="bytes", **etag)


class Storage(Hub):
    """Where a hub redirects to: an address serves one transfer, of which the first ones break; then it has expired."""

    def do_GET(self) -> None:
        self.server.requests.append((self.command, self.path, dict(self.headers)))  # type: ignore[attr-defined]
        if self.path in [path for _, path, _ in self.server.requests[:-1]]:  # type: ignore[attr-defined]
            return self.answer(403, b"Request has expired")
        return self.content(WEIGHTS)


@pytest.fixture
def storage(hub: ThreadingHTTPServer) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Storage)
    server.requests, server.breaks, server.signed = [], 0, 0  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    hub.storage = server  # type: ignore[attr-defined]
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests, server.breaks, server.storage, server.pushes = [], 0, None, False  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


def message(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_everything_but_pickles_and_prose_is_fetched(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    names = ["config.json", "model.safetensors"]
    paths = fetch_repository(
        "ann/model", tmp_path, filenames=names, sha256={"model.safetensors": hashlib.sha256(WEIGHTS).hexdigest()}
    )
    assert [path.name for path in paths] == names
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS
    with pytest.raises(UserError, match=r"cut\.safetensors: cut short"):
        fetch_repository("ann/model", tmp_path)
    assert not (tmp_path / "cut.safetensors").exists()
    assert not (tmp_path / "model.bin").exists()
    assert not (tmp_path / "README.md").exists()


def test_the_token_is_sent(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    fetch_repository("ann/model", tmp_path, filenames=["config.json"], token="hf_secret")
    assert all(headers.get("authorization") == "Bearer hf_secret" for _, _, headers in lower(hub.requests))


def lower(requests: list) -> list:
    return [(verb, path, {k.lower(): v for k, v in headers.items()}) for verb, path, headers in requests]


def test_a_broken_download_goes_on_where_it_stopped(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    fetch_repository("ann/model", tmp_path / "first", filenames=["model.safetensors"])
    (tmp_path / "second").mkdir()
    key = hashlib.sha256(WEIGHTS).hexdigest()[:16]
    (tmp_path / "second" / f".model.safetensors.{key}.part").write_bytes(WEIGHTS[:5000])
    hub.requests.clear()
    (path,) = fetch_repository("ann/model", tmp_path / "second", filenames=["model.safetensors"])
    assert path.read_bytes() == WEIGHTS
    ranges = [headers["range"] for verb, _, headers in lower(hub.requests) if verb == "GET" and "range" in headers]
    assert "bytes=5000-" in ranges


def test_a_connection_that_breaks_is_taken_up_again(
    hub: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svd.model.formats.hub.BACKOFF", 0.0)
    hub.breaks = 2  # type: ignore[attr-defined]
    (path,) = fetch_repository("ann/model", tmp_path, filenames=["model.safetensors"])
    assert path.read_bytes() == WEIGHTS
    ranges = [headers["range"] for verb, _, headers in lower(hub.requests) if verb == "GET" and "range" in headers]
    assert ranges == ["bytes=3000-", "bytes=6000-"]


def test_the_token_stays_with_the_hub_and_every_attempt_asks_it_anew(
    hub: ThreadingHTTPServer, storage: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svd.model.formats.hub.BACKOFF", 0.0)
    storage.breaks = 2  # type: ignore[attr-defined]
    (path,) = fetch_repository("ann/model", tmp_path, filenames=["model.safetensors"], token="hf_secret")
    assert path.read_bytes() == WEIGHTS
    seen = lower(storage.requests)  # type: ignore[attr-defined]
    assert [headers.get("range") for _, _, headers in seen] == [None, "bytes=3000-", "bytes=6000-"]
    assert not any("authorization" in headers for _, _, headers in seen)
    asked = lower(hub.requests)  # type: ignore[attr-defined]
    assert [headers.get("authorization") for _, _, headers in asked] == ["Bearer hf_secret"] * 4


def test_a_fetched_file_is_not_fetched_again(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    fetch_repository("ann/model", tmp_path, filenames=["model.safetensors"])
    hub.requests.clear()
    fetch_repository("ann/model", tmp_path, filenames=["model.safetensors"])
    assert not [request for request in hub.requests if request[0] == "GET"]


@pytest.mark.parametrize("filenames", [None, ["model.safetensors", "config.json"]])
def test_all_files_are_of_one_commit_though_others_push(
    hub: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, filenames: list[str] | None
) -> None:
    monkeypatch.delitem(FILES, "cut.safetensors")
    hub.pushes = True  # type: ignore[attr-defined]
    paths = fetch_repository("ann/model", tmp_path, filenames=filenames)
    assert sorted(path.name for path in paths) == ["config.json", "model.safetensors"]
    assert all(path.read_bytes() == FILES[path.name] for path in paths)
    record = json.loads((tmp_path / "fetched.json").read_text())
    assert record == {path.name: {"repository": "ann/model", "commit": COMMIT} for path in paths}
    fetch_repository("ann/model", tmp_path, filenames=["README.md"], revision=PUSHED)
    record = json.loads((tmp_path / "fetched.json").read_text())
    assert len(record) == 3 and record["config.json"]["commit"] == COMMIT


def test_a_small_file_of_another_commit_is_fetched_again(
    hub: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same size; the hub states git's hash of files that aren't large."""
    monkeypatch.setattr(Hub, "content", small_content)
    (tmp_path / "config.json").write_bytes(b"[]")
    (path,) = fetch_repository("ann/model", tmp_path, filenames=["config.json"])
    assert path.read_bytes() == b"{}"
    hub.requests.clear()
    fetch_repository("ann/model", tmp_path, filenames=["config.json"])
    assert [verb for verb, _, _ in hub.requests] == ["HEAD"]


def small_content(self: Hub, content: bytes) -> None:
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    self.answer(200, content, ETag=f'"{blob}"', X_Repo_Commit=COMMIT)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--include", "unet/*"], ["unet/config.json", "unet/model.safetensors"]),
        (["--include", "vae/*.json", "--include", "*.safetensors"],
         ["unet/model.safetensors", "vae/config.json", "vae/model.safetensors"]),
        (["--include", "vae/*", "--file", "unet/config.json"],
         ["unet/config.json", "vae/config.json", "vae/model.safetensors"]),
        ([], sorted(FOLDERS)),
    ],
)  # fmt: skip
def test_patterns_choose_files(
    hub: ThreadingHTTPServer, tmp_path: Path, options: list[str], expected: list[str]
) -> None:
    result = CliRunner().invoke(app, ["fetch", "ann/model-parts", str(tmp_path), *options])
    assert result.exit_code == 0, result.output
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert sorted(found - {"fetched.json"}) == expected
    assert sorted(result.stdout.split()) == [str(tmp_path / name) for name in expected]


def test_a_wrong_hash_leaves_no_file(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="wrong sha256") as error:
        fetch_repository("ann/model", tmp_path, filenames=["model.safetensors"], sha256={"model.safetensors": "1" * 64})
    message(error)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("repository", "options", "expected"),
    [
        ("ann/gated", {"filenames": ["model.safetensors"]}, "ann/gated/model.safetensors: gated; accept its licence"),
        ("bob/none", {}, "bob/none: no such repository"),
        ("ann/model", {"filenames": ["none.safetensors"]}, "no such file in this repository"),
        ("ann/model", {"revision": "nowhere"}, "no revision 'nowhere'"),
        ("ann/model", {"include": ["*.json", "vae/*"]}, "fits 'vae/*'; it has config.json, cut.safetensors, model.saf"),
        ("ann/model", {"filenames": ["model.bin"]}, "pickled checkpoints can run code and are refused"),
        ("a b/c/d", {"filenames": ["x.safetensors"]}, "not a repository name"),
        ("ann/model", {"endpoint": "http://127.0.0.1:9", "filenames": ["x.safetensors"]}, "can't be reached"),
    ],
)
def test_errors_are_one_line(
    hub: ThreadingHTTPServer, tmp_path: Path, repository: str, options: dict, expected: str
) -> None:
    with pytest.raises(UserError) as error:
        fetch_repository(repository, tmp_path, **options)
    assert expected in message(error)


def test_resolve_takes_paths_and_repositories(
    hub: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SVD_CACHE", str(tmp_path / "cache"))
    assert resolve_weights(str(tmp_path)) == tmp_path
    folder = resolve_weights("ann/model", filenames=["config.json"])
    assert folder == tmp_path / "cache" / "ann--model"
    assert (folder / "config.json").is_file()
    for name in ("/no/such/file", "weights.safetensors", "a/b/c", "./x/y"):
        with pytest.raises(UserError, match="no such file or folder"):
            resolve_weights(name)


def test_a_repository_in_the_cache_stays_at_its_commit_and_needs_no_hub(
    hub: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SVD_CACHE", str(tmp_path))
    hub.pushes = True  # type: ignore[attr-defined]
    resolve_weights("ann/model", ["config.json"])
    hub.requests.clear()
    assert resolve_weights("ann/model", ["config.json"]) == tmp_path / "ann--model"
    assert hub.requests == []
    resolve_weights("ann/model", ["model.safetensors", "config.json"])
    assert all(f"/{COMMIT}/" in path for _, path, _ in hub.requests)
    (tmp_path / "ann--model/config.json").unlink()
    resolve_weights("ann/model", ["config.json"])
    assert (tmp_path / "ann--model/config.json").read_bytes() == b"{}"
