"""Clip shards: random access, determinism, rolling, and that any tar reader understands them."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svd.catalogue.shards import ShardWriter, iterate_samples, read_clip_bytes, read_span

Sample = dict[str, bytes]


def write(folder: Path, samples: list[Sample], max_bytes: int) -> list[dict]:
    with ShardWriter(folder, max_bytes) as writer:
        return [writer.add(f"clip{i}", sample) for i, sample in enumerate(samples)]


@settings(max_examples=30, deadline=None)
@given(
    samples=st.lists(st.dictionaries(st.sampled_from(["mp4", "json", "jpg"]), st.binary(max_size=2000), min_size=1)),
    max_bytes=st.integers(1, 6000),
)
def test_every_member_is_read_back_by_range_and_by_streaming(tmp_path_factory, samples, max_bytes):
    folder = tmp_path_factory.mktemp("shards")
    members = write(folder, samples, max_bytes)
    for sample, places in zip(samples, members, strict=True):
        for extension, place in places.items():
            assert read_span(folder / place.shard, place.offset, place.size) == sample[extension]
    names = sorted({place.shard for places in members for place in places.values()})
    streamed = [
        files for name in sorted(names, key=lambda n: (len(n), n)) for _, files in iterate_samples(folder / name)
    ]
    assert streamed == samples
    assert not list(folder.glob(".*"))


def test_bytes_depend_on_contents_only(tmp_path):
    samples = [{"mp4": b"a" * 700, "json": b"{}"}, {"mp4": b"b"}]
    write(tmp_path / "one", samples, 10_000)
    write(tmp_path / "two", [dict(reversed(s.items())) for s in samples], 10_000)
    one, two = ((tmp_path / name / "clips-000000.tar").read_bytes() for name in ("one", "two"))
    assert one == two
    with tarfile.open(tmp_path / "one" / "clips-000000.tar") as tar:
        assert [(m.name, m.mtime, m.uid, m.uname) for m in tar] == [
            ("clip0.json", 0, 0, ""),
            ("clip0.mp4", 0, 0, ""),
            ("clip1.mp4", 0, 0, ""),
        ]


def test_files_are_copied_and_a_failure_publishes_nothing(tmp_path):
    source = tmp_path / "a.mp4"
    source.write_bytes(b"x" * 1500)
    with ShardWriter(tmp_path / "shards", 10_000) as writer:
        place = writer.add("a", {"mp4": source})["mp4"]
    row = {"shard": place.shard, "offset": place.offset, "size": place.size}
    assert read_clip_bytes(tmp_path, row) == source.read_bytes()
    with pytest.raises(ZeroDivisionError), ShardWriter(tmp_path / "broken", 10_000) as writer:
        writer.add("a", {"mp4": b"1"})
        raise ZeroDivisionError
    assert not list((tmp_path / "broken").iterdir())


def test_a_shard_cut_short_is_named(tmp_path):
    write(tmp_path, [{"mp4": b"x" * 3000}], 10_000)
    shard = tmp_path / "clips-000000.tar"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(OSError, match=r"clips-000000\.tar: expected 3000 bytes"):
        read_span(shard, 512, 3000)
