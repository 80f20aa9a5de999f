"""Prefect artifacts of a stage's run: a Markdown summary, a table of metrics, and pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact

from flows.runner import output_folder
from svd.config import Preset

LARGEST_PICTURE = 1280


def publish(stage: str, preset: Preset, metrics: Mapping[str, float | int | str], summary: str) -> None:
    """Create the artifacts of one stage run; keys are `<stage>-summary`, `<stage>-metrics`, `<stage>-<picture>`."""
    folder = output_folder(preset, stage)
    create_markdown_artifact(
        f"## {stage}\n\n{summary}\n\npreset `{preset.name}`, output `{folder}`", key=f"{stage}-summary"
    )
    rows = [{"metric": name, "value": value} for name, value in sorted(metrics.items())]
    create_table_artifact(rows, key=f"{stage}-metrics", description=f"Metrics of {stage}")
    for path in _pictures(folder)[:4]:
        key = f"{stage}-{path.stem}".lower().replace("_", "-").replace(".", "-")
        create_image_artifact(_data_uri(path), key=key, description=path.name)


def _pictures(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.png"), *folder.glob("plots/*.png"), *folder.glob("samples/*.png")])


def _data_uri(path: Path) -> str:
    """The picture inside its own address, small enough for the server: the UI may run on another machine."""
    picture = Image.open(path).convert("RGB")
    picture.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
