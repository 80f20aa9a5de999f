"""The stage `curation`: from a folder of raw videos to a catalogue, clip shards and statistics (§3, App. C).

Work is split into units of sources. Threads measure units (decode, cuts, motion, text, clips), each with a decoding
process of its own that may crash without harm. One more process scores measured units with the networks. Both kinds of
result appear by rename in the work folder, so a killed run resumes where it was. The merge sorts by content, so the
result does not depend on order, kills or the number of workers.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from svd.catalogue.report import write_report
from svd.catalogue.statistics import write_statistics
from svd.config import CurationConfig, EncodersConfig
from svd.core.errors import UserError
from svd.core.files import write_json
from svd.curation.base.types import SourceFailure
from svd.curation.measuring.fetching import local_file
from svd.curation.measuring.parts import LEAST_RATE
from svd.curation.measuring.process import DecodeProcess
from svd.curation.measuring.unit import Identified, Unit, identify, measure_unit, units_of
from svd.curation.merge import Merged, merge_units
from svd.curation.metrics import curation_metrics, curation_summary
from svd.curation.scoring.process import ScoringProcess
from svd.sources.listing import list_sources, with_addresses
from svd.sources.source import Source
from svd.stage import Report, StageContext, publish

SPLITS = ("train", "test", "footage")


def run(context: StageContext) -> Report:
    """Curate the sources in `context.inputs["sources"]`; publish catalogue, shards, flow, embeddings, funnel and plots.

    Raises UserError when there is no source, or no usable clip.
    """
    config = context.preset.curation
    folder = context.inputs["sources"]
    sources = list_sources([str(folder / split) for split in SPLITS if (folder / split).is_dir()], folder)
    if not sources:
        raise UserError(f"{folder}: no videos in {', '.join(SPLITS)}; set sources.paths or sources.synthetic")
    sources = with_addresses(sources, context.preset.sources.paths)
    context.work.mkdir(parents=True, exist_ok=True)
    workers = context.preset.compute.curation.workers
    identified = split_long(find_duplicates(sources, workers), config, context.work / "fetched")
    units = list(units_of(identified, context.preset.sources.sources_per_shard))
    with contextlib.closing(ScoringProcess(config, context.preset.encoders, context.inputs["encoders"])) as scoring:
        measured, scored = process_units(units, config, scoring, context)
    finished = context.work / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    with progress_bar() as bar:
        task = bar.add_task("catalogue, statistics, report", total=3)
        merged = merge_units(measured, scored, finished, config)
        _check_usable(merged, folder)
        values = curation_metrics(merged, folder)
        write_json(finished / "models.json", scored_by(config, context.preset.encoders))
        bar.advance(task)
        write_statistics(finished, merged.thresholds)
        bar.advance(task)
        write_report([finished], finished / "report.html", [context.preset.name])
        bar.advance(task)
    line = curation_summary(merged)
    context.tracker.log_metrics({k: v for k, v in values.items() if isinstance(v, int | float)}, 0)
    for plot in sorted((finished / "plots").glob("*")):
        context.tracker.log_file(plot, "curation")
    return publish(finished, context.output, Report(values, line))


def find_duplicates(sources: Sequence[Source], workers: int) -> list[Identified]:
    """Hash all local sources; a source whose bytes came before is marked as duplicate, an unreadable one as failed."""
    with progress_bar() as bar, ThreadPoolExecutor(workers) as pool:
        task = bar.add_task("hashing sources", total=len(sources))
        found = []
        for identified in pool.map(identify, sources):
            found.append(identified)
            bar.advance(task)
    first: dict[str, str] = {}
    for index, one in enumerate(found):
        if one.source_id:
            primary = first.setdefault(one.source_id, one.source.uri)
            if primary != one.source.uri:
                found[index] = Identified(one.source, one.source_id, one.bytes, duplicate_of=primary)
    return found


def split_long(identified: Sequence[Identified], config: CurationConfig, folder: Path) -> list[Identified]:
    """Replace each long local source by its parts; members of local tars are extracted to `folder` to be probed.

    Remote sources stay whole: every part would have to be fetched again. So do sources that can't be read.
    """
    least = config.part_seconds * LEAST_RATE
    found: list[Identified] = []
    with DecodeProcess() as decoding:
        for one in identified:
            count = 1
            usable = not one.failure and not one.duplicate_of and not one.source.remote
            if usable and one.bytes >= least:
                with contextlib.suppress(SourceFailure, OSError), local_file(one.source, folder) as path:
                    count = decoding.count_parts(path, config)  # a failure is reported when it is measured
            found += [replace(one, part=(number, count)) for number in range(count)]
    return found


def scored_by(config: CurationConfig, encoders: EncodersConfig) -> dict[str, str]:
    """Name the model or algorithm behind each score, for readers of the report."""
    toy = "toy-clip, a small model trained here on synthetic captions"
    models = {
        "similarity": toy if encoders.kind == "toy-clip" else f"open_clip {encoders.model} {encoders.weights}",
        "motion": f"{config.motion.algorithm} at {config.motion.fps:g} fps",
        "text": config.text.detector,
        "captions": ", ".join(config.captions.captioners),
    }
    if encoders.aesthetics_weights:
        models["aesthetics"] = Path(encoders.aesthetics_weights).name
    if config.nsfw_weights:
        models["nsfw"] = Path(config.nsfw_weights).name
    return models


def process_units(
    units: Sequence[Unit], config: CurationConfig, scoring: ScoringProcess, context: StageContext
) -> tuple[list[Path], list[Path]]:
    """Measure and score all units; return their folders in order. Units that are done already are skipped."""
    measured = [context.work / "measured" / unit.name for unit in units]
    scored = [context.work / "scored" / unit.name for unit in units]
    with progress_bar() as bar, contextlib.closing(_measured(units, context)) as done:
        task = bar.add_task("curating (units of sources)", total=len(units))
        for count, unit in enumerate(done, start=1):
            path = context.work / "measured" / unit.name
            scoring.score_unit(path, context.work / "scored", config.shard_bytes)
            bar.advance(task)
            context.tracker.log_metrics({"curation/units": float(count)}, count)
    return measured, scored


def _measured(units: Sequence[Unit], context: StageContext) -> Generator[Unit]:
    """Yield units as they become measured, by `compute.curation.workers` processes.

    An error ends all of them.
    """
    config, folder = context.preset.curation, context.work / "measured"
    workers = context.preset.compute.curation.workers
    folder.mkdir(parents=True, exist_ok=True)
    waiting = [unit for unit in units if not (folder / unit.name).exists()]
    yield from (unit for unit in units if unit not in waiting)
    if not waiting:
        return
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(DecodeProcess()) for _ in range(min(workers, len(waiting)))]
        idle: SimpleQueue[DecodeProcess] = SimpleQueue()
        for decoding in processes:
            idle.put(decoding)

        def measure(unit: Unit) -> Path:
            decoding = idle.get()
            try:
                return measure_unit(unit, config, folder, decoding)
            finally:
                idle.put(decoding)

        pool = stack.enter_context(ThreadPoolExecutor(len(processes)))
        futures: dict[Future[Path], Unit] = {pool.submit(measure, unit): unit for unit in waiting}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for decoding in processes:
                decoding.stop()
            raise


def progress_bar() -> Progress:
    """Make a progress bar on stderr; SVD_NO_PROGRESS=1 turns it off."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=os.environ.get("SVD_NO_PROGRESS") == "1",
    )


def _check_usable(merged: Merged, folder: Path) -> None:
    """Raise UserError, with the first reasons, when no source gave a clip."""
    if len(merged.clips):
        return
    reasons = merged.sources.filter(merged.sources["reason"] != "").select("source_uri", "reason").head(3).rows()
    shown = "; ".join(f"{uri}: {reason}" for uri, reason in reasons)
    raise UserError(f"{folder}: not one of {len(merged.sources)} sources gave a clip ({shown})")
