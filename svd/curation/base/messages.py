"""Messages between a run and its child processes.

A child sends `Ready` once, or why it can't start. Then it takes requests one at a time: `CountParts`, `Analyse` and
`WriteClips` (decoding process) or `ScoreUnit` and `Stop` (scoring process). It may send progress, `VideoLength` and
`ClipFound`, before the answer: `Done`, `Failed`, `OutOfMemory` or `Raised`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svd.config import CurationConfig
from svd.curation.base.types import ClipAnalysis, ClipSpan, Seconds, SourceFacts


@dataclass(frozen=True)
class CountParts:
    """Ask into how many parts the source at `path` is split; `Done.result` is the number."""

    path: Path
    config: CurationConfig


@dataclass(frozen=True)
class Analyse:
    """Ask for the analysis of one part (its number, and of how many) of the source at `path`.

    scratch: where the packets of the part may be copied to. spans: the clips that a list names. `ClipFound` is sent per
    clip; `Done.result` is the `SourceAnalysis`.
    """

    path: Path
    config: CurationConfig
    part: tuple[int, int]
    scratch: Path | None
    spans: tuple[Seconds, ...] = ()


@dataclass(frozen=True)
class WriteClips:
    """Ask for clips of the source at `path` as files; `Done.result` is a list of `ClipFile`."""

    path: Path
    facts: SourceFacts
    jobs: tuple[tuple[ClipSpan, Path], ...]

    @property
    def seconds(self) -> float:
        """Total length of the clips."""
        return float(sum(span.end_seconds - span.start_seconds for span, _ in self.jobs))


@dataclass(frozen=True)
class ScoreUnit:
    """Ask for the scores of the unit in `measured`; shards of about `shard_bytes` go to `folder`."""

    measured: Path
    folder: Path
    shard_bytes: int


@dataclass(frozen=True)
class Stop:
    """Ask the child to end."""


@dataclass(frozen=True)
class Ready:
    """The child has loaded everything and takes requests."""


@dataclass(frozen=True)
class VideoLength:
    """The request is about `seconds` of video: the parent waits longer for long videos."""

    seconds: float


@dataclass(frozen=True)
class ClipFound:
    """A clip of the source is complete."""

    clip: ClipAnalysis


@dataclass(frozen=True)
class Done:
    """The request is done."""

    result: Any = None


@dataclass(frozen=True)
class Failed:
    """There is no result; `reason` is one readable line."""

    reason: str


@dataclass(frozen=True)
class OutOfMemory:
    """There is no result because the memory limit was reached; the child should be replaced."""


@dataclass(frozen=True)
class Raised:
    """There is no result; `error` is to be raised in the parent."""

    error: Exception
