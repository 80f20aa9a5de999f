"""The dry run: estimates what a curation would do and cost, from headers and measured rates, without decoding."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

import av
from rich.console import Console
from rich.progress import track

from svd import storage
from svd.config import CurationConfig, EncodersConfig
from svd.core.errors import UserError
from svd.curation.base.types import SourceFailure
from svd.curation.captions.registry import NETWORK_CAPTIONERS
from svd.curation.decoding.probe import open_stream, open_video
from svd.sources.source import Source

# CPU seconds per second of video, measured with benchmarks/curation and benchmarks/text on one core of an EPYC (Zen 3):
# one decode pass over H.264 at 720p, and one text detection.
PASS_PER_MEGAPIXEL_SECOND = 0.10
TEXT_SECONDS = 0.035
CLIP_SECONDS = 8.0  # mean length of a clip, for the number of clips
FRAMES_PER_CLIP = 3
# CPU seconds per frame of networks measured on the same core, in float32, without preprocessing. CoCa: with all 30
# tokens of its beam search, which ends earlier for most images.
EMBEDDING_SECONDS = {"ViT-B-32": 0.11, "ViT-L-14": 1.9, "ViT-H-14": 4.0}
COCA_SECONDS = {"coca_ViT-L-14": 38.0}
REMOTE_PROBES = 64  # remote sources whose headers are read, evenly spread; the others are estimated from all headers
PROBE_BLOCK = 256 << 10


@dataclass(frozen=True)
class HeaderFacts:
    """HeaderFacts from a header: seconds, megapixels per frame, bytes."""

    seconds: float
    megapixels: float
    size: int

    @property
    def cpu(self) -> float:
        """Estimate the CPU seconds without large networks."""
        return self.seconds * (
            PASS_PER_MEGAPIXEL_SECOND * self.megapixels + TEXT_SECONDS * FRAMES_PER_CLIP / CLIP_SECONDS
        )


@dataclass(frozen=True)
class Plan:
    """Totals of a dry run.

    unknown: sources whose header was not read. Remote ones are `estimated` from the others; broken ones cost nothing.
    hours, gigabytes: of the probed sources alone; the other totals include the estimated sources.
    networks: rows about the cost of each network, for people.
    """

    sources: int
    unknown: int
    estimated: int
    units: int
    hours: float
    estimated_hours: float
    gigabytes: float
    download_gigabytes: float
    clips: int
    cpu_hours: float
    wall_hours: float
    networks: tuple[tuple[str, str], ...]

    def lines(self) -> list[str]:
        """Format the totals for people."""
        probed, broken = self.sources - self.unknown, self.unknown - self.estimated
        parts = [f"{probed:,} probed", f"{self.estimated:,} estimated from those", f"{broken:,} unreadable"]
        shown = [
            ("sources", f"{self.sources:,} ({', '.join(part for part in parts if not part.startswith('0 '))})"),
            ("units", f"{self.units:,}"),
        ]
        if not probed:
            return _table([*shown, ("video", "not known: no header could be read, so costs can't be told")])
        more = f", and about {_time(self.estimated_hours)} estimated by bytes" if self.estimated else ""
        shown += [
            ("video", f"{_time(self.hours)}, {_bytes(self.gigabytes)}{more}"),
            ("clips", f"about {self.clips:,}"),
            ("CPU", f"about {_time(self.cpu_hours)} of one core without large networks"),
            *self.networks,
            ("time", f"about {_time(self.wall_hours)} with the preset's workers, without captions and downloads"),
        ]
        if self.download_gigabytes:
            hour = _time(self.download_gigabytes * 8 / 3600)
            shown.append(("download", f"about {_bytes(self.download_gigabytes)}, {hour} at 1 Gbit/s"))
        return _table(shown)


def plan_curation(
    sources: Sequence[Source],
    config: CurationConfig,
    sources_per_unit: int,
    encoders: EncodersConfig,
    workers: int = 1,
) -> Plan:
    """Probe the headers of local sources, of members of tars and of some remote sources, and add up.

    sources_per_unit: `sources.sources_per_shard` of the preset. workers: decoding processes side by side.
    """
    sources = [source for source in sources if not source.skipped]
    facts = _probe_all(sources)
    known = [one for one in facts if one is not None]
    counts = [_parts(source, one, config) for source, one in zip(sources, facts, strict=True)]
    whole = sum(count == 1 for count in counts)
    remote = [source for source, one in zip(sources, facts, strict=True) if one is None and source.remote]
    guessed = [_guess(source, known) for source in remote] if known else []
    everything = [*known, *guessed]
    clips = round(sum(one.seconds for one in everything) / CLIP_SECONDS)
    cpu = sum(one.cpu for one in everything) / 3600
    embedding = _embedding_seconds(encoders) * FRAMES_PER_CLIP * clips / 3600
    fetched = [one for source, one in zip(sources, facts, strict=True) if one is not None and source.remote]
    return Plan(
        sources=len(sources),
        unknown=len(sources) - len(known),
        estimated=len(remote),
        units=-(-whole // sources_per_unit) + sum(count for count in counts if count > 1),
        hours=sum(one.seconds for one in known) / 3600,
        estimated_hours=sum(one.seconds for one in guessed) / 3600,
        gigabytes=sum(one.size for one in known) / 1e9,
        download_gigabytes=sum(one.size for one in [*fetched, *guessed]) / 1e9,
        clips=clips,
        cpu_hours=cpu,
        wall_hours=max(cpu / workers, embedding),
        networks=_networks(config, encoders, clips),
    )


def _parts(source: Source, facts: HeaderFacts | None, config: CurationConfig) -> int:
    """Estimate into how many parts a source is split; 1: it shares a unit."""
    return 1 if facts is None or source.remote else max(1, round(facts.seconds / config.part_seconds))


def _guess(source: Source, known: Sequence[HeaderFacts]) -> HeaderFacts:
    """Estimate a source from the known ones: by their seconds per byte if its size is known, else by their mean."""
    seconds, size = sum(one.seconds for one in known), sum(one.size for one in known)
    megapixels = sum(one.seconds * one.megapixels for one in known) / seconds if seconds else 0.0
    if source.size is None or not size:
        return HeaderFacts(seconds / len(known), megapixels, size // len(known))
    return HeaderFacts(seconds * source.size / size, megapixels, source.size)


def _embedding_seconds(encoders: EncodersConfig) -> float:
    return EMBEDDING_SECONDS.get(encoders.model, 0.0) if encoders.kind == "open_clip" else 0.0


def _networks(config: CurationConfig, encoders: EncodersConfig, clips: int) -> tuple[tuple[str, str], ...]:
    """List the networks that the preset names, with their cost on one core where that was measured."""
    captions = config.captions
    rows = []
    if encoders.kind == "open_clip":
        rows.append((f"CLIP {encoders.model}", "about", _embedding_seconds(encoders) * FRAMES_PER_CLIP))
    if "coca" in captions.captioners:
        rows.append((f"CoCa {captions.coca_model}", "up to", COCA_SECONDS.get(captions.coca_model, 0.0)))
    others = (name for name in NETWORK_CAPTIONERS if name in captions.captioners and name != "coca")
    rows += [(f"{name} captioner", "", 0.0) for name in others]
    measured = "{} {} of one core; runs on a GPU when there is one"
    return tuple(
        ("networks", f"{name}: " + (measured.format(word, _time(cost * clips / 3600)) if cost else "cost not measured"))
        for name, word, cost in rows
    )


def _probe_all(sources: Sequence[Source]) -> list[HeaderFacts | None]:
    """Read the headers of the sources; None for those that were skipped or can't be read."""
    remote = [index for index, source in enumerate(sources) if source.remote and source.size is not None]
    step = max(1, -(-len(remote) // REMOTE_PROBES))
    skipped = {index for index, source in enumerate(sources) if source.remote} - set(remote[::step])
    numbered = track(list(enumerate(sources)), "reading headers", console=Console(stderr=True), transient=True)
    return [None if index in skipped else _probe(source) for index, source in numbered]


def _probe(source: Source) -> HeaderFacts | None:
    """Read the header of a source; None when it can't be read."""
    try:
        if source.path is not None and source.archive is None:
            with open_video(source.path) as opened:
                return _header(*opened, source.path.stat().st_size)
        offset, size = source.offset or 0, source.size or 0
        with (
            storage.open_read(source.origin, PROBE_BLOCK) as stream,
            open_stream(_Window(stream, offset, size)) as opened,
        ):
            return _header(*opened, size)
    except (SourceFailure, av.FFmpegError, OSError, UserError):
        return None


def _header(container: av.container.InputContainer, video: av.VideoStream, size: int) -> HeaderFacts | None:
    if container.duration is None:
        return None
    return HeaderFacts(container.duration / av.time_base, video.width * video.height / 1e6, size)


class _Window:
    """A file for PyAV over `size` bytes at `offset` of a stream."""

    def __init__(self, stream: BinaryIO, offset: int, size: int) -> None:
        self._stream, self._offset, self._size, self._position = stream, offset, size, 0

    def read(self, count: int) -> bytes:
        """Read up to `count` bytes."""
        self._stream.seek(self._offset + self._position)
        data = self._stream.read(max(0, min(count, self._size - self._position)))
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position and return it."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    return [f"{name:<11} {text}" for name, text in rows]


def _time(hours: float) -> str:
    seconds = hours * 3600
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if hours < 1 else f"{hours:,.1f} h"


def _bytes(gigabytes: float) -> str:
    if gigabytes < 1e-3:
        return f"{gigabytes * 1e6:,.0f} kB"
    return f"{gigabytes * 1e3:,.1f} MB" if gigabytes < 1 else f"{gigabytes:,.1f} GB"
