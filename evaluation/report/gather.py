"""The content of the report, read from the output folders of the other stages. What is missing is named there."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image  # not cv2: it tells an image's width without decoding it, and reads and writes bytes

from evaluation.report.charts import Bar, Dot, Series
from evaluation.report.claims import ClaimGroup, gather_claims
from svd.catalogue.axes import AXES
from svd.core.errors import UserError

# The inputs of the stage `report`, in the order of the page.
STAGES = {
    "sources": "Sources",
    "curation": "Curation",
    "autoencoder": "Autoencoder",
    "latents": "Latents",
    "image-pretraining": "Image pretraining",
    "video-pretraining": "Video pretraining",
    "high-quality-finetuning": "High-quality finetuning",
    "image-to-video": "Image to video",
    "multiview-finetuning": "Multi-view finetuning",
    "ucf101-evaluation": "UCF-101 evaluation",
    "recognition-evaluation": "Recognition of prompts",
    "image-to-video-evaluation": "Image to video, evaluated",
    "multiview-benchmark": "Multi-view benchmark",
}

_TYPES = {".mp4": "video/mp4", ".png": "image/png", ".gif": "image/gif", ".jpg": "image/jpeg"}
_LARGE = 120_000  # bytes above which an image is stored as WebP


@dataclass(frozen=True)
class Medium:
    """An image or clip as a data URI."""

    uri: str
    video: bool
    caption: str
    width: int = 0


@dataclass(frozen=True)
class ClipPair:
    """A generated clip beside a real one of its class."""

    label: str
    prompt: str
    generated: Medium
    real: Medium


@dataclass(frozen=True)
class Gallery:
    """The results of a stage: generated clips beside real ones, and images."""

    pairs: tuple[ClipPair, ...]
    media: tuple[Medium, ...]


@dataclass(frozen=True)
class ViewTable:
    """Multi-view scores: names of the metrics, rows of (subject, values), and what made them."""

    names: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    about: dict[str, str]

    def of(self, metric: str, subjects: Sequence[str]) -> list[tuple[str, str]]:
        """Return (subject, value) of one metric, for those of `subjects` that were scored."""
        column = self.names.index(metric)
        return [(subject, values[column]) for subject, values in self.rows if subject in subjects]


@dataclass(frozen=True)
class Curve:
    """The losses of one training stage, and a `measure` on held-out clips before and after it.

    linear: the loss of the best linear filter on the same clips.
    """

    stage: str
    series: tuple[Series, ...]
    measure: str
    before: float | None
    after: float | None
    linear: float | None = None

    @property
    def change(self) -> str:
        """The relative change of the measure, as text; empty when it isn't known."""
        if not self.before or self.after is None:
            return ""
        return f"{100 * (self.after / self.before - 1):+.0f} %"


@dataclass
class Gathered:
    """All that was found; `missing` names what was expected and wasn't there."""

    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    pairs: list[ClipPair] = field(default_factory=list)
    funnel: list[Bar] = field(default_factory=list)
    plots: list[Medium] = field(default_factory=list)
    contacts: list[Medium] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    galleries: dict[str, Gallery] = field(default_factory=dict)
    rows: list[dict[str, str]] = field(default_factory=list)
    dots: list[Dot] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    views: ViewTable | None = None
    claims: list[ClaimGroup] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def medium(path: Path, caption: str = "", max_width: int = 1800) -> Medium:
    """Read a file as a data URI; large images become WebP of at most `max_width`. Raises UserError for broken ones."""
    try:
        content, kind = path.read_bytes(), _TYPES[path.suffix.lower()]
        width = 0
        if kind in ("image/png", "image/jpeg"):
            with Image.open(io.BytesIO(content)) as image:
                width = image.width
                if width > max_width or len(content) > _LARGE:
                    content, kind = _compressed(image, min(width, max_width)), "image/webp"
    except (OSError, KeyError) as error:
        raise UserError(f"{path}: can't be shown in the report ({error}); run its stage again") from None
    encoded = base64.b64encode(content).decode()
    return Medium(f"data:{kind};base64,{encoded}", kind == "video/mp4", caption, width)


def _compressed(image: Image.Image, width: int) -> bytes:
    stream = io.BytesIO()
    height = round(image.height * width / image.width)
    scaled = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    scaled.save(stream, format="WEBP", quality=82, method=4)
    return stream.getvalue()


def read_json(path: Path) -> Any:
    """Read a JSON file; raises UserError when it is damaged."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: damaged ({error}); run its stage again") from None


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file, by column name."""
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def gather_outputs(inputs: Mapping[str, Path], media_budget: int) -> Gathered:
    """Read all that the report shows; `media_budget`: bytes of images and clips per gallery of a stage."""
    found = Gathered()
    for stage, title in STAGES.items():
        folder = inputs.get(stage)
        if folder is None or not folder.is_dir():
            found.missing.append(f"{title}: the stage has no output")
            continue
        if (folder / "metrics.json").is_file():
            found.metrics[stage] = read_json(folder / "metrics.json")
        curve = losses(folder, title, found.metrics.get(stage, {}))
        if curve is not None:
            found.curves.append(curve)
        shown = None if stage == "ucf101-evaluation" else gallery(folder, media_budget)
        if shown is not None:
            found.galleries[stage] = shown
    _curation(inputs.get("curation"), found)
    _ucf101(inputs.get("ucf101-evaluation"), found)
    _views(inputs.get("multiview-benchmark"), found)
    found.claims = gather_claims(inputs, STAGES, found.metrics, found.evaluation)
    return found


# What a stage measures on held-out clips: name, metric before, metric after.
_MEASURES = (
    ("validation loss", "validation_loss_before", "validation_loss_after"),
    ("held-out L1", "l1_before", "l1"),
)


def losses(folder: Path, title: str, metrics: Mapping[str, Any]) -> Curve | None:
    """Read the loss curves of `losses.csv`; None when there is no such file.

    It has a column `step`, which may begin anew with each phase, and columns of losses, which may have gaps.
    """
    path = folder / "losses.csv"
    if not path.is_file():
        return None
    rows = read_csv(path)
    steps = continued([float(row["step"]) for row in rows])
    series = []
    for name in [name for name in rows[0] if name != "step" and "loss" in name] if rows else []:
        pairs = zip(steps, (row.get(name) for row in rows), strict=True)
        points = tuple((step, float(value)) for step, value in pairs if value and _finite(value))
        if points:
            series.append(Series(name.replace("_", " "), points, "validation" if name.startswith("val") else "train"))
    known = [(n, metrics[b], metrics[a]) for n, b, a in _MEASURES if b in metrics and a in metrics]
    measure, before, after = known[0] if known else ("", None, None)
    linear = metrics.get("validation_loss_linear")
    if series and linear is not None and steps[-1:] > steps[:1]:
        series.append(Series("linear filter", ((steps[0], linear), (steps[-1], linear)), "baseline"))
    return Curve(title, tuple(series), measure, before, after, linear) if series else None


def continued(steps: list[float]) -> list[float]:
    """Make steps that begin anew go on.

    >>> continued([0, 1, 2, 0, 1])
    [0.0, 1.0, 2.0, 3.0, 4.0]
    """
    offset, last, result = 0.0, -math.inf, []
    for step in steps:
        if step + offset < last:
            offset = last + 1 - step
        last = step + offset
        result.append(last)
    return result


def _finite(text: str | None) -> bool:
    try:
        return text is not None and math.isfinite(float(text))
    except ValueError:
        return False


def _caption(path: Path) -> str:
    return path.stem.replace("_", " ").replace("-", " ")


def gallery(folder: Path, budget: int) -> Gallery | None:
    """Read the images of a stage's folder and `samples/`, and its pairs `generated-<n>`, `real-<n>`; None without any.

    As many as fit into `budget` bytes. A sheet of the pairs is left out beside them, and a GIF beside its mp4.
    """
    files = sorted([*folder.glob("*"), *(folder / "samples").glob("*")])
    by_name = {path.stem: path for path in files if path.suffix.lower() in _TYPES}
    mp4s = {path.stem for path in files if path.suffix.lower() == ".mp4"}
    pairs, left = [], budget
    for name in sorted(name for name in by_name if name.startswith("generated-")):
        made, real = by_name[name], by_name.get(name.replace("generated", "real", 1))
        if real is not None and (size := made.stat().st_size + real.stat().st_size) <= left:
            left -= size
            pairs.append(ClipPair("", "", medium(made), medium(real)))
    media = []
    for path in files:
        shown = path.suffix.lower() in _TYPES and not path.stem.startswith(("generated-", "real-"))
        if not shown or (pairs and path.stem == "sheet") or (path.suffix.lower() == ".gif" and path.stem in mp4s):
            continue
        one = medium(path, _caption(path))
        if len(one.uri) * 3 // 4 <= left:
            left -= len(one.uri) * 3 // 4
            media.append(one)
    return Gallery(tuple(pairs), tuple(media)) if pairs or media else None


_STEPS = {"clips": "all clips"} | {axis.name: axis.label for axis in AXES}


def _curation(folder: Path | None, found: Gathered) -> None:
    if folder is None or not (folder / "funnel.json").is_file():
        found.missing.append("Curation funnel: curation/funnel.json is missing")
        return
    for step in read_json(folder / "funnel.json")["steps"]:
        note = f"−{step['dropped']}, alone −{step['dropped_alone']}" if "dropped_alone" in step else ""
        name = _STEPS.get(step["step"], step["step"])
        found.funnel.append(Bar(name if step["step"] == "clips" else f"after {name}", float(step["left"]), note))
    plots = [path for path in sorted((folder / "plots").glob("*.png")) if path.stem != "funnel"]
    found.plots = [medium(path, _caption(path), 900) for path in plots]
    found.contacts = [medium(path, _caption(path), 1400) for path in sorted((folder / "contact").glob("*.jpg"))]


_SUBJECTS = {
    "generated": "this model",
    "untrained": "untrained network",
    "noise": "noise",
    "mean-frame": "mean frame",
    "real-split": "real against real (half)",
}


def _ucf101(folder: Path | None, found: Gathered) -> None:
    if folder is None or not (folder / "result.json").is_file():
        found.missing.append("UCF-101 score and generated clips: ucf101-evaluation/result.json is missing")
        return
    found.evaluation = read_json(folder / "result.json")
    found.rows = read_csv(folder / "results.csv")
    by_subject: dict[str, list[dict[str, Any]]] = {}
    for score in found.evaluation["scores"]:
        by_subject.setdefault(score["subject"], []).append(score["distance"])
    for subject, distances in by_subject.items():
        value = sum(d["frechet"]["value"] for d in distances) / len(distances)
        error = max(d["standard_error"] for d in distances)
        found.dots.append(Dot(_SUBJECTS.get(subject, subject), value, error, subject == "generated"))
    for entry in read_json(folder / "samples" / "samples.json"):
        made, real = (medium(folder / "samples" / entry[kind]) for kind in ("generated", "real"))
        found.pairs.append(ClipPair(entry["class"], entry["prompt"], made, real))


def _views(folder: Path | None, found: Gathered) -> None:
    if folder is None or not (folder / "results.csv").is_file():
        found.missing.append("Multi-view scores: multiview-benchmark/results.csv is missing")
        return
    rows = read_csv(folder / "results.csv")
    names = tuple(name for name in rows[0] if all(_finite(row[name]) for row in rows) and name not in _COUNTS)
    about = {name: rows[0][name] for name in rows[0] if name not in (*names, "subject")}
    if (folder / "protocol.json").is_file():
        about |= {f"{name} hash": value[:12] for name, value in read_json(folder / "protocol.json")["models"].items()}
    table = tuple((row["subject"], tuple(row[name] for name in names)) for row in rows)
    found.views = ViewTable(names, table, about)


_COUNTS = ("objects", "views")
