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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from flows.places import Place, run_key_of
from flows.project import option
from flows.recording import dvc as versioning
from flows.recording import inventory, results_store, work_store
from flows.recording.dvc import hash_folder
from flows.recording.local_copies import localise
from flows.recording.work import (
    clear_recorded,
    clear_work,
    close_work,
    dvc_records,
    forget_ended,
    mark_delivered,
    published_before,
)
from flows.running.inputs import Part, bring_inputs, input_files, input_hashes, stage_inputs
from flows.running.lease import Lease, held
from flows.running.registered_card import registered_card
from flows.running.scratch import within_scratch
from flows.serving.signature import signature
from flows.stages import Stage, find_stage
from flows.tracking.cost import metered
from flows.tracking.mlflow_delivery import checkpoint_digest
from flows.tracking.runs import Lineage, MlflowTracker, RunInfo, tracked_run
from svd.config import Preset
from svd.config.load import load_preset
from svd.core.addresses import public_values
from svd.core.disk import full_disk_in_one_line
from svd.core.errors import UserError
from svd.core.files import Held, exclusive, recover
from svd.stage import Profile, Report, StageContext, republish
from svd.training import ranks
from svd.training.model_card import CARD

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunLink:
    """Where a stage run belongs: the MLflow key of its parent, and the Prefect run that started it."""

    parent: str | None = None
    flow_run: str | None = None


def work_digest(stage: Stage, preset: Preset, inputs: Mapping[str, Path]) -> str:
    """Return a name for work in progress by what it is made from: the options of the stage that the preset's file sets,
    and names, sizes and metrics of the input files that it reads.

    Files that may be streamed count by name. An option that the file doesn't set is left out, so that a new version of
    the code goes on where the old one was.
    """
    values = preset.model_dump(mode="json", exclude_unset=True)
    parts = {name: option(values, name) for name in sorted({"name", "seed", *stage.options})}
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for name, folder in sorted(inputs.items()):
        for relative, size in sorted(input_files(folder).items(), key=lambda item: PurePosixPath(item[0])):
            if stage.streams_file(name, relative):
                size = 0
            if stage.reads_file(name, relative):
                digest.update(f"{name}/{relative}:{size}\n".encode())
        if stage.reads_file(name, "metrics.json") and (folder / "metrics.json").is_file():
            digest.update((folder / "metrics.json").read_bytes())
    return digest.hexdigest()[:16]


def stage_params(stage: Stage, preset: Preset) -> dict[str, Any]:
    """Return the options that the stage depends on, by dotted path: the params of its MLflow run."""
    values = preset.model_dump(mode="json")
    return {name: option(values, name) for name in stage.options}


def git_commit() -> str:
    """Return the commit of the code: SVD_GIT_COMMIT, which an image carries, else that of the checkout.

    It ends in `-dirty` when tracked files differ; outside a checkout it is 'unknown'.
    """
    if built_from := os.environ.get("SVD_GIT_COMMIT"):
        return built_from
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def open_work(stage: Stage, preset: Preset, inputs: Mapping[str, Path], store: str | None = None) -> Path:
    """Make, or find again, the stage's work folder for exactly these options and inputs, here or in the store.

    Of work for others, which a killed run left, the newest is kept: changing an option back finds it again.
    """
    place = Place(preset.name, stage.name)
    work = place.work(work_digest(stage, preset, inputs))
    others = sorted((p for p in place.works.glob("*/") if p != work), key=lambda p: p.stat().st_mtime)
    for other in others[:-1]:
        logger.warning("%s: unfinished work for other options or inputs is removed, a newer one is kept", other)
        close_work(other)
    if store:
        work_store.restore(work, work_store.work_uri(store, work))
    if others and not work.exists():
        logger.warning("%s holds unfinished work for other options or inputs; this run starts anew", others[-1])
    work.mkdir(parents=True, exist_ok=True)
    os.utime(work)
    return work


@contextmanager
def _leased(root: str | None, place: Place) -> Iterator[Lease | None]:
    """Hold the stage's lease in the store, if there is one."""
    if root is None:
        yield None
        return
    with held(root, place.preset, place.stage) as lease:
        yield lease


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
    name: str,
    preset_name: str,
    link: RunLink | None = None,
    store_option: str | None = None,
    keep: bool = False,
    inputs: Sequence[Lineage] = (),
) -> Report:
    """Run stage `name` of the preset called `preset_name`; see `run_preset_stage`."""
    return run_preset_stage(name, load_preset(preset_name), link, store_option, keep, inputs)


def run_preset_stage(
    name: str,
    preset: Preset,
    link: RunLink | None = None,
    store_option: str | None = None,
    keep: bool = False,
    inputs: Sequence[Lineage] = (),
    profile: int = 0,
) -> Report:
    """Run a stage as one MLflow run; work in progress of a killed run is taken up again, of another machine too.

    store_option: where results are kept besides this machine (default: `SVD_STORE`): inputs are pulled from there, the
    output is pushed there. inputs: their hashes (default: those the store's dvc.lock names). keep: leave the work
    folder to the caller, who records the output and then calls `clear_work`; without it the store records the output.
    profile: how many steps of each phase of a training are traced, into `Place.profiles`.
    Raises UserError for an unknown stage, for missing inputs, outside a DVC repository, when another process of this
    machine runs the stage, and LeaseLost when an executor on another machine has taken over. `dvc repro` works without
    the store: it brings inputs and records the output itself, and `dvc push` sends it.
    """
    stage = find_stage(name)
    root = None if dvc_records() else results_store.store_root(store_option)
    if ranks.rank() > 0:
        return _follow(stage)
    place = Place(preset.name, stage.name)
    with (
        full_disk_in_one_line(place.works, place.output),
        within_scratch(Path.cwd()),
        only_one(place),
        _traced(place.profiles) if profile else nullcontext(),
        _leased(root, place) as lease,
        ranks.leading() if stage.distributed else nullcontext(),
    ):
        for folder in (*place.inputs.values(), place.output):
            recover(folder)
        stream = bool(stage.streams) and preset.compute.of(stage.name).stream
        parts = bring_inputs(stage, preset.name, inputs, root, stream)
        if root and lease:
            return _run_shared(stage, preset, link or RunLink(), Shared(root, lease, parts), keep, profile)
        report, _ = _run(stage, preset, link or RunLink(), None, profile)
        if not (keep or dvc_records()):
            clear_work(preset, stage.name)
        return report


@contextmanager
def _traced(folder: Path) -> Iterator[None]:
    """Say so when no trace was written into `folder`: a killed run, or another machine, had trained already."""
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*")}
    yield
    if {path: path.stat().st_mtime_ns for path in folder.glob("*")} == before:
        logger.warning("%s: no trace was written, because no phase took enough steps", folder)


@dataclass(frozen=True)
class Shared:
    """The store of a run, the lease under which it works there, and the inputs that came from there in part."""

    root: str
    lease: Lease
    parts: Mapping[str, Part]


def _run_shared(stage: Stage, preset: Preset, link: RunLink, shared: Shared, keep: bool, profile: int) -> Report:
    """Run a stage whose output goes to a store; take over what another executor made while this one waited for it."""
    if not keep:
        results_store.fence_off(shared.root, preset.name, shared.lease.fence, [stage])
    if shared.lease.waited and (report := _made_meanwhile(stage, preset, shared.root)):
        return report
    report, work = _run(stage, preset, link, shared, profile)
    outputs = versioning.save_outputs(stage.name, preset.name)
    shared.lease.check()
    versioning.push(outputs, shared.root)
    shared.lease.check()
    if keep:
        work_store.deliver(work, work_store.work_uri(shared.root, work), outputs[0].md5)
    else:
        _record(stage, preset, outputs, shared, work)
    return report


def _made_meanwhile(stage: Stage, preset: Preset, root: str) -> Report | None:
    """Return the report of the output that the store names, when nothing changed since it was made."""
    output = results_store.stored_output(root, preset.name, stage.name)
    if output is None:
        return None
    inventory.take_stage(stage, preset)
    results_store.adopt_locks(root, preset.name, stage.name)
    if versioning.changed(stage.name, preset.name):
        return None
    versioning.pull([output], root)
    metrics = json.loads((Path(output.path) / "metrics.json").read_text())
    return Report(metrics, f"{stage.name} was made by another executor meanwhile")


def _record(stage: Stage, preset: Preset, outputs: list[Lineage], shared: Shared, work: Path) -> None:
    """Record an output in dvc.lock and in the store."""
    inventory.take_stage(stage, preset)
    hashes = input_hashes(Place(preset.name, stage.name).inputs, shared.parts)
    versioning.record(stage.name, preset.name, outputs, {item.path: item for item in hashes})
    results_store.keep_entry(shared.root, preset.name, stage.name, shared.lease.fence)
    work_store.forget(work_store.work_uri(shared.root, work))
    clear_work(preset, stage.name)


def _run(stage: Stage, preset: Preset, link: RunLink, shared: Shared | None, profile: int) -> tuple[Report, Path]:
    """Run a stage, or find what a run that was killed before its output was recorded has made.

    Returns its report and its work folder.
    """
    place, parts = Place(preset.name, stage.name), shared.parts if shared else {}
    inputs = stage_inputs(stage, preset, parts)
    versioning.open_repo().close()  # a missing one is reported before hours of work, not after
    if dvc_records() and not place.inventory.is_file():  # `dvc repro -s` in a fresh clone; DVC hashes it at the end
        inventory.take_stage(stage, preset)
    clear_recorded(preset)
    root = shared.root if shared else None
    work = open_work(stage, preset, inputs, root)
    report = published_before(work, place.output, root) if forget_ended(stage, work, root) else None
    if report is None:
        with work_store.mirrored(work, work_store.work_uri(root, work)) if root else nullcontext():
            report, made = _run_tracked(stage, preset, inputs, work, link, shared, profile)
        mark_delivered(work, made)
    return report, work


def _follow(stage: Stage) -> Report:
    """Do what the other ranks of torchrun or srun do: they only train, beside the first one."""
    if not stage.distributed:
        return Report({}, f"stage '{stage.name}' runs in the first process alone")
    context = ranks.await_first_rank()
    return stage.load()(context) if context else Report({}, f"stage '{stage.name}' has nothing to train")


def _run_tracked(
    stage: Stage,
    preset: Preset,
    inputs: Mapping[str, Path],
    work: Path,
    link: RunLink,
    shared: Shared | None,
    profile: int,
) -> tuple[Report, Lineage]:
    place = Place(preset.name, stage.name)
    info = RunInfo(
        run_key(work),
        f"{stage.name} ({preset.name})",
        link.parent,
        _tags(stage, preset, link, shared.root if shared else None),
        stage_params(stage, preset),
    )
    with tracked_run(info) as tracker, metered(tracker, stage, preset, work):
        tracker.log_text(json.dumps(public_values(preset.model_dump(mode="json")), indent=2), "config/preset.json")
        traces = Profile(profile, place.profiles) if profile else None
        about = stage.description, stage_params(stage, preset)
        context = StageContext(localise(preset, stage), inputs, place.output, work, tracker, *about, traces)
        read = input_hashes(inputs, shared.parts if shared else {})
        tracker.log_lineage("input", read)
        report = republish(work, place.output)
        if report is None:
            if stage.distributed:
                ranks.announce(context)
            report = stage.load()(context)
        made = hash_folder(place.output)
        tracker.log_lineage("output", [made])
        _log_outcome(tracker, stage, preset, report, [*read, made])
    return report, made


def _tags(stage: Stage, preset: Preset, link: RunLink, store: str | None) -> dict[str, str]:
    """Return the tags of the stage's MLflow run."""
    tags = {"stage": stage.name, "preset": preset.name, "seed": str(preset.seed), "git.commit": git_commit()}
    if link.flow_run:
        tags["prefect.flow_run_id"] = link.flow_run
    return tags | ({"store": store} if store else {})


def _log_outcome(
    tracker: MlflowTracker, stage: Stage, preset: Preset, report: Report, lineage: Sequence[Lineage]
) -> None:
    """Log what a stage has found and shown, and register its model. lineage: of its inputs and, last, its output."""
    numbers = {k: float(v) for k, v in report.metrics.items() if isinstance(v, int | float)}
    tracker.log_metrics(numbers, step=0)
    folder = Place(preset.name, stage.name).output
    for path in sorted(folder.glob("samples/*.mp4"))[:8]:
        tracker.log_file(path, "samples")
    for path in sorted([*folder.glob("*.html"), *folder.glob("*.png"), *folder.glob("plots/*.png")]):
        tracker.log_file(path, "pictures" if path.suffix == ".png" else "")
    if stage.model:
        _register(tracker, stage, preset, folder, lineage)


def _register(tracker: MlflowTracker, stage: Stage, preset: Preset, folder: Path, lineage: Sequence[Lineage]) -> None:
    """Register what the stage trained, with the networks it needs at inference and its model card."""
    *inputs, made = lineage
    card = registered_card(stage, preset, folder, git_commit(), inputs, made)
    tracker.log_text(card["card"], CARD)
    needed = {"autoencoder": "autoencoder", "encoders": "encoders"} | ({"base": stage.base} if stage.base else {})
    folders = {"model": folder} | {part: Place(preset.name, name).output for part, name in needed.items()}
    settings = {
        "checkpoint": checkpoint_digest(folder),
        "task": stage.name,
        "preset": preset.model_dump(mode="json"),
        "signature": signature(preset, stage.name).to_dict(),
        **card,
    }
    tracker.register_model(str(stage.model), folders, settings)
