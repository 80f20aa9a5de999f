"""What lies behind what a user names: the same for the dry run, which lists it, and the run, which gathers it first."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tar_files import write_tar
from web_server import serving

from svd import storage
from svd.core.errors import UserError
from svd.curation.measuring.fetching import local_file
from svd.sources.listing import list_sources
from svd.sources.source import SceneCaption, Source
from svd.sources.stage import gather_footage

VIDEO = bytes(range(256)) * 2000  # much more than the headers beside it


def webdataset(path: Path) -> Path:
    return write_tar(
        path,
        {
            **{"a/1.mp4": VIDEO, "a/1.json": b'{"license": "MIT", "fps": 3}', "a/1.txt": b"a cat\n"},
            **{"c.video.mp4": VIDEO[::-1], "c.txt": b"two dots", "._c.mp4": b"of another system"},
        },
    )


def describe(sources: list[Source], base: str = "") -> dict[str, Any]:
    """What is known of each source by its place, without `base` in front of it."""
    members = ["#" + source.uri.partition("#")[2] if source.archive else "" for source in sources]
    places = [
        s.uri if s.path is None else f"{s.path.absolute()}{member}" for s, member in zip(sources, members, strict=True)
    ]
    facts = [(source.captions, source.licence, dict(source.metadata)) for source in sources]
    return {place.removeprefix(base): fact for place, fact in zip(places, facts, strict=True)}


def gathered(patterns: list[Any], folder: Path, copied_bytes: int = 0) -> list[Source]:
    """What the stage `curation` sees of what the stage `sources` has gathered."""
    gather_footage([str(pattern) for pattern in patterns], folder / "footage", copied_bytes)
    return list_sources([str(folder / "footage")], folder)


def both(patterns: list[Any], folder: Path) -> dict[str, Any]:
    """What dry run and run agree on."""
    listed = list_sources([str(pattern) for pattern in patterns])
    assert describe(gathered(patterns, folder)) == describe(listed)
    return describe(listed)


def content(source: Source, folder: Path) -> bytes:
    with local_file(source, folder / "fetched") as file:
        return file.read_bytes()


def test_lists_at_web_addresses_are_read_as_lists(tmp_path: Path) -> None:
    served = tmp_path / "served"
    served.mkdir()
    (served / "l.csv").write_text("uri,caption\nsub/a.mp4,one\ns3://b/c.mp4,two\n")
    with serving(served) as (address, _):
        found = both([f"{address}/l.csv?token=x.y"], tmp_path / "out")
    one, two = (SceneCaption("one"),), (SceneCaption("two"),)
    assert found == {f"{address}/sub/a.mp4": (one, None, {}), "s3://b/c.mp4": (two, None, {})}


def test_remote_lists_name_no_files_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text("file:///etc/passwd\n")
    with serving(tmp_path) as (address, _), pytest.raises(UserError, match="can't be read; give s3"):
        list_sources([f"{address}/l.txt"])


@pytest.mark.parametrize("copied_bytes", [0, 10**9])
def test_folders_keep_sidecars_lists_and_tars_whether_copied_or_not(tmp_path: Path, copied_bytes: int) -> None:
    folder = tmp_path / "in"
    (folder / "videos").mkdir(parents=True)
    for name in "abc":
        (folder / "videos" / f"{name}.mp4").write_bytes(name.encode())
    scenes = [{"start": 1, "end": 2.5, "caption": "scene"}, {"caption": "rest", "start": 3}]
    (folder / "videos/a.json").write_text(json.dumps({"caption": "whole", "scenes": scenes, "licence": "CC0", "n": 1}))
    (folder / "metadata.csv").write_text("file,text,id\nvideos/b.mp4,from the list,007\n")
    (folder / "README.md").write_text("about")
    webdataset(folder / "w.tar")
    found = gathered([folder], tmp_path / "out", copied_bytes)
    base = f"{tmp_path}/out/footage/in/" if copied_bytes else f"{folder}/"
    whole = (SceneCaption("whole"), SceneCaption("scene", 1, 2.5), SceneCaption("rest", 3))
    assert describe(found, base) == {
        "videos/a.mp4": (whole, "CC0", {"n": 1}),
        "videos/b.mp4": ((SceneCaption("from the list"),), None, {"id": "007"}),
        "videos/c.mp4": ((), None, {}),
        "w.tar#a/1.mp4": ((SceneCaption("a cat"),), "MIT", {"fps": 3}),
        "w.tar#c.video.mp4": ((SceneCaption("two dots"),), None, {}),
    }
    assert {source.split for source in found} == {"footage"}
    assert [content(s, tmp_path) for s in found] == [b"a", b"b", b"c", VIDEO, VIDEO[::-1]]
    assert describe(found, base) == describe(list_sources([str(folder)]), f"{folder}/")


def test_a_folder_whose_list_points_elsewhere_is_listed(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "x.mp4").write_bytes(b"x")
    (folder / "list.jsonl").write_text('{"uri": "../x.mp4"}\n')
    (found,) = gathered([folder], tmp_path / "out", 10**9)
    assert content(found, tmp_path) == b"x"


@pytest.mark.parametrize("copied_bytes", [0, 10**9])
def test_tars_named_by_themselves(tmp_path: Path, copied_bytes: int) -> None:
    found = gathered([webdataset(tmp_path / "w.tar")], tmp_path / "out", copied_bytes)
    assert [content(source, tmp_path) for source in found] == [VIDEO, VIDEO[::-1]]
    assert [source.captions[0].text for source in found] == ["a cat", "two dots"]


def test_tars_folders_and_nothing_in_a_list(tmp_path: Path) -> None:
    webdataset(tmp_path / "w.tar")
    (tmp_path / "vids").mkdir()
    (tmp_path / "vids/a.mp4").write_bytes(b"a")
    (tmp_path / "l.csv").write_text("uri,licence,caption\nw.tar,CC-BY,\nvids,CC0,mine\ngone.mp4,,\n")
    found = both([tmp_path / "l.csv"], tmp_path / "out")
    members = [s.uri for s in gathered([tmp_path / "l.csv"], tmp_path / "again") if s.archive]
    assert members == [f"{tmp_path}/w.tar#a/1.mp4", f"{tmp_path}/w.tar#c.video.mp4"]
    mine, cat, dots = (SceneCaption("mine"),), (SceneCaption("a cat"),), (SceneCaption("two dots"),)
    assert {name.removeprefix(f"{tmp_path}/"): facts[:2] for name, facts in found.items()} == {
        **{"gone.mp4": ((), None), "vids/a.mp4": (mine, "CC0")},
        **{"w.tar#a/1.mp4": (cat, "CC-BY"), "w.tar#c.video.mp4": (dots, "CC-BY")},
    }


def test_values_of_lists_are_kept(tmp_path: Path) -> None:
    when = datetime.datetime(2020, 1, 2, 3, 4, 5)
    columns = {"uri": ["a.mp4"], "when": [when], "raw": [b"x"], "bytes": [b"\xff\x00"], "n": [7], "no": [float("nan")]}
    pq.write_table(pa.table(columns), tmp_path / "l.parquet")
    (found,) = both([tmp_path / "l.parquet"], tmp_path / "parquet").values()
    assert found[2] == {"when": "2020-01-02T03:04:05", "raw": "x", "bytes": "/wA=", "n": 7}
    (tmp_path / "l.csv").write_text("uri,id,score\na.mp4,007,0.50\n")
    (found,) = both([tmp_path / "l.csv"], tmp_path / "csv").values()
    assert found[2] == {"id": "007", "score": "0.50"}
    (tmp_path / "l.jsonl").write_text('{"uri": "a.mp4", "n": 1}\n{"uri": "b.mp4", "n": "1", "tags": ["q", 2]}\n')
    first, second = both([tmp_path / "l.jsonl"], tmp_path / "jsonl").values()
    assert (first[2], second[2]) == ({"n": 1}, {"n": "1", "tags": ["q", 2]})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("latin.txt", b"caf\xe9.mp4\n", "can't be read as a list"),
        ("more.csv", b"uri,n\na.mp4,1,2\n", "row 1 has more fields than the header"),
        ("numbers.jsonl", b"3\n", "row 1 is no JSON object"),
        ("wide.csv", b"uri\n" + b"a" * 200_000 + b"\n", "field larger"),
        ("column.jsonl", b'{"path": 3}\n', "row 1 has no address"),
        ("gs.txt", b"gs://bucket/a.mp4\n", "gs:// can't be read"),
        ("broken.tar", b"no tar at all", "not a readable tar"),
    ],
)
def test_mistakes_in_lists_are_one_line_for_run_and_dry_run(
    tmp_path: Path, name: str, text: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(text)
    for look in (lambda: list_sources([str(tmp_path / name)]), lambda: gathered([tmp_path / name], tmp_path / "out")):
        with pytest.raises(UserError, match=message) as caught:
            look()
        assert "\n" not in str(caught.value) and (name in str(caught.value) or "gs://bucket" in str(caught.value))


def test_tars_at_web_addresses_are_indexed_and_read_by_ranges(tmp_path: Path) -> None:
    served = tmp_path / "served"
    served.mkdir()
    webdataset(served / "w.tar")
    (served / "l.txt").write_text("w.tar\n")
    with serving(served) as (address, sent):
        found = gathered([f"{address}/w.tar"], tmp_path / "out")
        assert sum(sent) < len(VIDEO) / 4, "headers and texts alone"
        assert describe(found) == describe(list_sources([f"{address}/l.txt"]))
        assert [s.captions[0].text for s in found] == ["a cat", "two dots"] and found[0].licence == "MIT"
        assert [content(source, tmp_path) for source in found] == [VIDEO, VIDEO[::-1]]
        with (served / "w.tar").open("r+b") as stream:
            stream.truncate(found[1].offset + 100)
        with pytest.raises(OSError, match="cut short"):
            content(found[1], tmp_path)
        with pytest.raises(UserError, match=r"gone\.tar: .*404"):
            list_sources([f"{address}/gone.tar"])
    with serving(served, ranges=False) as (address, sent), pytest.raises(UserError, match="ignores ranges; download"):
        list_sources([f"{address}/w.tar"])


def test_tars_lists_and_sidecars_in_s3(tmp_path: Path, bucket: str) -> None:
    tar = webdataset(tmp_path / "w.tar").read_bytes()
    for name, data in {
        **{"data.v1/w.tar": tar, "data.v1/a.mp4": b"a", "data.v1/a.json": b'{"caption": "from the sidecar", "n": 2}'},
        **{"data.v1/deep/list.csv": b"uri,licence\nb.mp4,CC0\n", "data.v1/deep/b.mp4": b"b", "data.v1/.hidden": b"h"},
        **{"lists/l.jsonl": b'{"uri": "../data.v1/"}\n{"uri": "/data.v1/w.tar"}', "data.v1/broken.json": b"{"},
        "data.v1/broken.mp4": b"c",
    }.items():
        storage.write_bytes(f"{bucket}/{name}", data)
    found = gathered([f"{bucket}/data.v1"], tmp_path / "out")
    assert describe(found) == describe(list_sources([f"{bucket}/data.v1/"]))
    known = describe(found, f"{bucket}/data.v1/")
    assert "broken.json" in known.pop("broken.mp4")[2]["sidecar_error"]
    assert known == {
        "a.mp4": ((SceneCaption("from the sidecar"),), None, {"n": 2}),
        "deep/b.mp4": ((), "CC0", {}),
        "w.tar#a/1.mp4": ((SceneCaption("a cat"),), "MIT", {"fps": 3}),
        "w.tar#c.video.mp4": ((SceneCaption("two dots"),), None, {}),
    }
    contents = {s.uri.rpartition("/")[2]: content(s, tmp_path) for s in found}
    assert contents["1.mp4"] == VIDEO and contents["w.tar#c.video.mp4"] == VIDEO[::-1] and contents["b.mp4"] == b"b"
    assert len(gathered([f"{bucket}/data.v1/w.tar"], tmp_path / "one")) == 2
    with pytest.raises(UserError, match="no such object"):
        list_sources([f"{bucket}/nothing.v2"])


def test_named_schemes_are_read_or_refused(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"a")
    assert len(both([f"file://{tmp_path}/a.mp4"], tmp_path / "out")) == 1
    with pytest.raises(UserError, match="gs:// can't be read"):
        gather_footage(["gs://bucket/a"], tmp_path / "x", 0)
