"""No caption meets another clip: random lists with spans and random WebDataset tars, read back and gathered."""

from __future__ import annotations

import io
import json
import math
import random
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tar_files import write_tar

from svd.core.errors import UserError
from svd.sources.listing import list_sources
from svd.sources.source import Source, as_rows
from svd.sources.spans import as_list, seconds

PATIENT = settings(max_examples=150, deadline=None)


def texts(source: Source) -> list[str]:
    return [caption.text for caption in source.captions]


def listed(folder: Path, *rows: dict[str, Any]) -> list[Source]:
    (folder / "l.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list_sources([str(folder / "l.jsonl")])


def again(sources: list[Source], folder: Path) -> list[Source]:
    """What is read of the list that the stage `sources` gathers."""
    return listed(folder, *(row for source in sources for row in as_rows(source)))


def test_times() -> None:
    assert [seconds(one) for one in ("00:01:02.500", "1:02,5", "62.5", 62.5)] == [62.5] * 4
    assert seconds("10:00:00.001") == 36000.001
    for wrong in ("1:2:3:4", "-1", -1, "", "soon", float("nan"), True, "2020-01-02T03:04:05"):
        with pytest.raises(ValueError, match="is no time"):
            seconds(wrong)


def test_lists_as_text() -> None:
    assert as_list("['it\\'s', \"two\"]") == ["it's", "two"] and as_list('["a", null]') == ["a", None]
    assert [as_list(text) for text in ("[Music] plays", "[" * 9999, "a", "{'a'}")] == [None] * 4


def test_lists_as_internvid_and_panda_publish_them(tmp_path: Path) -> None:
    video = {"url": "https://x.org/a.mp4"}
    rows = [("00:00:04.000", "00:00:06.500", "two", 0.2), ("00:00:01.000", "00:00:03.500", "one", 0.1)]
    names = ("Start_timestamp", "End_timestamp", "Caption", "UMT_Score")
    (one,) = listed(tmp_path, *(video | dict(zip(names, row, strict=True)) for row in rows))
    found = [(span.start, span.end, span.captions, span.metadata) for span in one.spans]
    assert found == [(1, 3.5, ("one",), {"UMT_Score": 0.1}), (4, 6.5, ("two",), {"UMT_Score": 0.2})]
    assert (one.captions, one.metadata) == ((), {})
    pairs = "[['0:00:01.000', '0:00:03.500'], ['0:00:04.000', '0:00:06.500']]"
    (other,) = listed(tmp_path, video | {"timestamp": pairs, "caption": "['one', 'two']", "score": 1})
    assert [(span.start, span.end, span.captions) for span in other.spans] == [part[:3] for part in found]
    (plain,) = listed(tmp_path, video | {"timestamp": "2020-01-02", "caption": "['one', 'two']"})
    assert (texts(plain), plain.spans, plain.metadata) == (["one", "two"], (), {"timestamp": "2020-01-02"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"start": 3, "end": "00:00:02"}, "row 1: a span ends at 2 s, not after its start at 3 s"),
        ({"start": "soon"}, "row 1: 'soon' is no time; give seconds or HH:MM:SS.mmm"),
        ({"timestamp": [[0, 1], [1, 2]], "caption": ["a"]}, "row 1: 2 spans, but 1 captions"),
        ({"timestamp": [[0, 1], [1, 2]], "caption": "a"}, "row 1: 2 spans, but 1 captions"),
        ({"timestamp": [[0, 1, 2]]}, "row 1: .* is no span"),
        ({"uri": "w.tar", "start": 1, "end": 2}, "row 1: start and end are given for 'w.tar', which holds several"),
    ],
)
def test_what_a_list_cannot_mean_is_one_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    write_tar(tmp_path / "w.tar", {"a.mp4": b"a", "b.mp4": b"b"})
    with pytest.raises(UserError, match=message) as caught:
        listed(tmp_path, {"uri": "a.mp4"} | row)
    assert "\n" not in str(caught.value) and "l.jsonl" in str(caught.value)


def test_a_sidecar_with_a_start_names_no_span(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"a")
    (tmp_path / "a.json").write_text('{"start": "noon", "timestamp": [[0, 1]], "caption": "mine"}')
    (one,) = again(list_sources([str(tmp_path)]), tmp_path)
    assert (texts(one), one.spans, one.metadata["start"]) == (["mine"], (), "noon")


def clock(value: float) -> str:
    return f"{int(value // 3600):02d}:{int(value // 60) % 60:02d}:{value % 60:06.3f}"


times = st.integers(0, 20).map(lambda n: n * 0.25)
rows = st.fixed_dictionaries(
    {
        "uri": st.sampled_from(["https://x.org/a.mp4", "s3://b/b.mp4", "c.mp4"]),
        "ends": st.none() | st.tuples(times, times).filter(lambda ends: ends[0] < ends[1]),
        "caption": st.none() | st.integers(0, 99),
        "written": st.sampled_from([float, str, clock]),
        "form": st.sampled_from(["columns", "pairs"]),
    }
)


@PATIENT
@given(st.lists(rows, min_size=1, max_size=8))
def test_every_row_of_a_random_list_is_there_and_says_nothing_of_another_span(entries: list[dict[str, Any]]) -> None:
    said: dict[tuple[str, tuple[float, float] | None], set[str]] = {}
    written = []
    for entry in entries:
        text = [] if entry["caption"] is None else [f"{entry['uri']} {entry['ends']} {entry['caption']}"]
        said.setdefault((entry["uri"], entry["ends"]), set()).update(text)
        ends = [entry["written"](end) for end in entry["ends"] or ()]
        columns = dict(zip(("start", "end"), ends, strict=False)) if entry["form"] == "columns" else {}
        pairs = {"timestamp": str([ends])} if ends and not columns else {}
        written.append({"uri": entry["uri"], "caption": str(text) if text else None} | columns | pairs)
    with tempfile.TemporaryDirectory() as name:
        sources = listed(Path(name), *written)
        copied = again(sources, Path(name))
    assert [(s.captions, s.spans, s.metadata) for s in copied] == [(s.captions, s.spans, s.metadata) for s in sources]
    found = {(s.uri, (span.start, span.end)): set(span.captions) for s in sources for span in s.spans}
    found |= {(s.uri, None): set(texts(s)) for s in sources if s.captions}
    assert found == {place: own for place, own in said.items() if own or place[1]}
    assert {s.uri for s in sources} == {uri for uri, _ in said}


def test_names_with_dots_keep_their_texts_apart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = {}
    for episode in ("show S01.E01", "show S01.E02"):
        members |= {f"{episode}.mp4": b"", f"{episode}.json": json.dumps({"caption": episode}).encode()}
    members |= {"show S01.E02.en.txt": b"in English", "show S01.txt": b"of the season"}
    members |= {"c.video.mp4": b"", "c.txt": b"by the convention", "c.more.txt": b"another"}
    tar = write_tar(tmp_path / "w.tar", members)
    found = {source.uri.partition("#")[2]: texts(source) for source in list_sources([str(tar)])}
    assert found == {
        "show S01.E01.mp4": ["show S01.E01"],
        "show S01.E02.mp4": ["show S01.E02", "in English"],
        "c.video.mp4": ["by the convention", "another"],
    }
    assert "1 texts, such as show S01.txt, belong to no video" in caplog.text


def write_members(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


samples = st.lists(
    st.tuples(
        st.sampled_from(["a", "a.b", "a.b.c", "b", "b.c", "d/a"]),
        st.sets(st.sampled_from([".txt", ".json", ".en.txt"])),
        st.booleans(),
    ),
    min_size=1,
    max_size=7,
)


@PATIENT
@given(samples, st.integers(0, 999), st.booleans())
def test_no_video_of_a_random_tar_has_the_text_of_another(
    chosen: list[tuple[str, set[str], bool]], seed: int, mixed: bool
) -> None:
    stems = [stem for stem, _, _ in chosen]
    distinct, order = len(set(stems)) == len(stems), random.Random(seed)
    members: list[tuple[str, bytes]] = []
    for number, (stem, kinds, upper) in enumerate(chosen):
        own = [(f"{stem}.{'MP4' if upper else 'mp4'}" if distinct else f"{stem}.mp4", f"video {number}".encode())]
        own += [(stem + k, json.dumps({"caption": f"{number}"}).encode()) for k in kinds if k == ".json"]
        own += [(stem + k, f"{number}".encode()) for k in kinds if k != ".json"]
        order.shuffle(own)
        members += own
    if mixed and distinct:  # members of one sample need only follow each other where names repeat
        order.shuffle(members)
    with tempfile.TemporaryDirectory() as name:
        tar = write_members(Path(name) / "w.tar", members)
        sources = list_sources([str(tar)])
        content = tar.read_bytes()
    videos = [content[s.offset : (s.offset or 0) + (s.size or 0)].decode() for s in sources]
    assert sorted(videos) == sorted(f"video {number}" for number in range(len(chosen)))
    assert len({source.uri for source in sources}) == len(sources)
    for source, video in zip(sources, videos, strict=True):
        number = int(video.split()[1])
        assert set(texts(source)) <= {f"{number}"}
        if distinct:
            assert bool(texts(source)) == bool(chosen[number][1])


def test_two_members_of_one_name_are_two_sources(tmp_path: Path) -> None:
    once = [("1.mp4", b"one"), ("1.txt", b"first"), ("1.mp4", b"other"), ("1.txt", b"second")]
    one, other = list_sources([str(write_members(tmp_path / "w.tar", once))])
    assert (one.uri, texts(one)) == (f"{tmp_path}/w.tar#1.mp4", ["first"])
    assert (other.uri, texts(other)) == (f"{tmp_path}/w.tar#1.mp4 (2)", ["second"])
    doubtful = list_sources([str(write_members(tmp_path / "x.tar", [once[0], once[1], once[2]]))])
    assert [texts(source) for source in doubtful] == [[], []]


def test_kinds_that_are_not_taken_are_listed_with_a_reason(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.gif", "b.zip", "c.mp4", "d.jpg"):
        (folder / name).write_bytes(b"x")
    write_tar(folder / "w.tar", {"e.gif": b"x", "f.mp4": b"y"})
    sources = list_sources([str(folder)])
    skipped = {source.uri.removeprefix(f"{folder}/"): source.skipped for source in sources}
    assert {name: bool(reason) for name, reason in skipped.items()} == {
        **{"a.gif": True, "b.zip": True, "c.mp4": False, "w.tar#e.gif": True, "w.tar#f.mp4": False}
    }
    assert "convert it to a video" in skipped["a.gif"]
    assert [source.skipped for source in again(sources, tmp_path)] == list(skipped.values())


def test_an_open_span_goes_to_the_end(tmp_path: Path) -> None:
    (one,) = again(
        listed(tmp_path, {"uri": "s3://b/a.mp4", "start": "", "end": 2}, {"uri": "s3://b/a.mp4", "start": 5}), tmp_path
    )
    assert [(span.start, span.end) for span in one.spans] == [(0, 2), (5, math.inf)]
