"""From a model to its sources: registered version, run, commit, preset, data, catalogue, clips, sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from flows.lineage.objects import Missing, Objects
from flows.lineage.records import Data, Model, Records, StageRun
from flows.lineage.use import Uses
from flows.places import Place
from flows.recording import dvc as versioning
from flows.stages import STAGES
from svd.core.errors import UserError
from svd.training.usage import Usage


@dataclass(frozen=True)
class CatalogueUse:
    """A catalogue by hash, and how much of it went into a model: numbers of clips, and the sources they come from.

    sources: (URI, clips trained on, perhaps trained on, for validation, licence), most clips first. problem: why the
    catalogue or a cache of it could not be read; the numbers are then too low.
    """

    md5: str
    clips: int = 0
    kept: int = 0
    trained: int = 0
    perhaps: int = 0
    validated: int = 0
    sources: Sequence[tuple[str, int, int, int, str]] = field(default=())
    problem: str = ""


@dataclass(frozen=True)
class Origin:
    """Everything that a model, or another output, comes from."""

    model: Model | None
    run: StageRun
    data: list[Data]
    catalogues: list[CatalogueUse]

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)


def find_run(name: str, records: Records) -> tuple[Model | None, StageRun]:
    """Return the registered version and the run that `name` means.

    name: `MODEL@ALIAS`, `MODEL/VERSION`, an MLflow run id, or the output folder of a stage. Raises UserError for
    anything else, and for a folder that no run in MLflow has made.
    """
    if model := records.find_model(name):
        return model, _by_id(model.run_id, records)
    if len(parts := Path(name).parts) >= 2 and parts[-1] in STAGES:
        return None, _of_output(Place.of_output(name), records)
    return None, _by_id(name, records)


def _by_id(name: str, records: Records) -> StageRun:
    run = records.find_run(name)
    if run is None:
        raise UserError(
            f"'{name}': neither MODEL@ALIAS nor MODEL/VERSION of a registered model, the id of a run, nor the output "
            "folder of a stage"
        )
    if run.stage not in STAGES:
        raise UserError(f"run {name} is one of '{run.stage}'; give the run of a stage, which it contains")
    return run


def _of_output(place: Place, records: Records) -> StageRun:
    if place.output.is_dir():
        md5 = versioning.hash_folder(place.output).md5
    else:
        _, outputs = versioning.lineage(place.stage, place.preset)
        md5 = outputs[0].md5 if outputs else ""
    run = records.maker(place.stage, md5)
    if run is None:
        raise UserError(f"{place.output} ({md5 or 'not recorded'}): MLflow knows of no run that made it")
    return run


def trace(name: str, records: Records, objects: Objects) -> Origin:
    """Return where `name` (see `find_run`) comes from."""
    model, run = find_run(name, records)
    data, uses = records.ancestry(run), Uses(records, objects)
    own = [Data(stage, md5, run) for stage, md5 in run.outputs.items() if stage == "curation"]
    usage, lost = uses.through(run)
    hashes = dict.fromkeys(item.md5 for item in (*own, *data) if item.stage == "curation")
    return Origin(model, run, data, [_use(md5, uses, usage, lost) for md5 in hashes])


def _use(md5: str, uses: Uses, usage: Usage, lost: Sequence[str]) -> CatalogueUse:
    try:
        clips, sources = uses.catalogue(md5)
    except (Missing, UserError) as error:
        return CatalogueUse(md5, problem=str(error))
    marked = clips.select(
        "source_uri",
        *(pl.col("clip_id").is_in(list(ids)).alias(name) for name, ids in vars(usage).items()),
    )
    by_source = marked.group_by("source_uri").agg(pl.col(*vars(usage)).sum())
    licences = sources.group_by("source_uri").agg(pl.col("licence").first())
    rows = by_source.join(licences, "source_uri", how="left").filter(pl.sum_horizontal(*vars(usage)) > 0)
    order = [*vars(usage), "source_uri"]
    rows = rows.sort(order, descending=[True] * len(vars(usage)) + [False])
    trained, perhaps, validated = (int(marked[name].sum()) for name in vars(usage))
    listed = rows.select("source_uri", *vars(usage), pl.col("licence").fill_null("")).rows()
    problem = "".join(f"{one} is neither in DVC's cache nor in a remote" for one in lost[:1])
    return CatalogueUse(md5, len(clips), int(clips["keep"].sum()), trained, perhaps, validated, listed, problem)
