"""The stage `sources`: worlds, fixture and footage in one folder; bad input and kills."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import polars
import pytest

from svd.config.load import load_preset
from svd.core.errors import UserError
from svd.sources import stage as sources
from svd.stage import StageContext

SAMPLES = Path(__file__).resolve().parents[2] / "samples"


def context(tmp_path: Path, **overrides: Any) -> StageContext:
    preset = load_preset("tiny", {f"sources.{name}": value for name, value in overrides.items()})
    return StageContext(preset, {}, tmp_path / "out", tmp_path / "work")


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "sources.jsonl").read_text().splitlines()]


def test_whole_stage(tmp_path: Path) -> None:
    small = {"train_videos": 1, "test_videos": 1, "scenes_per_video": 2, "height": 32, "width": 48}
    report = sources.run(context(tmp_path, synthetic=small, paths=[str(SAMPLES)]))
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        *("train", "test", "footage", "ucf101_fixture", "truth.json", "metrics.json"),
    }
    for name in ("big-buck-bunny.mp4", "city-night.mpg", "README.md"):
        assert (out / "footage/samples" / name).read_bytes() == (SAMPLES / name).read_bytes()
    assert report.metrics["footage_files"] == 4 and report.metrics["ucf101_fixture_clips"] == 101


def test_large_footage_is_listed_not_copied(tmp_path: Path) -> None:
    sources.run(context(tmp_path, synthetic=None, paths=[str(SAMPLES)], copied_bytes=1000))
    listed = rows(tmp_path / "out/footage")
    assert {Path(row["uri"]).name for row in listed} >= {"big-buck-bunny.mp4", "city-night.mpg"}
    assert all(Path(row["uri"]).is_absolute() for row in listed)
    assert not (tmp_path / "out/footage/samples").exists()


def test_lists_keep_their_columns_and_get_absolute_paths(tmp_path: Path) -> None:
    table = polars.DataFrame({"url": ["clips/a.mp4", "https://example.org/b.mp4"], "caption": ["a", "b"]})
    table.write_csv(tmp_path / "list.csv")
    table.write_parquet(tmp_path / "list.parquet")
    table.write_ndjson(tmp_path / "list.jsonl")
    (tmp_path / "list.txt").write_text("clips/a.mp4\n\nhttps://example.org/b.mp4\n")
    for suffix in ("csv", "parquet", "jsonl"):
        target = tmp_path / suffix
        assert sources.gather_footage([str(tmp_path / f"list.{suffix}")], target, 10**6) == (0, 2)
        expected = {"https://example.org/b.mp4": "b", str(tmp_path / "clips/a.mp4"): "a"}
        assert {row["uri"]: row["caption"] for row in rows(target)} == expected
    assert sources.gather_footage([str(tmp_path / "list.txt")], tmp_path / "txt", 10**6) == (0, 2)
    (tmp_path / "broken.parquet").write_text("no")
    with pytest.raises(UserError, match=r"broken\.parquet"):
        sources.gather_footage([str(tmp_path / "broken.parquet")], tmp_path / "x", 10**6)
    (tmp_path / "columns.csv").write_text("colour,size\nred,3\n")
    with pytest.raises(UserError, match=r"columns.csv: row 1 has no address"):
        sources.gather_footage([str(tmp_path / "columns.csv")], tmp_path / "x", 10**6)


def test_hard_names_hidden_files_and_equal_folder_names(tmp_path: Path) -> None:
    names = ["a b.mp4", "quote'\".mp4", "ünïcode 視頻.mp4", ".hidden.mp4", "sub/c.mp4"]
    for folder in ("one/videos", "two/videos"):
        for name in names:
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(folder.encode())
    patterns = [str(tmp_path / "one/videos"), str(tmp_path / "two/videos"), str(tmp_path / "one/*/a*.mp4")]
    assert sources.gather_footage(patterns, tmp_path / "out", 10**6) == (9, 0)
    for name in (n for n in names if not n.startswith(".")):
        assert (tmp_path / "out/videos" / name).read_bytes() == b"one/videos"
        assert (tmp_path / "out/videos-2" / name).read_bytes() == b"two/videos"
    assert (tmp_path / "out/a b.mp4").exists()


def test_unreadable_files_are_listed_for_the_catalogue(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "good.mp4").write_bytes(b"x")
    (folder / "dangling.mp4").symlink_to(tmp_path / "gone.mp4")
    assert sources.gather_footage([str(folder)], tmp_path / "out", 10**6) == (1, 1)
    assert rows(tmp_path / "out") == [{"uri": str(folder / "dangling.mp4")}]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"paths": ["/nowhere/videos"], "synthetic": None}, "'/nowhere/videos' does not exist"),
        ({"paths": [], "synthetic": None}, "nothing to read"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        sources.run(context(tmp_path, **overrides))
    assert "\n" not in str(caught.value)


def test_empty_folder_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        sources.run(context(tmp_path, paths=[str(tmp_path / "empty")], synthetic=None))


def test_interrupted_copy_is_finished(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(b"full content")
    target = tmp_path / "out/in/a.mp4"
    target.parent.mkdir(parents=True)
    target.write_bytes(b"full")
    assert sources.gather_footage([str(folder)], tmp_path / "out", 10**6) == (1, 0)
    assert target.read_bytes() == b"full content"


def test_samples_are_small_attributed_and_decodable() -> None:
    videos = [path for path in SAMPLES.iterdir() if path.suffix != ".md"]
    text = (SAMPLES / "README.md").read_text()
    assert sum(path.stat().st_size for path in videos) <= 6_000_000 and len(videos) >= 3
    for path in videos:
        assert path.name in text
        with av.open(str(path)) as container:
            assert sum(1 for _ in container.decode(video=0)) > 60
    assert "Blender Foundation" in text and "CC0" in text
