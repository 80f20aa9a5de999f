"""Prefect artifacts of a stage's run: a Markdown summary, a table of metrics, and images."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Mapping
from pathlib import Path

import httpx
from PIL import Image  # not cv2: it makes bytes of a file, and no array is needed
from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact

from flows.places import Place
from svd.config import Preset

LARGEST_SIDE = 1280  # pixels
logger = logging.getLogger(__name__)


def publish_artifacts(stage: str, preset: Preset, metrics: Mapping[str, float | int | str], summary: str) -> None:
    """Create the artifacts of one stage run; keys are `<stage>-summary`, `<stage>-metrics`, `<stage>-<image>`.

    A server that is away costs the artifacts, not the stage, whose work is done.
    """
    try:
        _publish(stage, preset, metrics, summary)
    except httpx.HTTPError as error:
        logger.warning("the artifacts of '%s' are left out, Prefect's server does not answer (%s)", stage, error)


def _publish(stage: str, preset: Preset, metrics: Mapping[str, float | int | str], summary: str) -> None:
    folder = Place(preset.name, stage).output
    create_markdown_artifact(
        f"## {stage}\n\n{summary}\n\npreset `{preset.name}`, output `{folder}`", key=f"{stage}-summary"
    )
    rows = [{"metric": name, "value": value} for name, value in sorted(metrics.items())]
    create_table_artifact(rows, key=f"{stage}-metrics", description=f"Metrics of {stage}")
    for path in _images(folder)[:4]:
        key = f"{stage}-{path.stem}".lower().replace("_", "-").replace(".", "-")
        create_image_artifact(_data_uri(path), key=key, description=path.name)


def _images(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.png"), *folder.glob("plots/*.png"), *folder.glob("samples/*.png")])


def _data_uri(path: Path) -> str:
    """Return the image as a data URI, small enough for the server: the UI may run on another machine."""
    image = Image.open(path).convert("RGB")
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
