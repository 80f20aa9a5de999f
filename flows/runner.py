"""Run one stage: resolve its folders, run its function under an MLflow run, clean up behind it.

The `svd stage` command, `dvc repro` and the Prefect flows all come through here.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.recording import dvc as versioning
from flows.recording import results_store as store
from flows.recording.dvc import hash_folder
from flows.recording.work import WORK, clear_recorded, clear_work, close_work, dvc_records, key_file, mark_told, settle
from flows.serving.signature import signature
from flows.stages import OUTPUTS, Stage, find_stage, preset_sections
from flows.tracking.mlflow_delivery import checkpoint_digest
from flows.tracking.runs import Lineage, MlflowTracker, RunInfo, tracked_run
from svd.config import Preset
from svd.config.load import load_preset
from svd.core.errors import UserError
from svd.core.files import recover
from svd.stage import Report, StageContext, republish
from svd.storage import join
from svd.training import ranks

logger = logging.getLogger(__name__)
OPTIONAL_INPUTS = ("report",)


@dataclass(frozen=True)
class RunLink:
    """Where a stage run belongs: the MLflow key of its parent, and the Prefect run that started it."""

    parent: str | None = None
    flow_run: str | None = None


def output_folder(preset: Preset, stage: str) -> Path:
    """Where a stage publishes: outputs/<preset>/<stage>."""
    return OUTPUTS / preset.name / stage


def input_folders(stage: Stage, preset: Preset) -> dict[str, Path]:
    """Where the stage's inputs belong, whether or not they are there."""
    return {name: output_folder(preset, name) for name in stage.inputs}


def stage_inputs(stage: Stage, preset: Preset) -> dict[str, Path]:
    """The folder of each input; raises UserError that names the missing one and the command that makes it."""
    folders = input_folders(stage, preset)
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
    """Names work in progress by what it is made from: the parts of the preset's file that DVC watches for the stage,
    and names, sizes and metrics of the input files.

    An option that the file doesn't set is left out, so that a new version of the code goes on where the old one was.
    """
    values = preset.model_dump(mode="json", exclude_unset=True)
    parts = {name: _part(values, name) for name in sorted({"name", "seed", *preset_sections(stage.name)})}
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for name, folder in sorted(inputs.items()):
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            digest.update(f"{name}/{path.relative_to(folder)}:{path.stat().st_size}\n".encode())
        if (folder / "metrics.json").is_file():
            digest.update((folder / "metrics.json").read_bytes())
    return digest.hexdigest()[:16]


def _part(values: Mapping[str, Any], dotted: str) -> Any:
    """The value at a dotted path; None where the file says nothing."""
    found: Any = values
    for name in dotted.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def stage_params(stage: Stage, preset: Preset) -> dict[str, Any]:
    """The parts of the preset that the stage depends on, by dotted path: what its MLflow run has as params."""
    values = preset.model_dump(mode="json")
    return {name: _part(values, name) for name in preset_sections(stage.name)}


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
    """The stage's work folder for exactly these options and inputs.

    Of work for others, which a killed run left, the newest is kept: changing an option back finds it again.
    """
    parent = WORK / preset.name / stage.name
    work = parent / work_digest(stage, preset, inputs)
    others = sorted((p for p in parent.glob("*/") if p != work), key=lambda p: p.stat().st_mtime)
    for other in others[:-1]:
        logger.warning("%s: unfinished work for other options or inputs is removed, a newer one is kept", other)
        close_work(other)
    if others and not work.exists():
        logger.warning("%s holds unfinished work for other options or inputs; this run starts anew", others[-1])
    work.mkdir(parents=True, exist_ok=True)
    os.utime(work)
    return work


@contextmanager
def only_one(name: str, preset: Preset) -> Iterator[None]:
    """Hold the lock of a stage, or of a pipeline, on this machine; raises UserError when another process runs it.

    A pipeline that is started again after a crash may meet a stage of the first one that is still at work.
    """
    path = WORK / preset.name / f".{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"'{name}' of preset '{preset.name}' is being run by process {lock.read().strip()}; "
                f"wait for it or stop it ({path})"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def run_key(work: Path) -> str:
    """The MLflow key of the run that works in `work`; a run that was killed is continued under its key."""
    path = key_file(work)
    if not path.exists():
        path.write_text(f"{work.parent.name}-{uuid.uuid4().hex[:12]}")
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
    with only_one(stage.name, preset), ranks.leading() if stage.distributed else nullcontext():
        for folder in (*input_folders(stage, preset).values(), output_folder(preset, stage.name)):
            recover(folder)
        if root:
            store.fetch_inputs(root, preset.name, input_folders(stage, preset))
        return _run(stage, preset, link or RunLink(), root, keep)


def _run(stage: Stage, preset: Preset, link: RunLink, root: str | None, keep: bool) -> Report:
    inputs, output = stage_inputs(stage, preset), output_folder(preset, stage.name)
    versioning.open_repo().close()  # its absence is told before hours of work, not after
    clear_recorded(preset)
    work = open_work(stage, preset, inputs)
    report = republish(work, output) if settle(stage, work) else None
    if report is None:
        report, made = _run_tracked(stage, preset, inputs, work, link, root)
        mark_told(work, made)
    if not (keep or dvc_records()):
        clear_work(preset, stage.name)
    return report


def _follow(stage: Stage) -> Report:
    """What the other ranks of torchrun or srun do: they only train, beside the first one."""
    if not stage.distributed:
        return Report({}, f"stage '{stage.name}' runs in the first process alone")
    context = ranks.await_first_rank()
    return stage.load()(context) if context else Report({}, f"stage '{stage.name}' has nothing to train")


def _run_tracked(
    stage: Stage, preset: Preset, inputs: Mapping[str, Path], work: Path, link: RunLink, root: str | None
) -> tuple[Report, Lineage]:
    output = output_folder(preset, stage.name)
    marks = {"stage": stage.name, "preset": preset.name, "seed": str(preset.seed), "git.commit": git_commit()}
    if link.flow_run:
        marks["prefect.flow_run_id"] = link.flow_run
    uri = join(root, preset.name, stage.name) if root else None
    if uri:
        marks["store"] = uri
    name = f"{stage.name} ({preset.name})"
    info = RunInfo(run_key(work), name, link.parent, marks, stage_params(stage, preset))
    with tracked_run(info) as tracker:
        tracker.log_text(json.dumps(preset.model_dump(mode="json"), indent=2), "config/preset.json")
        context = StageContext(store.localise(preset, stage.name), inputs, output, work, tracker)
        tracker.log_lineage("input", [hash_folder(path) for path in inputs.values()])
        report = republish(work, output)
        if report is None:
            if stage.distributed:
                ranks.announce(context)
            report = stage.load()(context)
        made = hash_folder(output)
        if uri:
            store.publish(output, uri, made.md5)
        tracker.log_lineage("output", [made])
        _log_outcome(tracker, stage, preset, report)
    return report, made


def _log_outcome(tracker: MlflowTracker, stage: Stage, preset: Preset, report: Report) -> None:
    numbers = {k: float(v) for k, v in report.metrics.items() if isinstance(v, int | float)}
    tracker.log_metrics(numbers, step=0)
    folder = output_folder(preset, stage.name)
    for path in sorted(folder.glob("samples/*.mp4"))[:8]:
        tracker.log_file(path, "samples")
    for path in sorted([*folder.glob("*.html"), *folder.glob("*.png"), *folder.glob("plots/*.png")]):
        tracker.log_file(path, "pictures" if path.suffix == ".png" else "")
    if stage.model:
        _register(tracker, stage, preset, folder)


def _register(tracker: MlflowTracker, stage: Stage, preset: Preset, folder: Path) -> None:
    """Register what the stage trained, with the networks it needs at inference."""
    folders = {"model": folder} | {n: output_folder(preset, n) for n in ("autoencoder", "encoders")}
    if stage.base:
        folders["base"] = output_folder(preset, stage.base)
    settings = {
        "checkpoint": checkpoint_digest(folder),
        "task": stage.name,
        "preset": preset.model_dump(mode="json"),
        "signature": signature(preset, stage.name).to_dict(),
    }
    tracker.register_model(str(stage.model), folders, settings)
