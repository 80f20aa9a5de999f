"""The dry run: what a curation would do, and what it would cost at measured rates, without decoding anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av

from svd.config import CurationConfig
from svd.curation.sources import Source

# CPU-seconds a second of video, measured with benchmarks/curation and benchmarks/text on one core of an EPYC (Zen 3):
# one pass over h264 at 720p, and a text detection; see the README of the benchmarks for other sizes.
PASS_PER_MEGAPIXEL_SECOND = 0.10
TEXT_SECONDS = 0.035
CLIP_SECONDS = 8.0  # mean length of a clip, for the number of clips
FRAMES_A_CLIP = 3


@dataclass(frozen=True)
class Plan:
    """Totals of a dry run; `unknown` sources could not be probed (remote or broken) and are not in the hours."""

    sources: int
    unknown: int
    units: int
    hours: float
    gigabytes: float
    clips: int
    cpu_hours: float
    wall_hours: float

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"sources     {self.sources:,} ({self.unknown:,} not probed: remote or unreadable)",
            f"units       {self.units:,}",
            f"video       {self.hours:,.2f} h, {self.gigabytes:,.2f} GB",
            f"clips       about {self.clips:,}",
            f"CPU         about {self.cpu_hours:,.3f} core-hours without large networks",
            f"time        about {self.wall_hours:,.3f} h with the preset's workers",
        ]


def plan(sources: Sequence[Source], config: CurationConfig, sources_per_unit: int) -> Plan:
    """Probe the headers of all local sources and add up."""
    seconds = cpu = size = 0.0
    unknown = long = parts = 0
    for source in sources:
        facts = _probe(source.path) if source.path is not None and source.offset is None else None
        if facts is None:
            unknown += 1
            continue
        duration, megapixels, size_bytes = facts
        frames_rate = TEXT_SECONDS * FRAMES_A_CLIP / CLIP_SECONDS
        if (count := round(duration / config.part_seconds)) > 1:
            long, parts = long + 1, parts + count
        seconds += duration
        size += size_bytes
        cpu += duration * (PASS_PER_MEGAPIXEL_SECOND * megapixels + frames_rate)
    return Plan(
        sources=len(sources),
        unknown=unknown,
        units=-(-(len(sources) - long) // sources_per_unit) + parts,
        hours=seconds / 3600,
        gigabytes=size / 1e9,
        clips=round(seconds / CLIP_SECONDS),
        cpu_hours=cpu / 3600,
        wall_hours=cpu / 3600 / config.workers,
    )


def _probe(path: Path) -> tuple[float, float, int] | None:
    """Duration in seconds, megapixels a frame and bytes, from the header; None when it can't be read."""
    try:
        with av.open(str(path), "r") as container:
            video = container.streams.video[0]
            if container.duration is None:
                return None
            return container.duration / 1e6, video.width * video.height / 1e6, path.stat().st_size
    except (av.FFmpegError, OSError, IndexError):
        return None
