"""What the report shows, read from the other stages' output folders. What isn't there is named, never hidden."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from evaluation.charts import Bar, Dot, Series
from svd.stage import UserError

STAGES = {
    "sources": "Sources",
    "encoders": "Text and image encoders",
    "curation": "Curation",
    "autoencoder": "Autoencoder",
    "latents": "Latents",
    "image-pretraining": "Image pretraining",
    "video-pretraining": "Video pretraining",
    "high-quality-finetuning": "High-quality finetuning",
    "image-to-video": "Image to video",
    "camera-lora": "Camera LoRA",
    "frame-interpolation": "Frame interpolation",
    "orbits": "Orbits",
    "multiview-finetuning": "Multi-view finetuning",
    "ucf101-evaluation": "UCF-101 evaluation",
    "multiview-benchmark": "Multi-view benchmark",
}
OPTIONAL = ("camera-lora", "frame-interpolation")

_TYPES = {".mp4": "video/mp4", ".png": "image/png", ".gif": "image/gif", ".svg": "image/svg+xml", ".jpg": "image/jpeg"}


@dataclass(frozen=True)
class Medium:
    """A picture or clip as a data URI."""

    uri: str
    video: bool
    caption: str
    width: int = 0


@dataclass(frozen=True)
class Pair:
    """A generated clip beside a real one of its class."""

    label: str
    prompt: str
    generated: Medium
    real: Medium


@dataclass(frozen=True)
class Curve:
    """The losses of one training stage, and its validation loss before and after."""

    stage: str
    series: tuple[Series, ...]
    before: float | None
    after: float | None

    @property
    def change(self) -> str:
        """How much the validation loss fell, in per cent; empty when that isn't known."""
        if not self.before or self.after is None:
            return ""
        return f"{100 * (self.after / self.before - 1):+.0f} %"


@dataclass
class Gathered:
    """Everything that was found, and `missing`: what was expected and wasn't there."""

    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    pairs: list[Pair] = field(default_factory=list)
    funnel: list[Bar] = field(default_factory=list)
    plots: list[Medium] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    galleries: dict[str, list[Medium]] = field(default_factory=dict)
    rows: list[dict[str, str]] = field(default_factory=list)
    dots: list[Dot] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    views: list[dict[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def medium(path: Path, caption: str = "", max_width: int = 1600) -> Medium:
    """A file as a data URI; pictures wider than `max_width` are scaled down. Raises UserError for unreadable files."""
    try:
        content, kind = path.read_bytes(), _TYPES[path.suffix.lower()]
        width = 0
        if kind == "image/png":
            with Image.open(io.BytesIO(content)) as picture:
                width = picture.width
                if width > max_width:
                    content = _scaled(picture, max_width)
    except (OSError, KeyError) as error:
        raise UserError(f"{path}: can't be shown in the report ({error}); run its stage again") from None
    encoded = base64.b64encode(content).decode()
    return Medium(f"data:{kind};base64,{encoded}", kind == "video/mp4", caption, width)


def _scaled(picture: Image.Image, width: int) -> bytes:
    stream = io.BytesIO()
    height = round(picture.height * width / picture.width)
    picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS).save(stream, format="PNG")
    return stream.getvalue()


def read_json(path: Path) -> Any:
    """A JSON file. Raises UserError when it is damaged."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: damaged ({error}); run its stage again") from None


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file by column name."""
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def gather(inputs: Mapping[str, Path], media_budget: int) -> Gathered:
    """Read everything the report shows; `media_budget` limits the bytes of pictures and clips by stage galleries."""
    found = Gathered()
    for stage, title in STAGES.items():
        folder = inputs.get(stage)
        if folder is None or not folder.is_dir():
            if stage not in OPTIONAL:
                found.missing.append(f"{title}: the stage has no output")
            continue
        if (folder / "metrics.json").is_file():
            found.metrics[stage] = read_json(folder / "metrics.json")
        curve = losses(folder, title, found.metrics.get(stage, {}))
        if curve is not None:
            found.curves.append(curve)
        gallery = samples(folder, media_budget)
        if gallery and stage != "ucf101-evaluation":
            found.galleries[stage] = gallery
    _curation(inputs.get("curation"), found)
    _ucf101(inputs.get("ucf101-evaluation"), found)
    _views(inputs.get("multiview-benchmark"), found)
    return found


def losses(folder: Path, title: str, metrics: Mapping[str, Any]) -> Curve | None:
    """The loss curves in `losses.csv`: a column `step`, and columns of losses with gaps. None when there is no file."""
    path = folder / "losses.csv"
    if not path.is_file():
        return None
    rows = read_csv(path)
    names = [name for name in rows[0] if name != "step" and "loss" in name] if rows else []
    series = []
    for name in names:
        points = tuple((float(row["step"]), float(row[name])) for row in rows if _finite(row.get(name)))
        if points:
            series.append(Series(name.replace("_", " "), points, "validation" if name.startswith("val") else "train"))
    before, after = (metrics.get(f"validation_loss_{when}") for when in ("before", "after"))
    return Curve(title, tuple(series), before, after) if series else None


def _finite(text: str | None) -> bool:
    try:
        return text is not None and math.isfinite(float(text))
    except ValueError:
        return False


def samples(folder: Path, budget: int, most: int = 12) -> list[Medium]:
    """Pictures and clips of `samples/`, pictures first, as many as fit in `budget` bytes."""
    files = [p for p in (folder / "samples").rglob("*") if p.suffix.lower() in _TYPES]
    files.sort(key=lambda p: (p.suffix.lower() == ".mp4", p.relative_to(folder).as_posix()))
    chosen: list[Medium] = []
    for path in files:
        size = path.stat().st_size
        if len(chosen) < most and size <= budget:
            budget -= size
            chosen.append(medium(path, path.stem.replace("_", " ").replace("-", " ")))
    return chosen


_STEPS = {
    "clips": "all clips",
    "motion": "motion",
    "aesthetics": "aesthetics",
    "similarity": "text–image similarity",
    "text_area": "text area",
    "nsfw": "NSFW",
    "duplicate": "duplicates",
}


def _curation(folder: Path | None, found: Gathered) -> None:
    if folder is None or not (folder / "funnel.json").is_file():
        found.missing.append("Curation funnel: curation/funnel.json is missing")
        return
    for step in read_json(folder / "funnel.json")["steps"]:
        note = f"−{step['dropped']}, alone −{step['dropped_alone']}" if "dropped_alone" in step else ""
        name = _STEPS.get(step["step"], step["step"])
        found.funnel.append(Bar(name if step["step"] == "clips" else f"after {name}", float(step["left"]), note))
    found.plots = [medium(path, path.stem.replace("_", " ")) for path in sorted((folder / "plots").glob("*.png"))][:6]


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
        found.pairs.append(Pair(entry["class"], entry["prompt"], made, real))


def _views(folder: Path | None, found: Gathered) -> None:
    if folder is None or not (folder / "results.csv").is_file():
        found.missing.append("Multi-view scores: multiview-benchmark/results.csv is missing")
        return
    found.views = read_csv(folder / "results.csv")
