"""The processes that decode: what happens when they can't start, are killed, or the run ends early."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from curation_inputs import context, tiny, tree, write_encoders, write_sources
from media_files import Kind, shots, tiny_config, write

from svd.core.errors import UserError
from svd.curation import stage
from svd.curation.base.messages import Analyse, CountParts, Done, VideoLength
from svd.curation.base.types import SourceFailure
from svd.curation.measuring.child import limited_resource
from svd.curation.measuring.process import DEFAULT_MEMORY, DecodeProcess, WorkerError
from svd.curation.measuring.unit import identify, measure_unit, units_of
from svd.curation.scoring.process import ScoringProcess
from svd.sources.listing import list_sources


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
    decoding = DecodeProcess()
    request = CountParts(video, tiny_config())
    long = Scripted(VideoLength(3 * 1800.0), Done("done"))
    assert decoding._exchange(long, request, None) == Done("done") and long.waits == [3600, 3 * 3600]
    short = Scripted(VideoLength(5.0), Done("done"))
    assert decoding._exchange(short, request, None) == Done("done") and short.waits == [3600, 3600]
    with pytest.raises(SourceFailure, match="not finished after 14400 s"):
        decoding._exchange(Scripted(VideoLength(4 * 1800.0)), request, None)
    config = tiny_config()
    with decoding:
        connection = decoding._start()
        connection.send(Analyse(video, config, (0, 2), tmp_path / "part.mp4"))
        assert connection.recv().seconds == pytest.approx(150 / 24 / 2, abs=0.05), "the seconds of one of two parts"


def when_busy(decoding: DecodeProcess, action) -> threading.Thread:
    """Call `action` with the process of `decoding` as soon as it has used a little CPU time for its request."""

    def watch() -> None:
        while decoding._process is None or decoding._process.pid is None:
            time.sleep(0.001)
        pid = decoding._process.pid
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
    with DecodeProcess() as decoding:
        expected = decoding.analyse(video, tiny_config())
        thread = when_busy(decoding, lambda pid: os.kill(pid, signal.SIGKILL))
        again = decoding.analyse(video, tiny_config())
        thread.join()
    assert [c.span for c in again.clips] == [c.span for c in expected.clips]


def test_a_process_killed_in_the_middle_of_a_message_is_replaced_too(video, monkeypatch):
    """A large message is written in pieces; the kernel keeps what was written before the kill."""
    with DecodeProcess() as decoding:
        expected = decoding.analyse(video, tiny_config())
        start, half = decoding._start, []

        def dies_at_work():
            connection = start()
            if half:
                return connection
            decoding._process.kill()
            ours, theirs = multiprocessing.Pipe()
            half.append(theirs)  # stays open: the request was received
            os.write(theirs.fileno(), struct.pack("!i", 1000) + b"half of it")
            with socket.socket(fileno=os.dup(theirs.fileno())) as end:
                end.shutdown(socket.SHUT_WR)
            return ours

        monkeypatch.setattr(decoding, "_start", dies_at_work)
        again = decoding.analyse(video, tiny_config())
    assert half and [c.span for c in again.clips] == [c.span for c in expected.clips]


WHAT_FITS = """
import mmap, sys
import numpy as np
from svd.curation.measuring.child import limit_memory

limit_memory(256 << 20, sys.argv[1])
for attempt in (
    lambda: mmap.mmap(-1, 8 << 30, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 0),
    lambda: np.ones(64 << 20, np.uint8),
    lambda: np.ones(512 << 20, np.uint8),
):
    try:
        attempt()
        print("yes")
    except (MemoryError, OSError):
        print("no")
"""


@pytest.mark.parametrize(("device", "expected"), [("cpu", "no yes no"), ("cuda", "yes yes no")])
def test_memory_is_bounded_where_a_gpu_driver_reserves_addresses_too(device, expected):
    """8 GiB of addresses that nothing is written to, 64 MiB of memory, 512 MiB; 256 MiB more than now are allowed."""
    done = subprocess.run([sys.executable, "-c", WHAT_FITS, device], capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected.split()
    assert limited_resource(device)[0] == {"cpu": resource.RLIMIT_AS, "cuda": resource.RLIMIT_DATA}[device]


@pytest.fixture(scope="module")
def raft_weights(tmp_path_factory):
    import torch
    from torchvision.models.optical_flow import raft_large

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("raft") / "raft.pth"
    torch.save(raft_large().state_dict(), path)
    return path


@pytest.mark.slow
def test_raft_at_full_size_fits_into_the_memory_of_a_process(raft_weights, tmp_path):
    """One pair of 800 × 450, padded to 456, behind the same guard as every source."""
    frames = list(shots([26], height=450, width=800, speed=2.0))
    video = write(tmp_path / "v", frames, kind=Kind(options={"preset": "ultrafast"}))
    config = tiny_config(motion__algorithm="raft", motion__raft_weights=str(raft_weights), motion__fps=1.0)
    with DecodeProcess() as decoding:
        (clip,) = decoding.analyse(video, config).clips
    assert clip.flow.shape == (1, 16, 28, 2) and np.isfinite(clip.flow).all() and clip.motion_score > 0


def when_loading(decoding: DecodeProcess, before: int) -> Future[int]:
    """Kill the process that follows `before` while it loads torch, long before it is ready; gives its number."""
    killed: Future[int] = Future()

    def pid() -> int | None:
        with contextlib.suppress(ValueError):  # closed in this very moment
            return decoding._process and decoding._process.pid
        return None

    def watch() -> None:
        while (number := pid()) in (None, before):
            time.sleep(0.001)
        while "libtorch" not in Path(f"/proc/{number}/maps").read_text():
            time.sleep(0.001)
        os.kill(number, signal.SIGKILL)
        killed.set_result(number)

    threading.Thread(target=watch, daemon=True).start()
    return killed


@pytest.mark.slow
def test_a_replaced_process_goes_on_with_raft(raft_weights, tmp_path):
    """Killed at work, killed while it loads its networks, and ended for lack of memory."""
    video = write(tmp_path / "v", list(shots([26], height=96, width=128, speed=0.5)))
    config = tiny_config(motion__algorithm="raft", motion__raft_weights=str(raft_weights), motion__fps=1.0)
    with DecodeProcess() as decoding:
        expected = decoding.analyse(video, config)
        assert expected.clips[0].flow.any()

        def same_as_expected() -> bool:
            (clip,), (other,) = expected.clips, decoding.analyse(video, config).clips
            return np.array_equal(clip.flow, other.flow) and clip.motion_score == other.motion_score

        first = decoding._process.pid
        working = when_busy(decoding, lambda pid: os.kill(pid, signal.SIGKILL))
        loading = when_loading(decoding, first)
        assert same_as_expected()
        working.join()
        assert decoding._process.pid not in (first, loading.result(timeout=1))
        decoding.close()
        decoding.memory = 64 << 20
        with pytest.raises(SourceFailure, match="more memory needed than allowed"):
            decoding.analyse(video, config)
        assert decoding._process is None
        decoding.memory = DEFAULT_MEMORY
        assert same_as_expected()


def test_a_process_has_the_networks_of_every_request(video):
    """TransNetV2 doesn't fit into what a source may need; a process that is there already does not have it."""
    passes = [{"detector": "transnetv2", "threshold": 0.5}]
    with DecodeProcess() as decoding:
        plain = decoding.analyse(video, tiny_config())
        found = decoding.analyse(video, tiny_config(cuts__passes=passes))
    assert found.facts == plain.facts and [clip.span for clip in found.clips] == [clip.span for clip in plain.clips]


def test_a_process_that_cannot_start_ends_the_run_and_blames_no_source(video, tmp_path):
    config = tiny_config(motion__algorithm="raft", motion__raft_weights=str(tmp_path / "missing.pth"))
    (unit,) = units_of([identify(source) for source in list_sources([str(video)])], 1)
    with DecodeProcess() as decoding, pytest.raises(WorkerError, match=r"missing\.pth: no such file"):
        measure_unit(unit, config, tmp_path / "measured", decoding)
    assert not (tmp_path / "measured" / unit.name).exists()


def test_a_stopped_process_blames_no_source(video, tmp_path):
    (unit,) = units_of([identify(source) for source in list_sources([str(video)])], 1)
    with DecodeProcess() as decoding:
        decoding.analyse(video, tiny_config())
        thread = when_busy(decoding, lambda pid: decoding.stop())
        with pytest.raises(WorkerError, match="stopped"):
            measure_unit(unit, tiny_config(), tmp_path / "measured", decoding)
        thread.join()
        with pytest.raises(WorkerError, match="stopped"):
            decoding.analyse(video, tiny_config())
    assert not (tmp_path / "measured" / unit.name).exists()


@pytest.mark.parametrize("error", [UserError("the server is down"), KeyboardInterrupt()])
def test_an_error_ends_the_run_at_once_and_leaves_work_that_can_be_continued(tmp_path, monkeypatch, error):
    sources, encoders = write_sources(tmp_path / "sources", train=5, scenes=3), write_encoders(tmp_path / "encoders")
    preset = tiny(sources__sources_per_shard=1)
    whole, broken = (context(preset, sources, encoders, tmp_path / name) for name in ("whole", "broken"))
    stage.run(whole)
    with monkeypatch.context() as patched:
        patched.setattr(ScoringProcess, "score_unit", lambda *args: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            stage.run(broken)
    assert len([unit for unit in (broken.work / "measured").iterdir() if not unit.name.startswith(".")]) < 6
    stage.run(broken)
    assert tree(broken.output) == tree(whole.output)
