"""From a source to what it went into: catalogues, data sets, trainings and registered models. A takedown report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from flows.lineage.objects import Missing, Objects
from flows.lineage.records import Records, StageRun
from flows.lineage.use import Uses
from flows.stages import STAGES
from flows.tracking.runs import tracking_uri
from svd.catalogue.tables import content_hash
from svd.core.addresses import public_address
from svd.core.errors import UserError
from svd.training.usage import Usage

MODELS = {stage.model for stage in STAGES.values()}  # other projects may register theirs in the same MLflow


@dataclass(frozen=True)
class Found:
    """A catalogue that has the source: the addresses with the same bytes, and its clips, by whether they are kept."""

    catalogue: str
    uris: list[str]
    clips: list[str]
    kept: list[str]


@dataclass(frozen=True)
class Holder:
    """A stage's output by hash that holds something of the source: how many of its clips, None: unknown."""

    stage: str
    md5: str
    clips: int | None


@dataclass(frozen=True)
class Reader:
    """A run, or a registered model, that has seen clips of the source: numbers of clips, and through which runs.

    relation: `trained`, `perhaps` (may have seen), `validated`, or `unknown` where something can't be read any more.
    """

    name: str
    relation: str
    trained: int = 0
    perhaps: int = 0
    validated: int = 0
    through: list[str] = field(default_factory=list)
    run_id: str = ""


@dataclass(frozen=True)
class Takedown:
    """Everything that the source went into; unreadable: hashes of catalogues that are nowhere to be had."""

    source: str
    found: list[Found]
    data: list[Holder]
    runs: list[Reader]
    models: list[Reader]
    unreadable: list[str]

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)


def report_source(source: str, records: Records, objects: Objects, catalogues: Iterable[str] = ()) -> Takedown:
    """Return what came from `source`: an address, a folder or prefix of such, or a source id (hash of its content).

    A file, or a folder of files, that lies here is found by its content, too: a catalogue may know it by another name.
    catalogues: hashes to look into besides those of MLflow's runs.
    """
    if not records.runs:
        raise UserError(
            f"MLflow at {tracking_uri()} has no run of any stage; set MLFLOW_TRACKING_URI to the one that has"
        )
    wanted = [source, *_ids_here(Path(source))]
    source = wanted[0] = public_address(source)  # as the catalogue has it
    uses, found, unreadable = Uses(records, objects), list[Found](), list[str]()
    for md5 in dict.fromkeys((*records.hashes("curation"), *catalogues)):
        try:
            found += _in_catalogue(wanted, md5, uses)
        except UserError:
            unreadable.append(md5)
    clips, hashes = frozenset(clip for one in found for clip in one.clips), {one.catalogue for one in found}
    touched = [run for run in records.runs.values() if _reads(run, hashes | set(unreadable), records)]
    runs = [reader for run in touched if (reader := _run_reader(run, clips, uses, unreadable)).relation]
    data = _holders(found, touched, clips, uses)
    return Takedown(source, found, data, runs, _model_readers(records, clips, uses, unreadable), unreadable)


def _ids_here(path: Path) -> list[str]:
    """Return the source ids of a local file, or of the files in a folder; raises UserError for what can't be read."""
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    try:
        return [content_hash(file) for file in files]
    except OSError as error:
        raise UserError(
            f"{error.filename}: can't be read ({error.strerror}); its content tells what came from it"
        ) from None


def _in_catalogue(wanted: list[str], md5: str, uses: Uses) -> list[Found]:
    clips, sources = uses.catalogue(md5)
    below = pl.col("source_uri").str.starts_with(wanted[0].rstrip("/") + "/")
    named = (pl.col("source_uri") == wanted[0]) | below | pl.col("source_id").is_in(wanted)
    ids = sources.filter(named & pl.col("source_id").is_not_null())["source_id"].to_list()
    same = sources.filter(named | pl.col("source_id").is_in(ids))
    if same.is_empty():
        return []
    mine = clips.filter(pl.col("source_uri").is_in(same["source_uri"].to_list()) | pl.col("source_id").is_in(ids))
    kept = mine.filter(pl.col("keep"))
    return [Found(md5, same["source_uri"].to_list(), mine["clip_id"].to_list(), kept["clip_id"].to_list())]


def _reads(run: StageRun, catalogues: set[str], records: Records) -> bool:
    return any(data.stage == "curation" and data.md5 in catalogues for data in records.ancestry(run))


def _relation(usage: Usage, clips: frozenset[str]) -> tuple[str, tuple[int, int, int]]:
    counts = len(usage.trained & clips), len(usage.perhaps & clips), len(usage.validated & clips)
    return next((name for name, count in zip(vars(usage), counts, strict=True) if count), ""), counts


def _run_reader(run: StageRun, clips: frozenset[str], uses: Uses, unreadable: list[str]) -> Reader:
    lost = unreadable and _reads(run, set(unreadable), uses.records) and {"latents", "curation"} & set(run.inputs)
    try:
        relation, (trained, perhaps, validated) = _relation(uses.by(run), clips)
    except Missing:
        relation, (trained, perhaps, validated) = "unknown", (0, 0, 0)
    relation = relation or ("unknown" if lost else "")
    return Reader(f"{run.stage} ({run.preset})", relation, trained, perhaps, validated, run_id=run.id)


def _model_readers(records: Records, clips: frozenset[str], uses: Uses, unreadable: list[str]) -> list[Reader]:
    found = []
    for model in records.models:
        title = f"{model.name}/{model.version}" + "".join(f" @{alias}" for alias in model.aliases)
        if (run := records.find_run(model.run_id)) is None:
            if model.name in MODELS:
                found.append(Reader(title, "unknown", through=["MLflow has no run of it any more"]))
            continue
        readers = [_run_reader(one, clips, uses, unreadable) for one in records.chain(run)]
        relation, (trained, perhaps, validated) = _relation(uses.through(run)[0], clips)
        if relation in ("", "validated") and any(reader.relation == "unknown" for reader in readers):
            relation = "unknown"
        if relation:
            through = [f"{reader.name}: {reader.relation}" for reader in readers if reader.relation]
            found.append(Reader(title, relation, trained, perhaps, validated, through, run.id))
    return found


def _holders(found: list[Found], touched: list[StageRun], clips: frozenset[str], uses: Uses) -> list[Holder]:
    """Return the outputs that hold the source's files, clips or latents."""
    records = uses.records
    data = [Holder("curation", one.catalogue, len(one.clips)) for one in found]
    makers = [run for one in found if (run := records.maker("curation", one.catalogue))]
    data += [Holder("sources", md5, None) for md5 in dict.fromkeys(r.inputs.get("sources", "") for r in makers) if md5]
    for md5 in dict.fromkeys(run.outputs.get("latents", "") for run in touched if run.stage == "latents"):
        if md5:
            try:
                data.append(Holder("latents", md5, len(clips & uses.cached(md5))))
            except UserError:
                data.append(Holder("latents", md5, None))
    return [one for one in data if one.clips != 0]
