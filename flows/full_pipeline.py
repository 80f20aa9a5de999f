"""From raw video to an evaluated model: all stages in order, one flow."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml
from prefect import flow, get_run_logger
from prefect.runtime import flow_run

from flows import versioning
from flows.dispatch import dispatch
from flows.runner import git_commit, output_folder
from flows.stages import PIPELINE, find_stage
from flows.tracking import Lineage, MlflowTracker, RunInfo, send_pending, tracked_run
from svd.config import Preset
from svd.presets import load_preset
from svd.stage import UserError

PARAMS = Path("params.yaml")


def select_preset(name: str | None) -> Preset:
    """The preset of this run; a name that differs from `params.yaml` is written there, because DVC reads it there."""
    current = str(yaml.safe_load(PARAMS.read_text())["preset"])
    preset = load_preset(name or current)
    if Path(f"presets/{preset.name}.yaml").exists() and preset.name != current:
        text = PARAMS.read_text().replace(f"preset: {current}", f"preset: {preset.name}")
        PARAMS.write_text(text)
    elif preset.name != current:
        raise UserError(f"the pipeline's presets live in presets/; there is no presets/{preset.name}.yaml")
    return preset


class PipelineRun:
    """The state of one pass over the stages: known DVC hashes by path, and what each stage answered."""

    def __init__(self, preset: Preset, tracker: MlflowTracker, key: str) -> None:
        self.preset = preset
        self.tracker = tracker
        self.key = key
        self.known: dict[str, Lineage] = {}
        self.results: dict[str, dict[str, Any]] = {}

    def run(self, name: str, force: bool) -> None:
        """Bring one stage up to date: skip it when `dvc.lock` says that nothing changed, else run and record it."""
        logger = get_run_logger()
        if not force and not versioning.changed(name):
            _, outputs = versioning.lineage(name)
            self.known |= {item.path: item for item in outputs}
            logger.info("stage %s is unchanged", name)
            return
        inputs = [
            self.known[path]
            for stage in find_stage(name).inputs
            if (path := str(output_folder(self.preset, stage))) in self.known
        ]
        result = dispatch(name, self.preset.name, self.key, [asdict(item) for item in inputs])
        outputs = [Lineage(**item) for item in result["outputs"]]
        versioning.record(name, outputs, self.known)
        self.known |= {item.path: item for item in outputs}
        self.results[name] = result
        self.tracker.log_lineage("input", inputs)
        self.tracker.log_lineage("output", outputs)
        numbers = {f"{name}/{k}": float(v) for k, v in result["metrics"].items() if isinstance(v, int | float)}
        self.tracker.log_metrics(numbers, step=0)
        logger.info("stage %s: %s", name, result["summary"])


@flow(name="full-pipeline", flow_run_name="full-pipeline-{preset}", persist_result=True)
def full_pipeline(preset: str | None = None, stages: list[str] | None = None, force: bool = False) -> dict[str, Any]:
    """Run the stages that changed, in order, and return their metrics and the path of the report.

    preset: name in presets/ (default: the one in params.yaml); stages: only these; force: unchanged ones as well.
    """
    chosen = select_preset(preset)
    names = [find_stage(name).name for name in stages] if stages else list(PIPELINE)
    send_pending()
    key = f"full-pipeline-{flow_run.get_id() or uuid4()}"
    tags = {"stage": "full-pipeline", "preset": chosen.name, "git.commit": git_commit()}
    tags |= {"prefect.flow_run_id": str(flow_run.get_id()), "seed": str(chosen.seed)}
    with tracked_run(
        RunInfo(key, f"full-pipeline ({chosen.name})", None, tags, chosen.model_dump(mode="json"))
    ) as tracker:
        run = PipelineRun(chosen, tracker, key)
        for name in names:
            run.run(name, force)
        report = output_folder(chosen, "report") / "report.html"
        if report.exists():
            tracker.log_file(report)
    return {
        "report": str(report),
        "ran": list(run.results),
        "metrics": {n: r["metrics"] for n, r in run.results.items()},
    }
