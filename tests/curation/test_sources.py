"""Where sources come from: folders, globs, lists, tars, remote addresses, sidecars."""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import os
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
from tar_files import write_tar
from web_server import serving

from svd import storage
from svd.core.errors import UserError
from svd.curation.measuring.fetching import local_file
from svd.sources.listing import list_sources
from svd.sources.source import SceneCaption, as_rows


def touch(path, content: bytes = b"video"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def uris(*patterns, root=None):
    return [source.uri for source in list_sources([str(p) for p in patterns], root)]


def test_a_folder_gives_videos_and_unknown_files_but_not_their_companions(tmp_path):
    for name in ("train/b.mp4", "train/a video.MKV", "test/ü.webm", "train/what", ".hidden/c.mp4", "train/.d.mp4"):
        touch(tmp_path / name)
    for name in ("train/b.json", "train/b.srt", "README.md", "train/poster.jpg", "truth.json"):
        touch(tmp_path / name, b"{}")
    found = list_sources([str(tmp_path)], tmp_path)
    assert [(s.uri, s.split) for s in found] == [
        ("test/ü.webm", "test"),
        ("train/a video.MKV", "train"),
        ("train/b.mp4", "train"),
        ("train/what", "train"),
    ]


def test_globs_files_and_overlapping_patterns(tmp_path):
    a, b = touch(tmp_path / "x" / "a.mp4"), touch(tmp_path / "y" / "b[1].mp4")
    assert uris(tmp_path / "*" / "*.mp4", a, tmp_path) == [str(a), str(b)]
    assert uris(b) == [str(b)]
    with pytest.raises(UserError, match="nothing matches"):
        uris(tmp_path / "*.avi")
    with pytest.raises(UserError, match="does not exist"):
        uris(tmp_path / "gone")


ROWS = [
    {"uri": "videos/a.mp4", "caption": "a dog", "licence": "CC0-1.0", "views": "12"},
    {"uri": "s3://bucket/b.mp4", "caption": "", "licence": "", "views": "7"},
]


def write_list(path):
    if path.suffix == ".csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ROWS[0])
            writer.writeheader()
            writer.writerows(ROWS)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        pl.DataFrame(ROWS).write_parquet(path)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_lists_carry_captions_licences_and_other_columns(tmp_path, suffix):
    touch(tmp_path / "footage" / "videos" / "a.mp4")
    path = tmp_path / "footage" / f"list{suffix}"
    write_list(path)
    remote, local = sorted(list_sources([str(path)], tmp_path), key=lambda s: s.remote, reverse=True)
    assert (remote.uri, remote.remote, remote.captions, remote.split) == ("s3://bucket/b.mp4", True, (), "footage")
    assert (local.uri, local.split, local.licence) == ("footage/videos/a.mp4", "footage", "CC0-1.0")
    assert local.captions == (SceneCaption("a dog"),)
    assert local.metadata == {"views": "12"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"name,size\nx,1\n", "row 1 has no address"),
        ("a.jsonl", b"{broken\n", "can't be read as a list"),
        ("a.parquet", b"nothing", "can't be read as a list"),
        ("a.txt", b"\xff\xfe\x00", "can't be read as a list"),
        ("a.tar", b"no tar at all", "not a readable tar"),
    ],
)
def test_a_broken_list_is_named(tmp_path, name, content, message):
    with pytest.raises(UserError, match=rf"{name}: .*{message}"):
        uris(touch(tmp_path / name, content))


def test_a_webdataset_tar_is_read_in_place(tmp_path):
    path = tmp_path / "shard.tar"
    members = {"0001.mp4": b"first video", "0001.txt": b"a cat\n", "0001.json": b'{"license": "MIT", "fps": 3}'}
    members |= {"dir/0002.mp4": b"second"}
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    first, second = list_sources([str(path)], tmp_path)
    assert (first.uri, first.captions, first.licence) == ("shard.tar#0001.mp4", (SceneCaption("a cat"),), "MIT")
    assert first.metadata == {"fps": 3}
    for source, content in ((first, b"first video"), (second, b"second")):
        with local_file(source, tmp_path / "work") as file:
            assert file.read_bytes() == content
    assert not list((tmp_path / "work").iterdir())


@pytest.fixture
def ranged(tmp_path):
    (tmp_path / "served").mkdir(exist_ok=True)
    with serving(tmp_path / "served") as (address, _):
        yield address


@pytest.mark.parametrize("where", ["path", "list", "http", "s3"])
def test_a_tar_that_was_replaced_is_noticed(tmp_path, where, request):
    members = {"0001.mp4": b"first video", "0002.mp4": b"second video"}
    path = write_tar(tmp_path / "served" / "w.tar", members)
    location = str(path)
    if where == "http":
        location = f"{request.getfixturevalue('ranged')}/w.tar"
    elif where == "s3":
        location = f"{request.getfixturevalue('bucket')}/w.tar"
        storage.upload(path, location)
    found = list_sources([location])
    if where == "list":
        written = tmp_path / "list.jsonl"
        written.write_text("".join(json.dumps(row) + "\n" for source in found for row in as_rows(source)))
        found = list_sources([str(written)])
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(local_file(source, tmp_path / "work")) for source in found]
        assert [file.read_bytes() for file in files] == [b"first video", b"second video"]
    write_tar(path, {"0001.mp4": b"first video", "0002.mp4": b"another length", "0003.mp4": b"third video"})
    if where == "s3":
        storage.upload(path, location)
    first, second = found
    with local_file(first, tmp_path / "work") as file:
        assert file.read_bytes() == b"first video"
    with pytest.raises(OSError, match=r"w\.tar: it is another tar than .* list the sources again"):
        local_file(second, tmp_path / "work").__enter__()


def test_a_tar_that_was_copied_or_touched_is_the_same(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"0001.mp4": b"first video"})
    (source,) = list_sources([str(path)])
    path.write_bytes(path.read_bytes())
    os.utime(path, (1, 1))
    with local_file(source, tmp_path / "work") as file:
        assert file.read_bytes() == b"first video"


@pytest.mark.parametrize("name", ["a.tar.gz", "b.TGZ", "c.tar.zst"])
def test_a_compressed_tar_is_refused(tmp_path, name, server):
    path = touch(tmp_path / "in" / name)
    (tmp_path / "list.txt").write_text(f"in/{name}\n")
    (tmp_path / "remote.txt").write_text(f"{server}/{name}?token=1\n")
    wanted = [path, path.parent, tmp_path / "list.txt", tmp_path / "remote.txt", f"{server}/{name}"]
    for pattern in wanted:
        with pytest.raises(UserError, match=rf"{name}.* is a compressed tar, .* decompress it"):
            uris(pattern)


def test_sidecars(tmp_path):
    touch(tmp_path / "a.mp4")
    scenes = [{"start": 0, "end": 2.5, "caption": "one \ud800"}, {"start_seconds": 2.5, "caption": "two"}, {"end": 1}]
    touch(tmp_path / "a.json", json.dumps({"scenes": scenes, "licence": "CC0-1.0", "origin": "x"}).encode())
    touch(tmp_path / "b.mp4")
    touch(tmp_path / "b.json", b"not json")
    a, b = list_sources([str(tmp_path)])
    assert a.captions == (SceneCaption("one \\ud800", 0, 2.5), SceneCaption("two", 2.5))
    assert (a.licence, a.metadata) == ("CC0-1.0", {"origin": "x"})
    assert b.captions == () and "b.json" in b.metadata["sidecar_error"]


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    touch(folder / "a.mp4", b"bytes over http")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{httpd.server_address[1]}"
    (folder / "list.txt").write_text(f"{address}/a.mp4\n\n{address}/missing.mp4\n")
    yield address
    httpd.shutdown()


def test_http_addresses_and_lists_are_fetched(server, tmp_path):
    good, missing = list_sources([f"{server}/list.txt"])
    with local_file(good, tmp_path / "work") as file:
        assert file.read_bytes() == b"bytes over http"
        assert file.parent.parent == tmp_path / "work"
    with pytest.raises(OSError, match="404"), local_file(missing, tmp_path / "work"):
        pass
    with pytest.raises(UserError, match="can't be fetched"):
        list_sources([f"{server}/nothing.csv"])


def test_an_endless_stream_is_given_up(tmp_path, monkeypatch):
    class Endless(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(bytes(1 << 16))

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    (source,) = list_sources([f"http://127.0.0.1:{httpd.server_address[1]}/live.mp4"])
    with monkeypatch.context() as patched:
        patched.setattr("svd.curation.measuring.fetching.MAX_BYTES", 3_000_000)
        with pytest.raises(UserError, match="more than 3 MB"), local_file(source, tmp_path):
            pass
    monkeypatch.setattr("svd.curation.measuring.fetching.MAX_SECONDS", 0.1)
    with pytest.raises(UserError, match="does not come to an end"), local_file(source, tmp_path):
        pass
    httpd.shutdown()
    assert not list(tmp_path.iterdir())


def test_a_prefix_and_a_list_in_s3(bucket, tmp_path):
    storage.write_bytes(f"{bucket}/raw/a.mp4", b"first")
    storage.write_bytes(f"{bucket}/raw/deep/b.webm", b"second")
    storage.write_bytes(f"{bucket}/raw/a.json", b"{}")
    row = {"url": f"{bucket}/raw/a.mp4", "caption": "a dog", "score": 0.5}
    storage.write_bytes(f"{bucket}/list.jsonl", json.dumps(row).encode())
    found = list_sources([f"{bucket}/raw"])
    assert [s.uri for s in found] == [f"{bucket}/raw/a.mp4", f"{bucket}/raw/deep/b.webm"]
    with local_file(found[1], tmp_path) as file:
        assert file.read_bytes() == b"second"
    (listed,) = list_sources([f"{bucket}/list.jsonl"])
    assert (listed.uri, listed.captions) == (f"{bucket}/raw/a.mp4", (SceneCaption("a dog"),))
    assert listed.metadata == {"score": 0.5}


def test_yt_dlp_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yt_dlp", None)
    (source,) = list_sources(["ytdl:https://example.org/watch?v=1"])
    with pytest.raises(UserError, match=r"svd-platform\[youtube\]"), local_file(source, tmp_path):
        pass


def test_yt_dlp_fetches_into_the_work_folder(tmp_path, monkeypatch):
    class Error(Exception):
        pass

    class Downloader:
        def __init__(self, options):
            self.target = options["outtmpl"] % {}

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *error: None  # noqa: E731

        def download(self, addresses):
            if "gone" in addresses[0]:
                raise Error("Video unavailable")
            Path(self.target).write_bytes(addresses[0].encode())

    module = SimpleNamespace(YoutubeDL=Downloader, utils=SimpleNamespace(DownloadError=Error))
    monkeypatch.setitem(sys.modules, "yt_dlp", module)
    good, gone = list_sources(["ytdl:https://example.org/a", "ytdl:https://example.org/gone"])
    with local_file(good, tmp_path / "50%") as file:
        assert file.read_bytes() == b"https://example.org/a"
    with pytest.raises(OSError, match="yt-dlp: Video unavailable"), local_file(gone, tmp_path / "50%"):
        pass
    assert not list((tmp_path / "50%").iterdir())
