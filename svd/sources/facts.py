"""What sidecars, members of tars and rows of lists say of a video: captions, licence, everything else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from svd.core.addresses import public_values
from svd.sources.source import SceneCaption, Source, Span, printable
from svd.sources.spans import as_list, take, take_spans

URI_NAMES = ("uri", "url", "path", "video", "video_path", "video_url", "contentUrl", "file")
CAPTION_NAMES = ("caption", "text", "description", "name", "title")
LICENCE_NAMES = ("licence", "license")


def with_sidecar(source: Source, values: Mapping[str, Any]) -> Source:
    """Add what `values` say of the whole source.

    These are its captions (`caption`, a text or a list of texts; `scenes`: start_seconds, end_seconds, caption), its
    licence and metadata.
    """
    values = dict(values)
    captions = [SceneCaption(text) for text in _texts(take(values, CAPTION_NAMES))]
    scenes = values.pop("scenes", [])
    for scene in scenes if isinstance(scenes, list) else []:
        if isinstance(scene, dict):
            ends = (_seconds(scene, side) for side in ("start", "end"))
            captions += [SceneCaption(text, *ends) for text in _texts(scene.get("caption"))[:1]]
    licence, metadata = _rest(values)
    return replace(
        source,
        captions=tuple(dict.fromkeys((*source.captions, *captions))),
        licence=licence or source.licence,
        metadata={**source.metadata, **metadata},
    )


def with_row(source: Source, values: Mapping[str, Any]) -> Source:
    """Add what the row of a list says: of the whole source, or of the spans that it names.

    Raises ValueError for a span that can't be read, or where there are not as many captions as spans.
    """
    values = dict(values)
    pairs = take_spans(values)
    if not pairs:
        return with_sidecar(source, values)
    texts = take(values, CAPTION_NAMES)
    licence, metadata = _rest(values)
    spans = [Span(*pair, own, licence, metadata) for pair, own in zip(pairs, _shared(texts, len(pairs)), strict=True)]
    return replace(source, spans=(*source.spans, *spans))


def _shared(value: Any, spans: int) -> list[tuple[str, ...]]:
    """Return the captions of each of a row's spans: one each, or several of the only one."""
    texts = as_list(value)
    if spans == 1 or value is None:
        return [tuple(_texts(value))] * spans
    if texts is None or len(texts) != spans:
        raise ValueError(f"{spans} spans, but {1 if texts is None else len(texts)} captions")
    return [tuple(_texts(text)) for text in texts]


def _texts(value: Any) -> list[str]:
    """Return a caption, or the captions of a list of texts, also of one that is written as text."""
    texts = as_list(value)
    if texts is None or not all(text is None or isinstance(text, str) for text in texts):
        texts = [value]
    return [printable(str(text)) for text in texts if text]


def _rest(values: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Return the licence, and the other columns without credentials and without those that say nothing."""
    licence = take(values, LICENCE_NAMES)
    named = {name.lower() for name in (*URI_NAMES, *CAPTION_NAMES, *LICENCE_NAMES)}  # an empty one says nothing
    known = public_values(values)
    metadata = {k: v for k, v in known.items() if v or (v is not None and k.lower() not in named)}
    return printable(str(licence)) if licence else None, metadata


def _seconds(scene: Mapping[str, Any], side: str) -> float:
    value = scene.get(f"{side}_seconds", scene.get(side))
    return float(value) if isinstance(value, int | float) else (0.0 if side == "start" else float("inf"))
