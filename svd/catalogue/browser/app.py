"""The page of a catalogue (`svd browse`): look at clips, sort by any score, move thresholds and see what they drop.

The application reads one curation output. It writes only when asked to: the thresholds of the preset file that it was
started with. Comments and order of that file are kept.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from threading import Lock
from typing import Any

import av
import numpy as np
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, select_autoescape
from pydantic import BaseModel
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from svd.catalogue import tables
from svd.catalogue.axes import AXES, OPTIONS
from svd.catalogue.browser.index import SORTABLE, ClipIndex, Verdicts
from svd.catalogue.shards import read_clip_bytes, read_thumbnail
from svd.catalogue.statistics import histogram
from svd.config import FiltersConfig
from svd.config.load import parse_preset
from svd.core.errors import UserError
from svd.core.files import write_text
from svd.core.hosts import refuse_foreign_hosts
from svd.media.shown import shown_rgb

# Codecs that browsers decode; clips of other codecs are transcoded to H.264.
PLAYABLE = {"h264", "vp8", "vp9", "av1"}
PAGE = 48  # clips per request
CACHED_PREVIEWS = 64


class Thresholds(BaseModel):
    """Absolute thresholds by axis name; an axis that is left out is not used."""

    thresholds: dict[str, float] = {}

    def config(self) -> FiltersConfig:
        """Convert to the preset's section of filters; raises HTTPException for an unknown axis."""
        unknown = sorted(set(self.thresholds) - set(OPTIONS))
        if unknown:
            raise HTTPException(422, f"unknown axis {', '.join(unknown)}; known: {', '.join(OPTIONS)}")
        return FiltersConfig.model_validate(
            {OPTIONS[name]: {"absolute": value} for name, value in self.thresholds.items()}
        )


class SaveQuery(Thresholds):
    """A request to save. touched: the axes that were changed on the page; of the others the preset keeps its entries.

    An axis that was switched off is touched and has no threshold.
    """

    touched: list[str]


class ClipsQuery(Thresholds):
    """A request for one page of clips, sorted by a score.

    show: "all", "kept" or "dropped". search: text in source, camera label or captions. offset: clips before the page.
    """

    sort: str = "source_uri"
    descending: bool = False
    show: str = "all"
    search: str = ""
    offset: int = 0


class Previews:
    """The clips of one curation output as browsers play them, with a cache of transcoded clips."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._previews: OrderedDict[str, bytes] = OrderedDict()
        self._lock = Lock()

    def video(self, row: Mapping[str, Any]) -> bytes:
        """Return an mp4 that a browser plays: the clip itself, or an H.264 preview of it."""
        if row["codec"] in PLAYABLE:
            return read_clip_bytes(self.folder, row)
        name = row["clip_id"]
        with self._lock:
            if name not in self._previews:
                self._previews[name] = transcode(read_clip_bytes(self.folder, row))
                if len(self._previews) > CACHED_PREVIEWS:
                    self._previews.popitem(last=False)
            return self._previews[name]


def transcode(data: bytes) -> bytes:
    """Encode a clip that browsers can't play as H.264 mp4: yuv420p, at most 640 wide, index at the front."""
    with contextlib.ExitStack() as stack:
        # A file, not a buffer: moving the index to the front needs output that can be read again.
        target = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "preview.mp4"
        source = stack.enter_context(av.open(io.BytesIO(data), "r"))
        out = av.open(str(target), "w", options={"movflags": "faststart"})
        stack.callback(out.close)
        video = source.streams.video[0]
        rate = video.average_rate or Fraction(25)
        stream = out.add_stream("libx264", rate=rate, options={"preset": "veryfast", "bf": "0"})
        stream.pix_fmt = "yuv420p"
        for number, image in shown_rgb(source):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if number == 0:
                scale = min(1.0, 640 / frame.width)
                stream.width, stream.height = (max(2, int(n * scale) // 2 * 2) for n in (frame.width, frame.height))
            small = frame.reformat(stream.width, stream.height, "yuv420p")
            small.pts, small.time_base = number, 1 / rate
            out.mux(stream.encode(small))
        out.mux(stream.encode())
        out.close()
        return target.read_bytes()


def range_response(data: bytes, header: str | None, kind: str) -> Response:
    """Answer with `data`, or with the part that a Range header asks for: without ranges browsers can't seek.

    header: the value of the Range header. kind: media type. Raises HTTPException 416 for a range outside the data.
    """
    headers = {"Accept-Ranges": "bytes"}
    if not header or not header.startswith("bytes=") or "," in header:
        return Response(data, media_type=kind, headers=headers)
    first, _, last = header.removeprefix("bytes=").partition("-")
    try:
        start = int(first) if first else max(0, len(data) - int(last))
        stop = min(len(data), int(last) + 1) if first and last else len(data)
    except ValueError:
        raise HTTPException(416, "unreadable range") from None
    if start >= stop:
        raise HTTPException(416, "range outside the clip", {"Content-Range": f"bytes */{len(data)}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
    return Response(data[start:stop], 206, headers, kind)


def save_thresholds(preset: Path, query: SaveQuery) -> None:
    """Write absolute thresholds into `curation.filters` of a preset file, atomically; its comments are kept.

    Of the axes in `query.touched`, one without a threshold is removed. What nobody touched stays as it is: a quantile
    doesn't become its present value. Raises UserError when the result would not be a valid preset.
    """
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    values = yaml.load(preset.read_text())
    section = values.setdefault("curation", CommentedMap()).setdefault("filters", CommentedMap())
    wanted = query.config().model_dump(exclude_none=True)
    for axis in (axis for axis in AXES if axis.name in query.touched):
        if axis.option in wanted:
            entry = CommentedMap({"absolute": float(f"{wanted[axis.option]['absolute']:.6g}")})
            entry.fa.set_flow_style()
            section[axis.option] = entry
        else:
            section.pop(axis.option, None)
    text = io.StringIO()
    yaml.dump(values, text)
    parse_preset(YAML(typ="safe").load(text.getvalue()), str(preset))
    write_text(preset, text.getvalue())


def create_app(folder: Path, preset: Path | None = None) -> FastAPI:
    """Make the application for one curation output; with `preset` the page can save thresholds to that file.

    Raises UserError when there is no catalogue.
    """
    data, previews = ClipIndex(folder), Previews(folder)
    app = FastAPI(title="SVD clip catalogue", docs_url=None, redoc_url=None)
    refuse_foreign_hosts(app)
    page = Environment(loader=PackageLoader("svd.catalogue"), autoescape=select_autoescape()).get_template(
        "browse.html"
    )
    state = {"axes": _axes(folder), "thresholds": _current(folder), "total": len(data), "page": PAGE, "sorts": SORTABLE}

    def row(clip_id: str) -> dict[str, Any]:
        found = data.find(clip_id)
        if found is None:
            raise HTTPException(404, f"no clip {clip_id}")
        return found

    @app.get("/", response_class=HTMLResponse)
    def index() -> str:
        name = f"{folder.resolve().parent.name}/{folder.name}"
        return page.render(folder=name, preset=preset.name if preset else "", state=state)

    @app.post("/api/counts")
    def counts(query: Thresholds) -> dict[str, Any]:
        return count_verdicts(data.judge(query.config()))

    @app.post("/api/clips")
    def clips(query: ClipsQuery) -> dict[str, Any]:
        return clips_page(data, query)

    @app.get("/clips/{clip_id}.mp4")
    def video(clip_id: str, request: Request) -> Response:
        return range_response(previews.video(row(clip_id)), request.headers.get("range"), "video/mp4")

    @app.get("/clips/{clip_id}.jpg")
    def thumbnail(clip_id: str) -> Response:
        jpeg = read_thumbnail(folder, row(clip_id))
        return Response(jpeg, media_type="image/jpeg", headers={"Cache-Control": "max-age=3600"})

    @app.post("/api/save")
    def save(query: SaveQuery) -> dict[str, str]:
        if preset is None:
            raise HTTPException(409, "start `svd browse` with --preset FILE to save thresholds")
        try:
            save_thresholds(preset, query)
        except (UserError, ValueError, OSError) as error:
            raise HTTPException(409, str(error)) from None
        return {"saved": preset.name}

    return app


def _axes(folder: Path) -> list[dict[str, Any]]:
    """Describe every axis that has scores for the page: name, column, side, title, unit, histogram."""
    found = []
    for axis in AXES:
        every, _, edges = histogram(tables.scan_clips(folder), axis.column)
        if len(every):
            described = {
                "name": axis.name,
                "column": axis.column,
                "side": axis.side,
                "title": axis.title,
                "unit": axis.unit,
            }
            found.append({**described, "counts": every.tolist(), "edges": edges.tolist()})
    return found


def _current(folder: Path) -> dict[str, float]:
    """Read the thresholds that the catalogue was judged with from its funnel."""
    path = folder / "funnel.json"
    if not path.is_file():
        return {}
    thresholds: dict[str, float] = json.loads(path.read_text())["thresholds"]
    return thresholds


def count_verdicts(verdicts: Verdicts) -> dict[str, Any]:
    """Count the clips that are kept and dropped, and those that each axis drops on its own."""
    kept = int(verdicts.keep.sum())
    axes = {name: {"drops": drops} for name, drops in verdicts.drops.items()}
    return {"kept": kept, "dropped": len(verdicts.keep) - kept, "axes": axes}


def clips_page(data: ClipIndex, query: ClipsQuery) -> dict[str, Any]:
    """Return a page of clips with the verdicts of the thresholds, and the counts of `count_verdicts`.

    Raises HTTPException for a column that can't be sorted by.
    """
    if query.sort not in SORTABLE:
        raise HTTPException(422, f"can't sort by '{query.sort}'; known: {', '.join(SORTABLE)}")
    verdicts = data.judge(query.config())
    order = data.order(query.sort, query.descending)
    if query.show in ("kept", "dropped"):
        order = order[verdicts.keep[order] == (query.show == "kept")]
    if query.search:
        order = order[data.matching(query.search.lower())[order]]
    numbers = [int(number) for number in order[query.offset : query.offset + PAGE]]
    shown = [_public(row) for row in data.page(numbers, verdicts)]
    return {**count_verdicts(verdicts), "matching": len(order), "clips": shown}


def _public(row: dict[str, Any]) -> dict[str, Any]:
    """Replace NaN and infinity by null: JSON has neither."""
    return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in row.items()}
