"""One raw video as listing finds it: its place, and what lists, tars and sidecars say of it.

`as_rows` writes a source as rows of a list (svd/sources/listing.py reads them back as the same source).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from svd.sources.spans import SPAN, names_a_span

PRIVATE = "credentials_left_out"  # the column of a gathered list that says so


@dataclass(frozen=True)
class SceneCaption:
    """A caption that came with a source: of the whole source, or of the seconds [start, end)."""

    text: str
    start: float = 0.0
    end: float = float("inf")


@dataclass(frozen=True)
class Span:
    """The seconds [start, end) of a source that a list names as a clip, with what it says of them alone.

    Unlike a `SceneCaption` it decides where clips begin and end: none crosses its ends, and what lies outside of all
    spans of a source becomes no clip. Seconds count from the first frame.
    """

    start: float
    end: float
    captions: tuple[str, ...] = ()
    licence: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """One raw video. `uri` names it in the catalogue; `path` is where it (or its tar) lies when that is local.

    archive, offset: the tar that holds it, a path or address, and where in it; header: by which a tar is noticed that
    became another one (svd.sources.tars.header_hash); size: its bytes, where they are known. private: credentials were
    left out of uri and archive (svd/core/addresses.py); address: the full address to fetch from, where that is known.
    spans: the clips that a list names in it; none: all of it. skipped: why it is not curated; empty if it is.
    """

    uri: str
    path: Path | None = None
    split: str = ""
    captions: tuple[SceneCaption, ...] = ()
    spans: tuple[Span, ...] = ()
    licence: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    offset: int | None = None
    size: int | None = None
    archive: str | None = None
    header: str | None = None
    private: bool = False
    address: str | None = field(default=None, repr=False)
    skipped: str = ""

    @property
    def origin(self) -> Path | str:
        """Return where its bytes, or the tar with them, are read from; credentials included, so for reading alone."""
        return self.path or self.address or self.archive or self.uri

    @property
    def remote(self) -> bool:
        """True when the bytes must be fetched first."""
        return self.path is None

    @property
    def described(self) -> bool:
        """Whether anything but its place is known of the whole of it."""
        return bool(self.captions or self.licence or self.metadata)


def joined(entries: Sequence[Source]) -> Source:
    """Join the entries that name one video: all captions and spans, each once.

    Place, licence and metadata are those of the first entry that has captions, a licence or metadata.
    """
    if len(entries) == 1:
        return entries[0]
    first = next((one for one in entries if one.described), entries[0])
    captions = dict.fromkeys(chain(first.captions, *(one.captions for one in entries)))
    spans: dict[tuple[float, float], Span] = {}
    for span in chain.from_iterable(one.spans for one in entries):
        known = spans.setdefault((span.start, span.end), span)
        texts = tuple(dict.fromkeys((*known.captions, *span.captions)))
        spans[span.start, span.end] = replace(known, captions=texts)
    return replace(first, captions=tuple(captions), spans=tuple(spans[ends] for ends in sorted(spans)))


def printable(text: str) -> str:
    """Escape what is no Unicode (a file name in another encoding, a lone surrogate), so that `text` can be stored."""
    return text.encode("utf-8", "backslashreplace").decode()


def as_rows(source: Source) -> Iterable[dict[str, Any]]:
    """Return `source` as rows of a list that mean the same wherever the list lies: local paths become absolute.

    There is one row for each of its spans, and one for the whole of it unless there is nothing to say of that.
    """
    place = _place(source)
    if source.described or not source.spans:
        yield _whole(source) | place
    for span in source.spans:
        end = [span.end] if span.end < float("inf") else []
        said = {"caption": list(span.captions), "licence": span.licence}
        yield {
            **span.metadata,
            **place,
            SPAN: [span.start, *end],
            **{name: value for name, value in said.items() if value},
        }


def _place(source: Source) -> dict[str, Any]:
    row: dict[str, Any] = {"uri": source.uri} | ({PRIVATE: True} if source.private else {})
    if source.archive is not None:
        archive = source.archive if source.path is None else str(source.path.absolute())
        row |= {"archive": archive, "offset": source.offset, "size": source.size, "header": source.header}
        row |= {"skipped": source.skipped} if source.skipped else {}
    elif source.path is not None:
        row["uri"] = str(source.path.absolute())
    return row


def _whole(source: Source) -> dict[str, Any]:
    """Return the columns that say something of the whole source."""
    row = dict(source.metadata)
    if names_a_span(row):
        row[SPAN] = []  # a sidecar's `start` is no span, and stays none when it stands in a list
    whole = [caption for caption in source.captions if caption == SceneCaption(caption.text)]
    if whole:
        row["caption"] = whole[0].text
    if scenes := [_scene(caption) for caption in source.captions if caption not in whole[:1]]:
        row["scenes"] = scenes
    return row | ({"licence": source.licence} if source.licence else {})


def _scene(caption: SceneCaption) -> dict[str, Any]:
    scene: dict[str, Any] = {"caption": caption.text, "start_seconds": caption.start}
    return scene | ({"end_seconds": caption.end} if caption.end < float("inf") else {})
