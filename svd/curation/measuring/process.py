"""Analysing untrusted sources in a process of their own, with limits on time and memory.

A decoder that hangs, crashes or eats memory takes its process with it; the source gets a reason and the run goes on.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av.logging
import numpy as np

from svd.config import CurationConfig
from svd.core.device import pick_device
from svd.core.errors import UserError
from svd.core.files import discard_temporary
from svd.curation.clips.writer import write_clips
from svd.curation.cuts.transnet import transnet_probabilities
from svd.curation.measuring.decode_pass import Taken
from svd.curation.measuring.parts import analyse_part, count_parts, seconds_claimed
from svd.curation.motion.flow import flow_function
from svd.curation.processes import end_with_parent, exit_name
from svd.curation.text.base import text_areas
from svd.curation.text.registry import make_detector
from svd.curation.types import Analysis, ClipAnalysis, ClipFile, ClipSpan, SourceFacts, SourceFailure

DEFAULT_TIMEOUT = 3600.0  # seconds for half an hour of video, and for anything shorter
TIMED_SECONDS = 1800.0
DEFAULT_MEMORY = 2 << 30  # bytes that analysing may add to a fresh process
ATTEMPTS = 2  # a process may be killed for what is no source's fault, as when the machine runs out of memory

_NO_MEMORY = "more memory needed than allowed"
_detector = functools.lru_cache(maxsize=1)(make_detector)  # loaded once a process


class WorkerError(UserError):
    """There is no process, whatever the source: it can't start, or the run is being ended."""


def limited_resource(device: str) -> tuple[int, int]:
    """Which resource bounds the memory of a process, and the column of /proc/self/statm that tells how much it has.

    The address space; but CUDA reserves far more of that than it ever uses, so there what the process may write to.
    """
    return (resource.RLIMIT_AS, 0) if device == "cpu" else (resource.RLIMIT_DATA, 5)


def limit_memory(extra: int, device: str) -> None:
    """Let this process have `extra` bytes more than it has now; `device`: where its networks run."""
    kind, column = limited_resource(device)
    pages = int(Path("/proc/self/statm").read_text().split()[column]) if Path("/proc/self/statm").exists() else 0
    limit = pages * os.sysconf("SC_PAGE_SIZE") + extra
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def load_networks(config: CurationConfig) -> str:
    """Load every network of analysing into this process and put one small picture through each; returns their device.

    Done before memory is limited: neither their size is a source's fault nor what their libraries, CUDA's above all,
    load with the first picture. Raises UserError for missing weights.
    """
    raft, craft = config.motion.algorithm == "raft", config.text.detector == "craft"
    transnet = any(cut_pass.detector == "transnetv2" for cut_pass in config.cuts.passes)
    if raft or craft or transnet:
        import torch

        torch.set_num_threads(1)  # as in the rest of the analysis: sources run side by side
    blank = np.zeros((128, 128, 3), np.uint8)  # RAFT takes nothing smaller
    if raft:
        flow_function(config.motion)[0](blank, blank)
    if transnet:
        transnet_probabilities(np.zeros((1, 27, 48, 3), np.uint8))
    _detector(config.text).polygons(blank)
    return pick_device() if raft or craft else "cpu"


def _answer(connection: Connection, request: tuple[Any, ...]) -> Any:
    """What a request leads to: a result, or the reason why there is none.

    Sent before it: how many seconds of video it is about, and clips as soon as they are there.
    """
    try:
        if request[0] == "analyse":
            _, path, config, part, scratch = request
            detector = _detector(config.text)

            def taken(clip: ClipAnalysis) -> ClipAnalysis:
                connection.send(replace(clip, text_areas=tuple(text_areas(list(clip.frames), detector))))
                return replace(clip, frames=clip.frames[:0].copy())  # a copy: a view would keep the frames

            connection.send(seconds_claimed(path) / part[1])
            return analyse_part(path, config, taken, part, scratch)
        if request[0] == "parts":
            return count_parts(*request[1:])
        connection.send(float(sum(span.end_seconds - span.start_seconds for span, _ in request[3])))
        return write_clips(*request[1:])
    except SourceFailure as failure:
        return failure.reason
    except MemoryError:
        return _NO_MEMORY
    except Exception as error:  # the child speaks for one hostile file; anything it meets is that file's reason
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _serve(connection: Connection, memory: int, config: CurationConfig | None) -> None:
    """Child: say that it is ready ("") or why not, then answer requests until the parent hangs up."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    av.logging.set_level(None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        limit_memory(memory, load_networks(config) if config is not None else "cpu")
    except Exception as error:
        connection.send(" ".join(str(error).split()) or type(error).__name__)
        return
    connection.send("")
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        connection.send(_answer(connection, request))


class Analyst:
    """A child process that analyses sources one at a time; it is replaced when it hangs, crashes or runs out of memory.

    timeout: seconds that half an hour of video may take, and anything shorter; a longer source gets more, in
    proportion. memory: bytes that it may need beyond the empty process. A source on which it dies is tried once more.
    It ends when this process does, however this process ends. Methods raise WorkerError when no process can be had,
    which is no source's fault.
    """

    def __init__(self, timeout: float = DEFAULT_TIMEOUT, memory: int = DEFAULT_MEMORY) -> None:
        self.timeout, self.memory = timeout, memory
        self._config: CurationConfig | None = None  # of the latest request: whose networks a process must have
        self._loaded: CurationConfig | None = None  # whose networks the process has
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None
        self._stopped = False

    def count_parts(self, path: Path, config: CurationConfig) -> int:
        """As parts.count_parts, with the same guards as `analyse`."""
        self._config = config
        count: int = self._ask(None, "parts", path, config)
        return count

    def analyse(
        self,
        path: Path,
        config: CurationConfig,
        taken: Taken = lambda clip: clip,
        part: tuple[int, int] = (0, 1),
        scratch: Path | None = None,
    ) -> Analysis:
        """As parts.analyse_part, and looks for text; a hang, a crash and a lack of memory are SourceFailures too.

        `taken` runs here.
        """
        self._config = config
        clips: dict[ClipSpan, ClipAnalysis] = {}

        def take(clip: ClipAnalysis) -> None:
            clips[clip.span] = taken(clip)

        analysis: Analysis = self._ask(take, "analyse", path, config, part, scratch)
        return replace(analysis, clips=[clips[clip.span] for clip in analysis.clips])

    def write_clips(self, source: Path, facts: SourceFacts, jobs: Sequence[tuple[ClipSpan, Path]]) -> list[ClipFile]:
        """As writing.write_clips, with the same guards; unfinished files are removed."""
        try:
            written: list[ClipFile] = self._ask(None, "write", source, facts, list(jobs))
        finally:
            for _, target in jobs:
                discard_temporary(target)
        return written

    def _ask(self, take: Callable[[ClipAnalysis], None] | None, *request: Any) -> Any:
        for attempt in range(ATTEMPTS):
            connection = self._start()
            try:
                answer = self._exchange(connection, request, take)
                break
            except (EOFError, ConnectionResetError, BrokenPipeError):
                name = exit_name(self._reap())
                if self._stopped:
                    raise WorkerError("curation was stopped") from None
                if attempt + 1 == ATTEMPTS:
                    raise SourceFailure(f"the decoder crashed ({name})") from None
        if not isinstance(answer, str):
            return answer
        if answer == _NO_MEMORY:
            self.close()  # the next source starts with a fresh heap
        raise SourceFailure(answer)

    def _exchange(
        self, connection: Connection, request: tuple[Any, ...], take: Callable[[ClipAnalysis], None] | None
    ) -> Any:
        limit = left = self.timeout
        try:
            connection.send(request)
            while True:
                started = time.monotonic()
                if left <= 0 or not connection.poll(left):
                    raise SourceFailure(f"not finished after {limit:g} s")
                left -= time.monotonic() - started
                answer = connection.recv()
                if isinstance(answer, float):
                    more = self.timeout * max(0.0, answer / TIMED_SECONDS - 1)
                    limit, left = limit + more, left + more
                    continue
                if take is None or not isinstance(answer, ClipAnalysis):
                    return answer
                take(answer)
        except (EOFError, ConnectionResetError, BrokenPipeError):
            raise
        except BaseException:
            self.close()
            raise

    def _start(self) -> Connection:
        for _ in range(ATTEMPTS + 1):
            if self._stopped:
                raise WorkerError("curation was stopped")
            if self._connection is not None and self._loaded == self._config and self._is_alive():
                return self._connection
            self.close()
            problem = self._launch()
        raise WorkerError(f"a decoding process can't start: {problem}")

    def _is_alive(self) -> bool:
        return self._process is not None and self._process.is_alive()

    def _launch(self) -> str:
        """Start a process and wait until it is ready; returns how it ended if it did. Raises WorkerError."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self.memory, self._config), daemon=True)
        process.start()
        theirs.close()
        self._process, self._connection, self._loaded = process, ours, self._config
        try:
            problem = str(ours.recv())
        except (EOFError, ConnectionResetError):
            return f"it ended with {exit_name(self._reap())}"
        if problem:
            self.close()
            raise WorkerError(f"a decoding process can't start: {problem}")
        return ""

    def _reap(self) -> int | None:
        assert self._process is not None
        self._process.join(5)
        code = self._process.exitcode
        self.close()
        return code

    def stop(self) -> None:
        """End the child process from another thread: a call that waits for it, and every later one, raises WorkerError.

        Without this the source at work would be taken for one that crashes the decoder.
        """
        self._stopped = True
        if (process := self._process) is not None:
            with contextlib.suppress(ValueError, AttributeError):  # closed in this very moment
                process.kill()

    def close(self) -> None:
        """End the child process."""
        if self._process is not None:
            if self._process.is_alive():
                self._process.kill()
            self._process.join()
            self._process.close()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def analyse_guarded(
    path: Path, config: CurationConfig, *, timeout: float = DEFAULT_TIMEOUT, memory: int = DEFAULT_MEMORY
) -> Analysis:
    """Analyse one source in a process of its own; for several, keep one Analyst per worker. Raises SourceFailure."""
    with Analyst(timeout, memory) as analyst:
        return analyst.analyse(path, config)
