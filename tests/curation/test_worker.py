"""The processes that decode: what happens when they can't start, are killed, or the run ends early."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from curation_inputs import context, tiny, tree, write_encoders, write_sources
from media_files import shots, tiny_config, write

from svd.curation import stage
from svd.curation.measure import identify, measure_unit, units_of
from svd.curation.networks import Networks
from svd.curation.types import SourceFailure
from svd.curation.worker import Analyst, WorkerError
from svd.data.listing import list_sources
from svd.stage import UserError


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write(tmp_path_factory.mktemp("video") / "video", list(shots([150], height=144, width=256, speed=0.2)))


class Scripted:
    """A connection that gives prepared answers; `waits` are the seconds that each was waited for."""

    def __init__(self, *answers):
        self.answers, self.waits = list(answers), []

    def send(self, request):
        pass

    def poll(self, seconds):
        self.waits.append(round(seconds))
        return bool(self.answers)

    def recv(self):
        return self.answers.pop(0)


def test_a_long_source_has_more_time(video, tmp_path):
    analyst = Analyst()
    long = Scripted(3 * 1800.0, "done")
    assert analyst._exchange(long, ("analyse",), None) == "done" and long.waits == [3600, 3 * 3600]
    short = Scripted(5.0, "done")
    assert analyst._exchange(short, ("analyse",), None) == "done" and short.waits == [3600, 3600]
    with pytest.raises(SourceFailure, match="not finished after 14400 s"):
        analyst._exchange(Scripted(4 * 1800.0), ("analyse",), None)
    config = tiny_config()
    with analyst:
        connection = analyst._start(config)
        connection.send(("analyse", video, config, (0, 2), tmp_path / "part.mp4"))
        assert connection.recv() == pytest.approx(150 / 24 / 2, abs=0.05), "the seconds of one of two parts"


def when_busy(analyst: Analyst, action) -> threading.Thread:
    """Call `action` with the process of `analyst` as soon as it has used a little CPU time for its request."""

    def watch() -> None:
        while analyst._process is None or analyst._process.pid is None:
            time.sleep(0.001)
        pid = analyst._process.pid
        before = used(pid)
        while used(pid) <= before:
            time.sleep(0.001)
        action(pid)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def used(pid: int) -> int:
    """CPU time of a process, in clock ticks."""
    with open(f"/proc/{pid}/stat") as stream:
        fields = stream.read().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_a_killed_process_is_replaced_and_its_source_tried_again(video):
    with Analyst() as analyst:
        expected = analyst.analyse(video, tiny_config())
        thread = when_busy(analyst, lambda pid: os.kill(pid, signal.SIGKILL))
        again = analyst.analyse(video, tiny_config())
        thread.join()
    assert [c.span for c in again.clips] == [c.span for c in expected.clips]


def test_a_process_that_cannot_start_ends_the_run_and_blames_no_source(video, tmp_path):
    config = tiny_config(motion__algorithm="raft", motion__raft_weights=str(tmp_path / "missing.pth"))
    (unit,) = units_of([identify(source) for source in list_sources([str(video)])], 1)
    with Analyst() as analyst, pytest.raises(WorkerError, match=r"missing\.pth: no such file"):
        measure_unit(unit, config, tmp_path / "measured", analyst)
    assert not (tmp_path / "measured" / unit.name).exists()


def test_a_stopped_process_blames_no_source(video, tmp_path):
    (unit,) = units_of([identify(source) for source in list_sources([str(video)])], 1)
    with Analyst() as analyst:
        analyst.analyse(video, tiny_config())
        thread = when_busy(analyst, lambda pid: analyst.stop())
        with pytest.raises(WorkerError, match="stopped"):
            measure_unit(unit, tiny_config(), tmp_path / "measured", analyst)
        thread.join()
        with pytest.raises(WorkerError, match="stopped"):
            analyst.analyse(video, tiny_config())
    assert not (tmp_path / "measured" / unit.name).exists()


@pytest.mark.parametrize("error", [UserError("the server is down"), KeyboardInterrupt()])
def test_an_error_ends_the_run_at_once_and_leaves_work_that_can_be_continued(tmp_path, monkeypatch, error):
    sources, encoders = write_sources(tmp_path / "sources", train=5, scenes=3), write_encoders(tmp_path / "encoders")
    preset = tiny(sources__sources_per_shard=1)
    whole, broken = (context(preset, sources, encoders, tmp_path / name) for name in ("whole", "broken"))
    stage.run(whole)
    with monkeypatch.context() as patched:
        patched.setattr(Networks, "score_unit", lambda *args: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            stage.run(broken)
    assert len([unit for unit in (broken.work / "measured").iterdir() if not unit.name.startswith(".")]) < 6
    stage.run(broken)
    assert tree(broken.output) == tree(whole.output)
