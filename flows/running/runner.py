"""Run one stage: resolve its folders, run its function under an MLflow run, clean up behind it.

The `svd stage` command, `dvc repro` and the Prefect flows all come through here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.places import Place, run_key_of
from flows.recording import dvc as versioning
from flows.recording import inventory
from flows.recording import results_store as store
from flows.recording.dvc import hash_folder
from flows.recording.work import clear_recorded, clear_work, close_work, dvc_records, forget_ended, mark_delivered
from flows.serving.signature import signature
from flows.stages import OPTIONAL_INPUTS, Stage, find_stage
from flows.tracking.mlflow_delivery import checkpoint_digest
from flows.tracking.runs import Lineage, MlflowTracker, RunInfo, tracked_run
from svd.config import Preset
from svd.config.load import load_preset
from svd.core.errors import UserError
from svd.core.files import Held, exclusive, recover
from svd.stage import Report, StageContext, republish
from svd.training import ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunLink:
    """Where a stage run belongs: the MLflow key of its parent, and the Prefect run that started it."""

    parent: str | None = None
    flow_run: str | None = None


def stage_inputs(stage: Stage, preset: Preset) -> dict[str, Path]:
    """Return the folder of each input; raises UserError that names a missing one and the command that makes it."""
    folders = Place(preset.name, stage.name).inputs
    missing = [name for name, path in folders.items() if not path.is_dir()]
    if stage.name in OPTIONAL_INPUTS:
        return {name: path for name, path in folders.items() if name not in missing}
    if missing:
        raise UserError(
            f"stage '{stage.name}' needs {folders[missing[0]]}, which is not there; "
            f"run `svd stage {missing[0]} --preset {preset.name}` or `dvc repro`"
        )
    return folders


def work_digest(stage: Stage, preset: Preset, inputs: Mapping[str, Path]) -> str:
    """Return a name for work in progress by what it is made from: the options of the stage that the preset's file sets,
    and names, sizes and metrics of the input files.

    An option that the file doesn't set is left out, so that a new version of the code goes on where the old one was.
    """
    values = preset.model_dump(mode="json", exclude_unset=True)
    parts = {name: inventory.option(values, name) for name in sorted({"name", "seed", *stage.options})}
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for name, folder in sorted(inputs.items()):
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            digest.update(f"{name}/{path.relative_to(folder)}:{path.stat().st_size}\n".encode())
        if (folder / "metrics.json").is_file():
            digest.update((folder / "metrics.json").read_bytes())
    return digest.hexdigest()[:16]


def stage_params(stage: Stage, preset: Preset) -> dict[str, Any]:
    """Return the options that the stage depends on, by dotted path: the params of its MLflow run."""
    values = preset.model_dump(mode="json")
    return {name: inventory.option(values, name) for name in stage.options}


def git_commit() -> str:
    """Return the commit of the code: SVD_GIT_COMMIT, which an image carries, else that of the checkout.

    It ends in `-dirty` when tracked files differ; outside a checkout it is 'unknown'.
    """
    if built_from := os.environ.get("SVD_GIT_COMMIT"):
        return built_from
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def open_work(stage: Stage, preset: Preset, inputs: Mapping[str, Path]) -> Path:
    """Make, or find again, the stage's work folder for exactly these options and inputs.

    Of work for others, which a killed run left, the newest is kept: changing an option back finds it again.
    """
    place = Place(preset.name, stage.name)
    work = place.work(work_digest(stage, preset, inputs))
    others = sorted((p for p in place.works.glob("*/") if p != work), key=lambda p: p.stat().st_mtime)
    for other in others[:-1]:
        logger.warning("%s: unfinished work for other options or inputs is removed, a newer one is kept", other)
        close_work(other)
    if others and not work.exists():
        logger.warning("%s holds unfinished work for other options or inputs; this run starts anew", others[-1])
    work.mkdir(parents=True, exist_ok=True)
    os.utime(work)
    return work


@contextmanager
def only_one(place: Place) -> Iterator[None]:
    """Hold the lock of a stage, or of a pipeline, on this machine; raises UserError when another process runs it.

    A pipeline that is started again after a crash may meet a stage of the first one that is still at work.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive(place.lock, wait=False))
        except Held as error:
            raise UserError(
                f"'{place.stage}' of preset '{place.preset}' is being run by process {error.holder}; "
                f"wait for it or stop it ({place.lock})"
            ) from None
        yield


def run_key(work: Path) -> str:
    """Return the MLflow key of the run that works in `work`; a run that was killed is continued under its key."""
    path = run_key_of(work)
    if not path.exists():
        path.write_text(f"{Place.of_work(work).stage}-{uuid.uuid4().hex[:12]}")
    return path.read_text()


def run_stage(
    name: str, preset_name: str, link: RunLink | None = None, store_option: str | None = None, keep: bool = False
) -> Report:
    """Run stage `name` of the preset called `preset_name`; see `run_preset_stage`."""
    return run_preset_stage(name, load_preset(preset_name), link, store_option, keep)


def run_preset_stage(
    name: str, preset: Preset, link: RunLink | None = None, store_option: str | None = None, keep: bool = False
) -> Report:
    """Run a stage as one MLflow run; work in progress of a killed run is taken up again.

    store_option: where results are kept besides this machine (default: `SVD_STORE`): inputs that are missing or differ
    are fetched from there, the output is published there. keep: leave the work folder to the caller, who records the
    output and then calls `clear_work`. Raises UserError for an unknown stage, for missing inputs, outside a DVC
    repository, and when another process runs the stage.
    """
    stage, root = find_stage(name), store.store_root(store_option)
    if ranks.rank() > 0:
        return _follow(stage)
    place = Place(preset.name, stage.name)
    with only_one(place), ranks.leading() if stage.distributed else nullcontext():
        for folder in (*place.inputs.values(), place.output):
            recover(folder)
        if root:
            store.fetch_inputs(root, preset.name, place.inputs)
        return _run(stage, preset, link or RunLink(), root, keep)


def _run(stage: Stage, preset: Preset, link: RunLink, root: str | None, keep: bool) -> Report:
    inputs, place = stage_inputs(stage, preset), Place(preset.name, stage.name)
    versioning.open_repo().close()  # a missing one is reported before hours of work, not after
    if dvc_records() and not place.inventory.is_file():  # `dvc repro -s` in a fresh clone; DVC hashes it at the end
        inventory.take_stage(stage, preset)
    clear_recorded(preset)
    work = open_work(stage, preset, inputs)
    report = republish(work, place.output) if forget_ended(stage, work) else None
    if report is None:
        report, made = _run_tracked(stage, preset, inputs, work, link, root)
        mark_delivered(work, made)
    if not (keep or dvc_records()):
        clear_work(preset, stage.name)
    return report


def _follow(stage: Stage) -> Report:
    """Do what the other ranks of torchrun or srun do: they only train, beside the first one."""
    if not stage.distributed:
        return Report({}, f"stage '{stage.name}' runs in the first process alone")
    context = ranks.await_first_rank()
    return stage.load()(context) if context else Report({}, f"stage '{stage.name}' has nothing to train")


def _run_tracked(
    stage: Stage, preset: Preset, inputs: Mapping[str, Path], work: Path, link: RunLink, root: str | None
) -> tuple[Report, Lineage]:
    place = Place(preset.name, stage.name)
    uri = place.uri(root) if root else None
    info = RunInfo(
        run_key(work),
        f"{stage.name} ({preset.name})",
        link.parent,
        _tags(stage, preset, link, uri),
        stage_params(stage, preset),
    )
    with tracked_run(info) as tracker:
        tracker.log_text(json.dumps(preset.model_dump(mode="json"), indent=2), "config/preset.json")
        context = StageContext(store.localise(preset, stage), inputs, place.output, work, tracker)
        tracker.log_lineage("input", [hash_folder(path) for path in inputs.values()])
        report = republish(work, place.output)
        if report is None:
            if stage.distributed:
                ranks.announce(context)
            report = stage.load()(context)
        made = hash_folder(place.output)
        if uri:
            store.publish_folder(place.output, uri, made.md5)
        tracker.log_lineage("output", [made])
        _log_outcome(tracker, stage, preset, report)
    return report, made


def _tags(stage: Stage, preset: Preset, link: RunLink, uri: str | None) -> dict[str, str]:
    """Return the tags of the stage's MLflow run."""
    tags = {"stage": stage.name, "preset": preset.name, "seed": str(preset.seed), "git.commit": git_commit()}
    if link.flow_run:
        tags["prefect.flow_run_id"] = link.flow_run
    return tags | ({"store": uri} if uri else {})


def _log_outcome(tracker: MlflowTracker, stage: Stage, preset: Preset, report: Report) -> None:
    numbers = {k: float(v) for k, v in report.metrics.items() if isinstance(v, int | float)}
    tracker.log_metrics(numbers, step=0)
    folder = Place(preset.name, stage.name).output
    for path in sorted(folder.glob("samples/*.mp4"))[:8]:
        tracker.log_file(path, "samples")
    for path in sorted([*folder.glob("*.html"), *folder.glob("*.png"), *folder.glob("plots/*.png")]):
        tracker.log_file(path, "pictures" if path.suffix == ".png" else "")
    if stage.model:
        _register(tracker, stage, preset, folder)


def _register(tracker: MlflowTracker, stage: Stage, preset: Preset, folder: Path) -> None:
    """Register what the stage trained, with the networks it needs at inference."""
    needed = {"autoencoder": "autoencoder", "encoders": "encoders"} | ({"base": stage.base} if stage.base else {})
    folders = {"model": folder} | {part: Place(preset.name, name).output for part, name in needed.items()}
    settings = {
        "checkpoint": checkpoint_digest(folder),
        "task": stage.name,
        "preset": preset.model_dump(mode="json"),
        "signature": signature(preset, stage.name).to_dict(),
    }
    tracker.register_model(str(stage.model), folders, settings)
