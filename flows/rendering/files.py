"""The files that are made from the table of stages (flows/stages.py), and whether those in a folder are up to date."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flows.rendering import dvc_yaml, prefect_yaml
from svd.core.files import write_text

FILES: dict[Path, Callable[[], str]] = {
    dvc_yaml.MAIN: dvc_yaml.render_main,
    dvc_yaml.BRANCH: dvc_yaml.render_branches,
    Path("prefect.yaml"): prefect_yaml.render_deployments,
}


def stale_files(folder: Path) -> list[Path]:
    """Return the generated files below `folder` that are missing or differ from what the table makes."""
    return [name for name, render in FILES.items() if _text(folder / name) != render()]


def write_files(folder: Path) -> list[Path]:
    """Write the generated files below `folder` where they differ from the table; returns those that were written."""
    stale = stale_files(folder)
    for name in stale:
        write_text(folder / name, FILES[name]())
    return stale


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
