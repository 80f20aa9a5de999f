"""A user's own folder with everything in it that collections hold, through the commands that a user types."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import polars as pl
import pytest
import yaml
from micro_project import Project, make_project

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
GOOD = "a good one.mp4"
NAMES = (
    'it\'s "quoted".mp4',
    "žluťoučký kůň 馬 🐎.mp4",
    " leading, comma; and\ttab.mp4",
    "$(touch hacked) `x` %s {0}.mp4",
)


def write_video(path: Path, frames: int, seed: int) -> None:
    """A short H.264 video of a moving picture, different for each seed."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=24, options={"crf": "30", "bf": "0", "g": "12"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for index in range(frames):
            row = 128 + 100 * np.sin((np.arange(96) + 2 * index) / (5 + seed))
            picture = np.tile(row.astype(np.uint8)[None, :, None], (64, 1, 3))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def write_sound(path: Path) -> None:
    """A file with a tone and no picture."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        tone = (0.1 * np.sin(np.arange(44100) / 20)).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_collection(folder: Path) -> dict[str, str]:
    """Good and bad files; for each bad one what its reason must speak of."""
    folder.mkdir()
    (folder / "empty folder").mkdir()
    (folder / "folder.mp4").mkdir()
    write_video(folder / GOOD, frames=48, seed=0)
    for number, name in enumerate(NAMES, start=1):
        write_video(folder / name, frames=48, seed=number)
    (folder / "text.mp4").write_text("no video at all\n" * 100)
    (folder / "zero.mp4").touch()
    whole = (folder / GOOD).read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    write_sound(folder / "sound.m4v")
    write_video(folder / "one frame.mp4", frames=1, seed=99)
    (folder / "dangling.mp4").symlink_to("nowhere.mp4")
    (folder / "loop.mp4").symlink_to("loop.mp4")
    os.mkfifo(folder / "pipe.mp4")
    (folder / os.fsdecode(b"gone caf\xe9.mp4")).symlink_to("nowhere.mp4")
    (folder / os.fsdecode(b"text caf\xe9.mp4")).write_text("no video in a file whose name is no Unicode")
    return {
        "text.mp4": "",
        "zero.mp4": "empty",
        "truncated.mp4": "",
        "sound.m4v": "no video",
        "one frame.mp4": "",
        "dangling.mp4": "No such file",
        "loop.mp4": "symbolic links",
        "pipe.mp4": "not a regular file",
        "gone caf\\udce9.mp4": "No such file",
        "text caf\\udce9.mp4": "",
    }


@dataclass(frozen=True)
class Curated:
    """A project after `svd curate videos --name mine`: what the command said, and what the bad files must have."""

    project: Project
    said: str
    bad: dict[str, str]


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Curated:
    project = make_project(tmp_path_factory.mktemp("bad") / "project")
    bad = write_collection(project.root / "videos")
    said = project.run("svd", "curate", "videos", "--name", "mine", "-p", "micro")
    shutil.copytree(project.root / "outputs" / "mine" / "encoders", project.outputs / "encoders")
    return Curated(project, said, bad)


def use(project: Project, *paths: str) -> None:
    """Let the preset name these sources and no others."""
    file = project.root / "presets" / "micro.yaml"
    values = yaml.safe_load(file.read_text())
    values["sources"] = {"paths": list(paths), "sources_per_shard": 4}
    file.write_text(yaml.safe_dump(values))


def errors(said: str) -> list[str]:
    """The lines that `svd` itself ends with; Prefect's log stands before them in a pipeline."""
    assert "Traceback" not in said, said
    return [line for line in said.splitlines() if line.startswith("error:")]


def test_every_file_has_a_row_and_the_good_ones_become_clips(curated: Curated) -> None:
    project, said, bad = curated.project, curated.said, curated.bad
    assert not errors(said)
    output = project.root / "outputs" / "mine" / "curation"
    rows = pl.read_parquet(output / "catalogue" / "sources.parquet")
    found = {Path(row["source_uri"]).name: row for row in rows.iter_rows(named=True)}
    assert set(found) == {GOOD, *NAMES, *bad}
    for name in (GOOD, *NAMES):
        assert (found[name]["verdict"], found[name]["reason"]) == ("ok", ""), found[name]
    for name, reason in bad.items():
        row = found[name]
        assert row["verdict"] in ("failed", "no-clips") and row["reason"] and reason in row["reason"], row
        assert "\n" not in row["reason"] and "internal error" not in row["reason"]
    clips = pl.read_parquet(output / "catalogue" / "clips.parquet")
    assert {Path(uri).name for uri in clips["source_uri"]} == {GOOD, *NAMES}
    summary, report = said.strip().splitlines()[-2:]
    unusable = sum(row["verdict"] == "failed" for row in found.values())
    assert f"{len(found)} sources ({unusable} unusable" in summary and f"{len(clips)} clips" in summary
    assert report == "report: outputs/mine/curation/report.html" and (output / "report.html").is_file()
    assert not (project.root / "hacked").exists()


def test_nothing_usable_is_one_error(curated: Curated) -> None:
    project = curated.project
    folder = project.root / "hopeless"
    folder.mkdir()
    (folder / "text.mp4").write_text("no video")
    (folder / "zero.mp4").touch()
    use(project, "hopeless")
    project.run("svd", "stage", "sources", "-p", "micro")
    (line,) = errors(project.run("svd", "stage", "curation", "-p", "micro", code=1))
    assert "not one of 2 sources gave a clip" in line and "text.mp4" in line
    assert not (project.outputs / "curation").exists()


@pytest.mark.parametrize("command", [("svd", "stage", "sources", "-p", "micro"), ("svd", "pipeline")], ids=" ".join)
def test_an_empty_folder_is_one_error(curated: Curated, command: tuple[str, ...]) -> None:
    project = curated.project
    (project.root / "vacant").mkdir(exist_ok=True)
    use(project, "vacant")
    (line,) = errors(project.run(*command, code=1))
    assert "no file in vacant" in line
