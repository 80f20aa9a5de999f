"""From raw video to an evaluated model: all stages in order, one flow."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml
from prefect import flow, get_run_logger
from prefect.runtime import flow_run

from flows.places import Place
from flows.prefect_flows.dispatch import dispatch, refuse_unplaceable
from flows.prefect_flows.logs import shorten_mistakes
from flows.prefect_flows.output import leave_worker_pipe
from flows.project import current_preset, pipeline_preset
from flows.recording import dvc as versioning
from flows.recording import results_store
from flows.recording.inventory import take_and_record
from flows.recording.work import clear_recorded, clear_work
from flows.running.lease import Lease, held, retry_expired
from flows.running.runner import git_commit, only_one
from flows.stages import PIPELINE, find_stage
from flows.tracking.cost import log_pipeline_cost
from flows.tracking.runs import Lineage, MlflowTracker, RunInfo, send_pending, tracked_run
from svd.config import Preset
from svd.core.addresses import public_values

leave_worker_pipe()
shorten_mistakes()


class PipelineRun:
    """One pass over the stages: the DVC hashes known so far by path, and the result of each stage that ran."""

    def __init__(
        self, preset: Preset, tracker: MlflowTracker, key: str, store: str | None, lease: Lease | None = None
    ) -> None:
        self.preset = preset
        self.store = store
        self.lease = lease
        self.tracker = tracker
        self.key = key
        self.known: dict[str, Lineage] = {}
        self.results: dict[str, dict[str, Any]] = {}

    def run(self, name: str, force: bool) -> None:
        """Bring one stage up to date: skip it when `dvc.lock` says that nothing changed, else run and record it."""
        logger = get_run_logger()
        if not force and not versioning.changed(name, self.preset.name):
            _, outputs = versioning.lineage(name, self.preset.name)
            self.known |= {item.path: item for item in outputs}
            self._keep_in_store(name, outputs)
            logger.info("stage %s is unchanged", name)
            return
        inputs = self._inputs(name)
        result = dispatch(name, self.preset.name, self.key, [asdict(item) for item in inputs], self.store)
        log_pipeline_cost(self.tracker, name, result["cost"], self.preset.compute.prices)
        outputs = [Lineage(**item) for item in result["outputs"]]
        versioning.record(name, self.preset.name, outputs, self.known)
        self._keep_in_store(name, outputs)
        clear_work(self.preset, name, self.store, outputs[0].md5)
        self.known |= {item.path: item for item in outputs}
        self.results[name] = result
        self.tracker.log_lineage("input", inputs)
        self.tracker.log_lineage("output", outputs)
        numbers = {f"{name}/{k}": float(v) for k, v in result["metrics"].items() if isinstance(v, int | float)}
        self.tracker.log_metrics(numbers, step=0)
        logger.info("stage %s: %s", name, result["summary"])

    def _inputs(self, name: str) -> list[Lineage]:
        """Return the stage's inputs by hash; of stages outside this run as they are now, or as dvc.lock has them.

        With a store, what dvc.lock has goes first: other machines can pull that.
        """
        found = []
        for stage in find_stage(name).inputs:
            folder = Place(self.preset.name, stage).output
            if str(folder) not in self.known:
                items = self._outside(stage, folder)
                self.known |= {item.path: item for item in items}
            if str(folder) in self.known:
                found.append(self.known[str(folder)])
        return found

    def _outside(self, stage: str, folder: Path) -> list[Lineage]:
        recorded = versioning.lineage(stage, self.preset.name)[1]
        if self.store and recorded:
            for item in recorded:
                results_store.ensure_stored(self.store, item)
            return recorded
        return [versioning.hash_folder(folder)] if folder.is_dir() else recorded

    def _keep_in_store(self, name: str, outputs: list[Lineage]) -> None:
        """Bring the store up to what dvc.lock says of a stage, and point it there."""
        if not (self.store and self.lease):
            return
        for output in outputs:
            results_store.ensure_stored(self.store, output)
        results_store.keep_entry(self.store, self.preset.name, name, self.lease.fence)


@contextmanager
def _leading(preset: Preset, store: str | None, names: list[str]) -> Iterator[Lease | None]:
    """Hold the preset's pipeline in the store, and take over what dvc.lock says there."""
    if store is None:
        yield None
        return
    with held(store, preset.name, "pipeline") as lease:
        results_store.fence_off(store, preset.name, lease.fence, [find_stage(name) for name in names])
        if lease.waited:
            results_store.adopt_locks(store, preset.name)
        else:
            results_store.fetch_locks(store, preset.name)
        yield lease


@contextmanager
def locks_kept_with(tracker: MlflowTracker) -> Iterator[None]:
    """Log DVC's lock files as they are at the end of the block, however it ends: the hashes of all that was made.

    They repeat the options of presets; credentials in the addresses there are left out.
    """
    try:
        yield
    finally:
        for lock in filter(Path.exists, results_store.LOCKS):
            content = yaml.safe_load(text := lock.read_text())
            public = public_values(content)
            tracker.log_text(text if public == content else yaml.safe_dump(public, sort_keys=False), f"dvc/{lock}")


@contextmanager
def pipeline_key(preset: Preset, names: list[str], force: bool) -> Iterator[str]:
    """Yield the MLflow key of this pipeline's run.

    One that was killed, or whose lease expired, is continued under its key, nothing else is.

    Raises UserError when the same pipeline runs on this machine already.
    """
    values = json.dumps([preset.model_dump(mode="json"), names, force], sort_keys=True)
    place = Place(preset.name, f"full-pipeline-{hashlib.sha256(values.encode()).hexdigest()[:16]}")
    with only_one(place):
        if not place.run_key.exists():
            place.run_key.write_text(f"full-pipeline-{flow_run.get_id() or uuid4()}")
        ended = True
        try:
            yield place.run_key.read_text()
        except results_store.LeaseExpired:
            ended = False
            raise
        finally:
            if ended:
                place.run_key.unlink()


def _run_name() -> str:
    return f"full-pipeline-{flow_run.parameters.get('preset') or current_preset()}"


def _run_stages(
    chosen: Preset, names: list[str], force: bool, root: str | None, lease: Lease | None
) -> tuple[PipelineRun, Path]:
    """Run the stages under one MLflow run; return what ran, and the path of the report."""
    clear_recorded(chosen)
    take_and_record(chosen)
    tags = {"stage": "full-pipeline", "preset": chosen.name, "git.commit": git_commit()}
    tags |= {"prefect.flow_run_id": str(flow_run.get_id()), "seed": str(chosen.seed)}
    values = chosen.model_dump(mode="json")
    with (
        pipeline_key(chosen, names, force) as key,
        tracked_run(RunInfo(key, f"full-pipeline ({chosen.name})", None, tags, values)) as tracker,
        locks_kept_with(tracker),
    ):
        run = PipelineRun(chosen, tracker, key, root, lease)
        for name in names:
            run.run(name, force)
        report = Place(chosen.name, "report").output / "report.html"
        if report.exists():
            tracker.log_file(report)
    return run, report


def _lead(chosen: Preset, names: list[str], force: bool, root: str | None) -> tuple[PipelineRun, Path]:
    with _leading(chosen, root, names) as lease:
        return _run_stages(chosen, names, force, root, lease)


@flow(name="full-pipeline", flow_run_name=_run_name, persist_result=True)
def full_pipeline(
    preset: str | None = None, stages: list[str] | None = None, force: bool = False, store: str | None = None
) -> dict[str, Any]:
    """Run the stages that changed, in order, and return their metrics and the path of the report.

    preset: name in presets/ (default: the one in params.yaml); stages: only these; force: unchanged ones as well;
    store: `s3://bucket/prefix` that every stage reads from and publishes to (default: `SVD_STORE`).
    """
    chosen = pipeline_preset(preset)
    names = [find_stage(name).name for name in stages] if stages else list(PIPELINE)
    refuse_unplaceable(chosen, names)
    send_pending()
    root = results_store.store_root(store)
    lead = partial(_lead, chosen, names, force, root)
    run, report = retry_expired(lead, root) if root else lead()
    return {
        "report": str(report),
        "ran": list(run.results),
        "metrics": {n: r["metrics"] for n, r in run.results.items()},
    }
