"""svd/storage/backend.py: a backend from outside is one file and one row; a location's backend says what it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from svd import storage
from svd.core.errors import UserError
from svd.sources.listing import list_sources
from svd.storage import backend


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setitem(backend.BACKENDS, "mem", "memory_backend:Memory")
    backend.backend_of("mem://bucket").objects.clear()  # type: ignore[attr-defined]
    return "mem://bucket"


def test_a_backend_from_outside_does_everything(memory: str, tmp_path: Path) -> None:
    root = storage.join(memory, "folder")
    storage.write_bytes(f"{root}/a/b.txt", b"0123456789")
    (tmp_path / "file").write_bytes(b"x" * 1000)
    storage.upload(tmp_path / "file", f"{root}/a.txt")
    storage.copy(f"{root}/a/b.txt", f"{root}/copies/c.txt")
    entries = [(e.relative, e.size, e.version) for e in storage.list_files(root)]
    assert [entry[:2] for entry in entries] == [("a.txt", 1000), ("a/b.txt", 10), ("copies/c.txt", 10)]
    assert storage.version(f"{root}/a/b.txt") == entries[1][2] == storage.stored_sha256(f"{root}/a/b.txt")
    assert storage.read_range(f"{root}/a/b.txt", 2, 3) == b"234" and storage.read_bytes(f"{root}/a/b.txt")[8:] == b"89"
    with storage.open_read(f"{root}/a/b.txt", 4) as stream:
        assert stream.seek(-3, 2) == 7 and stream.read() == b"789"
    assert storage.download(f"{root}/a.txt", tmp_path / "back").read_bytes() == b"x" * 1000
    storage.copy(f"{root}/a.txt", tmp_path / "copy")
    storage.copy(tmp_path / "copy", f"{root}/d.txt")
    assert storage.size(f"{root}/d.txt") == 1000 == (tmp_path / "copy").stat().st_size
    assert storage.exists(f"{root}/a.txt") and not storage.exists(root)
    first = storage.replace(f"{root}/lease", b"1", None)
    with pytest.raises(storage.Conflict):
        storage.replace(f"{root}/lease", b"2", None)
    assert storage.replace(f"{root}/lease", b"3", first) != first
    storage.delete(f"{root}/a.txt")
    storage.delete(f"{root}/a.txt")
    assert not storage.exists(f"{root}/a.txt")
    with pytest.raises(FileNotFoundError, match="no such object"):
        storage.download(f"{root}/a.txt", tmp_path / "gone")
    with pytest.raises(UserError, match="expected mem://bucket/key"):
        storage.size("mem:///key")
    with pytest.raises(UserError, match="can't be opened by a browser"):
        storage.link(f"{root}/d.txt")
    assert storage.is_remote(root) and storage.is_address(root) and storage.is_known(root)


def test_what_is_damaged_is_noticed_whatever_the_backend(memory: str, tmp_path: Path) -> None:
    storage.write_bytes(f"{memory}/a", b"whole")
    objects = backend.backend_of(memory).objects  # type: ignore[attr-defined]
    objects[f"{memory}/a"] = b"half", objects[f"{memory}/a"][1]
    with pytest.raises(storage.Truncated, match="4 bytes whose SHA-256 differs"):
        storage.download(f"{memory}/a", tmp_path / "a")
    with pytest.raises(storage.Truncated, match="4 bytes whose SHA-256 differs"):
        storage.read_bytes(f"{memory}/a")
    assert list(tmp_path.iterdir()) == []


def test_sources_come_from_a_backend_that_they_do_not_know(memory: str) -> None:
    storage.write_bytes(f"{memory}/raw/a.mp4", b"first")
    storage.write_bytes(f"{memory}/raw/a.json", b'{"caption": "a cat"}')
    storage.write_bytes(f"{memory}/raw/deep/b.webm", b"second")
    storage.write_bytes(f"{memory}/list.csv", b"uri,caption\nraw/a.mp4,listed\nraw/deep/,deep\n")
    found = list_sources([f"{memory}/raw/"])
    assert [(s.uri, s.size, s.remote) for s in found] == [
        (f"{memory}/raw/a.mp4", 5, True),
        (f"{memory}/raw/deep/b.webm", 6, True),
    ]
    assert found[0].captions[0].text == "a cat"
    listed = list_sources([f"{memory}/list.csv"])
    assert [(s.uri, s.captions[0].text) for s in listed] == [
        (f"{memory}/raw/a.mp4", "listed"),
        (f"{memory}/raw/deep/b.webm", "deep"),
    ]


def test_a_copy_between_two_stores_goes_through_this_machine(memory: str, bucket: str) -> None:
    storage.write_bytes(f"{memory}/a", b"data")
    storage.copy(f"{memory}/a", f"{bucket}/a")
    assert storage.read_bytes(f"{bucket}/a") == b"data"


def test_a_web_address_is_only_read(tmp_path: Path) -> None:
    address = "http://127.0.0.1:1/a.mp4"
    (tmp_path / "file").write_bytes(b"x")
    for write in (
        lambda: storage.upload(tmp_path / "file", address),
        lambda: storage.write_bytes(address, b""),
        lambda: storage.copy(tmp_path / "file", address),
        lambda: storage.copy(address, address),
        lambda: storage.delete(address),
    ):
        with pytest.raises(UserError, match=r"only read; give a path or s3://bucket/key"):
            write()
    with pytest.raises(UserError, match="can't be listed"):
        list(storage.list_files(address))
    assert storage.is_address(address) and not storage.is_remote(address)


def test_the_backend_says_what_a_location_is() -> None:
    for path in ("a/b", "/a/b", "file:///a/b", Path("a"), "a b:c", "ytdl:https://example.org/watch"):
        assert not storage.is_address(path) and storage.is_known(path)
    for unknown in ("gs://bucket/key", "a://b"):
        assert not storage.is_known(unknown) and not storage.is_remote(unknown) and not storage.is_address(unknown)
        with pytest.raises(UserError, match=r"nothing here reads .*give a path, file://, http://, https://, s3://"):
            storage.exists(unknown)
    assert storage.file_name("http://host/a/b.mp4?x=1#y") == "b.mp4"
    assert storage.file_name("s3://bucket/a/b?c.mp4") == "b?c.mp4"
    assert storage.sibling("s3://bucket/a/list.csv", "b/c.mp4") == "s3://bucket/a/b/c.mp4"
    assert storage.sibling("http://host/a/list.csv?x=1", "/c.mp4") == "http://host/c.mp4"


def test_client_libraries_are_imported_by_the_first_location_that_needs_them() -> None:
    code = (
        "import sys; from svd import storage; storage.exists('x'); storage.is_remote('x');"
        "print(sorted({'boto3', 'httpx'} & sys.modules.keys()));"
        "storage.is_remote('s3://b/k'); print(sorted({'boto3', 'httpx'} & sys.modules.keys()))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split("\n")[:2] == ["[]", "['boto3']"]
