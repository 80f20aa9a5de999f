"""A project whose MLflow and DVC have a history: two catalogues, their latents, trainings and registered models.

Version 1 of the model trained on catalogue A. Version 2 trained on catalogue B, which lacks the source `x`, but started
from the video pretraining on A. What lies in the working folder at the end is B's.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import polars as pl
import torch
import yaml
from project_folder import PRESETS

from flows.places import Place
from flows.recording import dvc as versioning
from flows.tracking import runs
from flows.tracking.runs import Lineage, RunInfo, tracked_run, tracking_uri
from svd.catalogue.schema import CLIPS_SCHEMA, SOURCES_SCHEMA
from svd.catalogue.tables import clip_id, write_table_rows
from svd.config.load import load_preset
from svd.latents.cache import geometry_name, write_index

DVC = str(Path(sys.executable).parent / "dvc")
PRESET = "tiny"
MODEL = "svd-image-to-video"
GEOMETRY = geometry_name(load_preset(str(PRESETS / f"{PRESET}.yaml")).latents.geometries[0])
X, COPY, Y = "videos/x.mp4", "mirror/x-again.mp4", "videos/y.mp4"
FILM = b"the bytes of x"
ID = {X: hashlib.sha256(FILM).hexdigest()[:32], COPY: hashlib.sha256(FILM).hexdigest()[:32], Y: "b" * 32}


def run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


INPUTS = {
    "sources": (),
    "curation": ("sources",),
    "latents": ("curation",),
    "image-pretraining": ("latents",),
    "video-pretraining": ("latents", "image-pretraining"),
    "image-to-video": ("latents", "video-pretraining"),
}


def pipeline() -> str:
    """dvc.yaml of these stages, without code and options."""
    stages = {
        name: {
            "cmd": f"svd stage {name} --preset ${{preset}}",
            "deps": [f"outputs/${{preset}}/{one}" for one in inputs],
            "outs": [f"outputs/${{preset}}/{name}"],
        }
        for name, inputs in INPUTS.items()
    }
    return yaml.safe_dump({"vars": ["params.yaml"], "stages": stages})


def make_project(folder: Path, remote: Path | str | None = None) -> Path:
    """A project with git, DVC, presets and the pipeline's files in `folder`, which is the working folder."""
    run("git", "init", "-q", "-b", "main", ".")
    run("git", "config", "user.email", "test@example.com")
    run("git", "config", "user.name", "test")
    run(DVC, "init", "-q")
    (folder / "presets").mkdir()
    shutil.copy(PRESETS / "tiny.yaml", folder / "presets")
    (folder / "params.yaml").write_text("preset: tiny\n")
    (folder / "dvc.yaml").write_text(pipeline())
    (folder / ".gitignore").write_text("/outputs\n/work\n/.local\n/.cache\n/store\n/mlflow\n")
    if remote:
        run(DVC, "remote", "add", "-q", "-d", "store", str(remote))
    run("git", "add", "-A")
    run("git", "commit", "-qm", "project")
    return folder


def commit(message: str) -> str:
    """Commit everything; returns the commit."""
    run("git", "add", "-A")
    run("git", "commit", "-qm", message)
    return run("git", "rev-parse", "HEAD").strip()


def clip(source: str, number: int) -> str:
    return clip_id(ID[source], number, number + 1)


def write_catalogue(folder: Path, clips: dict[str, int]) -> None:
    """A catalogue of `clips` per source, the last clip of each filtered out, and x's copy where x is."""
    rows = [
        {"clip_id": clip(uri, n), "source_id": ID[uri], "source_uri": uri, "split": "train", "keep": n + 1 < count}
        for uri, count in clips.items()
        for n in range(count)
    ]
    sources = [{"source_id": ID[u], "source_uri": u, "verdict": "ok", "licence": "CC-BY-4.0"} for u in clips]
    if X in clips:
        sources.append({"source_id": ID[COPY], "source_uri": COPY, "verdict": "duplicate", "duplicate_of": X})
    (folder / "catalogue").mkdir(parents=True)
    write_table_rows(folder / "catalogue" / "clips.parquet", rows, CLIPS_SCHEMA)
    write_table_rows(folder / "catalogue" / "sources.parquet", sources, SOURCES_SCHEMA)
    (folder / "shard-0.tar").write_text(f"videos of {sorted(clips)}\n")


def write_latents(folder: Path, catalogue: Path) -> None:
    """A latent cache of the kept clips; y's first clip is held out."""
    kept = pl.read_parquet(catalogue / "catalogue" / "clips.parquet").filter(pl.col("keep"))
    rows = [
        {
            "sample_id": f"sample-{row['clip_id']}",
            "clip_id": row["clip_id"],
            "geometry": GEOMETRY,
            "split": "test" if row["clip_id"] == clip(Y, 0) else "train",
        }
        for row in kept.iter_rows(named=True)
    ]
    folder.mkdir(parents=True)
    write_index(folder, rows, {"clips": sorted(kept["clip_id"])}, torch.zeros(1, 1))


def write_text(folder: Path, text: str) -> None:
    folder.mkdir(parents=True)
    (folder / "data.txt").write_text(text)


class History:
    """Runs stages as the pipeline would: output into DVC and dvc.lock, hashes into MLflow."""

    def __init__(self, *, push: bool = False) -> None:
        self.push = push
        self.known: dict[str, Lineage] = {}
        self.count = 0

    def stage(
        self, name: str, inputs: tuple[str, ...], write: Any, preset: Any = None, preset_name: str = PRESET
    ) -> tuple[str, str]:
        """Run a stage, whose output `write(folder)` makes; returns its MLflow run id and its output's hash."""
        place = Place(preset_name, name)
        shutil.rmtree(place.output, ignore_errors=True)
        write(place.output)
        self.count += 1
        key = f"{name}-{self.count}"
        tags = {"stage": name, "preset": preset_name, "git.commit": run("git", "rev-parse", "HEAD").strip()}
        items = [self.known[stage] for stage in inputs]
        with tracked_run(RunInfo(key, key, None, tags)) as tracker:
            tracker.log_lineage("input", items)
            (made,) = versioning.save_outputs(name, preset_name)
            tracker.log_lineage("output", [made])
            if preset is not None:
                tracker.log_text(json.dumps(preset.model_dump(mode="json")), "config/preset.json")
        self.known[name] = made
        versioning.record(name, preset_name, [made], {item.path: item for item in self.known.values()})
        if self.push:
            versioning.push([made])
        return find(key), made.md5

    def data(self, clips: dict[str, int]) -> tuple[str, str]:
        """Run sources, curation and latents; returns the hashes of the last two."""
        self.stage("sources", (), lambda folder: write_text(folder, f"{sorted(clips)}"))
        _, curation = self.stage("curation", ("sources",), lambda folder: write_catalogue(folder, clips))
        here = Place(PRESET, "curation").output
        _, latents = self.stage("latents", ("curation",), lambda folder: write_latents(folder, here))
        return curation, latents

    def training(self, name: str, *start: str, preset: Any = None) -> str:
        """Run a training; returns its run id."""
        write = lambda folder: write_text(folder, f"weights {self.count}")  # noqa: E731
        return self.stage(name, ("latents", *start), write, preset or load_preset(PRESET))[0]


def client() -> mlflow.MlflowClient:
    return mlflow.MlflowClient(tracking_uri())


def find(key: str) -> str:
    """The id of the run with this key."""
    experiment = client().get_experiment_by_name(runs.EXPERIMENT).experiment_id
    (found,) = client().search_runs([experiment], f"tags.`svd.run_key` = '{key}'")
    return str(found.info.run_id)


def register(run_id: str, *aliases: str) -> str:
    """Register what a run trained; returns the version."""
    if not client().search_registered_models(f"name = '{MODEL}'"):
        client().create_registered_model(MODEL)
    version = str(client().create_model_version(MODEL, f"runs:/{run_id}/model", run_id).version)
    for alias in aliases:
        client().set_registered_model_alias(MODEL, alias, version)
    return version
