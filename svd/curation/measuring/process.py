"""Analysing untrusted sources in a child process with limits on time and memory.

A decoder that hangs, crashes or eats memory takes only its own process down: the source gets a reason, the run goes on.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from svd.config import CurationConfig
from svd.core.errors import UserError
from svd.core.files import discard_temporary
from svd.curation.base.child_process import exit_name, receive
from svd.curation.base.messages import (
    Analyse,
    ClipFound,
    CountParts,
    Done,
    Failed,
    OutOfMemory,
    Ready,
    VideoLength,
    WriteClips,
)
from svd.curation.base.types import (
    ClipAnalysis,
    ClipFile,
    ClipSpan,
    Seconds,
    SourceAnalysis,
    SourceFacts,
    SourceFailure,
)
from svd.curation.measuring.child import serve_requests
from svd.curation.measuring.decode_pass import Taken
from svd.curation.measuring.parts import WHOLE, Part

DEFAULT_TIMEOUT = 3600.0  # seconds for half an hour of video or less
TIMED_SECONDS = 1800.0
DEFAULT_MEMORY = 2 << 30  # bytes that requests may add to a fresh process
ATTEMPTS = 2  # a process may be killed without fault of the source, as when the machine runs out of memory

Take = Callable[[ClipAnalysis], None]


class WorkerError(UserError):
    """No process can be had, whatever the source: it can't start, or the run is being ended."""


class DecodeProcess:
    """A child process that analyses sources one at a time and is replaced when it hangs, crashes or needs more memory.

    timeout: seconds for half an hour of video or less; longer videos get more in proportion.
    memory: bytes that a source may need beyond the empty process.

    A source on which the process dies is tried once more. The child ends when this process does, however that happens.
    Methods raise SourceFailure for what is wrong with a source, and WorkerError when no process can be had.

        with DecodeProcess() as decoding:
            analysis = decoding.analyse(path, config)
    """

    def __init__(self, timeout: float = DEFAULT_TIMEOUT, memory: int = DEFAULT_MEMORY) -> None:
        self.timeout, self.memory = timeout, memory
        self._config: CurationConfig | None = None  # of the latest request: its networks must be loaded
        self._loaded: CurationConfig | None = None  # whose networks the process has loaded
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None
        self._stopped = False

    def count_parts(self, path: Path, config: CurationConfig) -> int:
        """Count the parts of a source as `parts.count_parts` does."""
        self._config = config
        count: int = self._ask(CountParts(path, config))
        return count

    def analyse(
        self,
        path: Path,
        config: CurationConfig,
        taken: Taken = lambda clip: clip,
        part: Part = WHOLE,
        scratch: Path | None = None,
        spans: Sequence[Seconds] = (),
    ) -> SourceAnalysis:
        """Analyse a source as `parts.analyse_part` does, and detect text and score the measured axes.

        `taken` is called in this process.
        """
        self._config = config
        clips: dict[ClipSpan, ClipAnalysis] = {}

        def take(clip: ClipAnalysis) -> None:
            clips[clip.span] = taken(clip)

        analysis: SourceAnalysis = self._ask(Analyse(path, config, part, scratch, tuple(spans)), take)
        return replace(analysis, clips=[clips[clip.span] for clip in analysis.clips])

    def write_clips(self, source: Path, facts: SourceFacts, jobs: Sequence[tuple[ClipSpan, Path]]) -> list[ClipFile]:
        """Write clips as `writer.write_clips` does; unfinished files are removed."""
        try:
            written: list[ClipFile] = self._ask(WriteClips(source, facts, tuple(jobs)))
        finally:
            for _, target in jobs:
                discard_temporary(target)
        return written

    def _ask(self, request: CountParts | Analyse | WriteClips, take: Take | None = None) -> Any:
        """Return the result of a request; raises SourceFailure or WorkerError."""
        match self._try(request, take):
            case Done(result):
                return result
            case Failed(reason):
                raise SourceFailure(reason)
            case OutOfMemory():
                self.close()  # the next source starts with a fresh heap
                raise SourceFailure("more memory needed than allowed")

    def _try(self, request: CountParts | Analyse | WriteClips, take: Take | None) -> Done | Failed | OutOfMemory:
        """Send a request to a process, and to a new one when the first dies over it."""
        for attempt in range(ATTEMPTS):
            connection = self._start()
            try:
                return self._exchange(connection, request, take)
            except (EOFError, BrokenPipeError):
                name = exit_name(self._reap())
                if self._stopped:
                    raise WorkerError("curation was stopped") from None
                if attempt + 1 == ATTEMPTS:
                    raise SourceFailure(f"the decoder crashed ({name})") from None
        raise AssertionError("unreachable")

    def _exchange(
        self, connection: Connection, request: CountParts | Analyse | WriteClips, take: Take | None
    ) -> Done | Failed | OutOfMemory:
        """Send a request and handle progress until the answer comes; the process ends when it takes too long."""
        limit = left = self.timeout
        try:
            connection.send(request)
            while True:
                started = time.monotonic()
                if left <= 0 or not connection.poll(left):
                    raise SourceFailure(f"not finished after {limit:g} s")
                left -= time.monotonic() - started
                match receive(connection):
                    case VideoLength(seconds):
                        more = self.timeout * max(0.0, seconds / TIMED_SECONDS - 1)
                        limit, left = limit + more, left + more
                    case ClipFound(clip):
                        assert take is not None
                        take(clip)
                    case answer:
                        return answer
        except (EOFError, BrokenPipeError):
            raise
        except BaseException:
            self.close()  # the child is still busy with the request
            raise

    def _start(self) -> Connection:
        """Return the connection to a living process with the networks of the latest request; raises WorkerError."""
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
        """Start a process and wait until it is ready; return how it ended if it died meanwhile.

        Raises WorkerError when the process says why it can't start.
        """
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve_requests, args=(theirs, self.memory, self._config), daemon=True)
        process.start()
        theirs.close()
        self._process, self._connection, self._loaded = process, ours, self._config
        try:
            message = receive(ours)
        except EOFError:
            return f"it ended with {exit_name(self._reap())}"
        match message:
            case Failed(reason):
                self.close()
                raise WorkerError(f"a decoding process can't start: {reason}")
            case Ready():
                return ""
        raise AssertionError(f"unexpected message {message}")

    def _reap(self) -> int | None:
        """Wait for a process that ended and return its exit code."""
        assert self._process is not None
        self._process.join(5)
        code = self._process.exitcode
        self.close()
        return code

    def stop(self) -> None:
        """End the child from another thread: the call that waits for it and all later ones raise WorkerError.

        Without this flag the source at work would be blamed for the crash.
        """
        self._stopped = True
        if (process := self._process) is not None:
            with contextlib.suppress(ValueError, AttributeError):  # it was closed at this very moment
                process.kill()

    def close(self) -> None:
        """End the child process; the next request starts a new one."""
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
) -> SourceAnalysis:
    """Analyse one source in a child process; for several, keep one DecodeProcess per thread. Raises SourceFailure."""
    with DecodeProcess(timeout, memory) as decoding:
        return decoding.analyse(path, config)
