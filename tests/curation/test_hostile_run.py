"""A run of the stage over hundreds of hostile sources goes on to its end: a row for each, nothing written elsewhere."""

from __future__ import annotations

import functools
import io
import os
import resource
import shutil
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import polars as pl
import pytest
from curation_inputs import context, tiny, write_encoders
from hostile_files import GIANT_RAW, RATELESS_RAW, lies, mutants, write_originals

from svd.catalogue import tables
from svd.catalogue.shards import read_clip_bytes
from svd.curation import stage
from svd.curation.measuring.process import DecodeProcess

MEMORY = 384 << 20
MUTANTS = 500


@pytest.fixture
def endless() -> Iterator[str]:
    """The address of a video that never ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            while True:
                try:
                    self.wfile.write(bytes(1 << 16))
                except OSError:
                    return

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/endless.mp4"
    server.shutdown()


def write_special(folder: Path, good: Path, address: str) -> dict[str, str]:
    """Sources that lie, that lead out of their folder, that never end: uri → what its row must say."""
    for name, data in lies(good.read_bytes()).items():
        (folder / f"{name}.mp4").write_bytes(data)
    (folder / "giant.y4m").write_bytes(GIANT_RAW)
    (folder / "rateless.y4m").write_bytes(RATELESS_RAW)
    os.mkfifo(folder / "pipe.mp4")
    (folder / "zeros.mp4").symlink_to("/dev/zero")
    # Two pictures of the greatest size that is looked at, each as large as the memory; all but their headers is a hole.
    with (folder / "vast.y4m").open("wb") as stream:
        stream.write(b"YUV4MPEG2 W8192 H8192 F25:1 Ip A1:1 C444p16\n")
        for _ in range(2):
            stream.write(b"FRAME\n")
            stream.seek(6 << 26, io.SEEK_CUR)
        stream.truncate()
    (folder / "list.csv").write_text(f"uri\n../../stolen.mp4\n../../elsewhere/{good.name}\n{address}\n")
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for name in ("../../outside.mp4", f"{folder.parents[1]}/absolute.mp4", "inside.mp4"):
            info = tarfile.TarInfo(name)
            info.size = good.stat().st_size
            with good.open("rb") as stream:
                tar.addfile(info, stream)
    root = folder.parents[1]
    return {
        "footage/giant.mp4": "",
        "footage/many.mp4": "",
        "footage/still.mp4": "",
        "footage/giant.y4m": "not a readable video",
        "footage/rateless.y4m": "",
        "footage/pipe.mp4": "not a regular file",
        "footage/zeros.mp4": "not a regular file",
        "footage/vast.y4m": "fewer than two frames; the container breaks off",
        "footage/../../stolen.mp4": "can't be read",
        f"footage/../../elsewhere/{good.name}": "",
        address: "more than",
        "footage/shard.tar#../../outside.mp4": "",
        f"footage/shard.tar#{root}/absolute.mp4": "",
        "footage/shard.tar#inside.mp4": "",
    }


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything below a folder but what is in `run`: size and time of change."""
    return {
        str(path): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if not path.is_relative_to(folder / "run")
    }


class Watched(DecodeProcess):
    """Notes the limit of memory that its processes really have."""

    limits: set[bool] = set()  # noqa: RUF012 shared by all on purpose

    def analyse(self, *args, **options):
        try:
            return super().analyse(*args, **options)
        finally:
            if self._process is not None and self._process.pid is not None and self._process.is_alive():
                soft = resource.prlimit(self._process.pid, resource.RLIMIT_AS)[0]
                self.limits.add(MEMORY < soft < MEMORY + (8 << 30))


@pytest.mark.slow
def test_a_run_goes_on_over_hostile_sources(endless, tmp_path, monkeypatch):
    footage, elsewhere = tmp_path / "sources" / "footage", tmp_path / "elsewhere"
    for folder in (footage, elsewhere):
        folder.mkdir(parents=True)
    originals = write_originals(elsewhere)
    for i, data in enumerate(mutants(originals, MUTANTS, seed=2)):
        (footage / f"mutant{i:04d}{originals[i % len(originals)].suffix}").write_bytes(data)
    special = write_special(footage, originals[0], endless)
    encoders = write_encoders(tmp_path / "encoders")
    monkeypatch.setattr(stage, "DecodeProcess", functools.partial(Watched, timeout=20.0, memory=MEMORY))
    monkeypatch.setattr("svd.curation.measuring.fetching.MAX_BYTES", 1_000_000)
    monkeypatch.setattr(Watched, "limits", set())
    before = listing(tmp_path)
    run = context(tiny(sources__sources_per_shard=50), tmp_path / "sources", encoders, tmp_path / "run")
    stage.run(run)
    assert listing(tmp_path) == before
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"output", "work", ".output.lock"}
    assert Watched.limits == {True}
    check_rows(tables.read_sources(run.output), special)
    check_clips(run.output)
    shutil.rmtree(run.work)


def check_rows(rows: pl.DataFrame, special: dict[str, str]) -> None:
    """One row a source, each usable or with one line that says why not."""
    assert rows["source_uri"].n_unique() == len(rows) == MUTANTS + len(special)
    assert set(special) < set(rows["source_uri"])
    for row in rows.iter_rows(named=True):
        assert (row["verdict"] == "ok") == (row["reason"] == "") == (row["clips"] > 0), row
        assert "\n" not in row["reason"] and "Traceback" not in row["reason"], row
        assert "internal error" not in row["reason"], row
        assert special.get(row["source_uri"], "") in row["reason"], row
    verdicts = rows["verdict"].value_counts()
    found = dict(zip(verdicts["verdict"], verdicts["count"], strict=True))
    assert found["ok"] > MUTANTS / 5 and found["failed"] > MUTANTS / 5


def check_clips(folder: Path) -> None:
    """Every clip of the catalogue decodes to the frames that its row says."""
    for row in tables.read_clips(folder).iter_rows(named=True):
        with av.open(io.BytesIO(read_clip_bytes(folder, row))) as container:
            assert sum(1 for _ in container.decode(video=0)) == row["frames"], row["source_uri"]
