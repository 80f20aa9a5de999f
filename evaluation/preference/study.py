"""A study folder: what is compared, the harmonised clips, the votes, and the results.

`study.json` names models, prompts and axes; `clips/` holds what raters see; votes lie in `votes.db` unless a database
URL is given.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evaluation.moments import write_bytes
from evaluation.preference.clips import Source, prepare_clips
from evaluation.preference.pairs import AXES, schedule
from evaluation.preference.ratings import Rating, aggregated, agreement, bradley_terry, elo, models_of, side_bias
from evaluation.preference.store import VoteStore
from svd.stage import UserError, write_json

_VIDEOS = (".mp4", ".webm", ".gif")


@dataclass(frozen=True)
class Study:
    """A study as stored: `models` in the order of the clips' numbers, `prompts` by id."""

    models: tuple[str, ...]
    prompts: dict[str, str]
    axes: tuple[str, ...]
    votes: int
    seed: int


def create_study(
    folder: Path,
    sources: Sequence[Source],
    prompts: Mapping[str, str] | None = None,
    *,
    axes: Sequence[str] = AXES,
    votes: int = 3,
    seed: int = 0,
    database: str | None = None,
) -> Study:
    """Harmonise the clips of `sources` into `folder` and store the schedule; the same call again changes nothing.

    prompts: text by id, the clips' file names without ending; None: the names that all folders share are ids and texts.
    Raises UserError for missing clips and for a folder that holds another study.
    """
    texts = dict(prompts) if prompts is not None else _shared(sources)
    study = Study(tuple(source.model for source in sources), texts, tuple(axes), votes, seed)
    try:
        questions = schedule(study.models, list(texts), axes=axes, votes=votes, seed=seed)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from None
    folder.mkdir(parents=True, exist_ok=True)
    stored = folder / "study.json"
    if stored.is_file() and load_study(folder) != study:
        raise UserError(f"{folder}: holds another study; give another folder or the same models, prompts and seed")
    prepare_clips(sources, texts, folder / "clips")
    open_store(folder, database).plan(questions)
    write_json(stored, asdict(study))
    return study


def _shared(sources: Sequence[Source]) -> dict[str, str]:
    """Names of clips that every folder has, as id and text."""
    names = [{p.stem for p in s.folder.glob("*") if p.suffix.lower() in _VIDEOS} for s in sources]
    shared = sorted(set.intersection(*names)) if names else []
    if not shared:
        folders = ", ".join(str(source.folder) for source in sources)
        raise UserError(f"no clip has the same name in all of: {folders}; name clips by their prompt")
    return {name: name for name in shared}


def load_study(folder: Path) -> Study:
    """The study in `folder`. Raises UserError when there is none."""
    path = folder / "study.json"
    try:
        values = json.loads(path.read_text())
        return Study(
            tuple(values["models"]), dict(values["prompts"]), tuple(values["axes"]), values["votes"], values["seed"]
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: no study there ({error}); create it first") from None


def open_store(folder: Path, database: str | None = None) -> VoteStore:
    """The votes of a study: `<folder>/votes.db`, or the database at an SQLAlchemy URL."""
    return VoteStore(database or f"sqlite:///{(folder / 'votes.db').resolve()}")


def results(study: Study, store: VoteStore, shuffles: int = 1000, resamples: int = 600) -> dict[str, Any]:
    """Ratings by axis and aggregated, with agreement, side bias and the raters left out; empty where nobody voted."""
    found: dict[str, Any] = {"axes": {}, "excluded_raters": len(store.inattentive())}
    papers: list[list[Rating]] = []
    trusted: list[list[Rating]] = []
    for axis in study.axes:
        votes = store.votes(axis)
        if not votes:
            continue
        bias, same = side_bias(votes), agreement(votes)
        papers.append(elo(votes, shuffles))
        trusted.append(bradley_terry(votes, resamples))
        found["axes"][axis] = {
            "votes": len(votes),
            "models": models_of(votes),
            "elo_paper": [asdict(rating) for rating in papers[-1]],
            "bradley_terry": [asdict(rating) for rating in trusted[-1]],
            "agreement": None if math.isnan(same) else same,
            "side_bias": asdict(bias),
        }
    if papers:
        found["aggregated"] = {
            "elo_paper": [asdict(rating) for rating in aggregated(papers)],
            "bradley_terry": [asdict(rating) for rating in aggregated(trusted)],
        }
    return found


def export(folder: Path, database: str | None = None) -> dict[str, Any]:
    """Write `votes.csv`, `votes.json`, `ratings.json`, `ratings.csv` into the study's folder; returns the results."""
    study, store = load_study(folder), open_store(folder, database)
    found = results(study, store)
    write_bytes(folder / "votes.csv", store.export_csv().encode())
    write_bytes(folder / "votes.json", store.export_json().encode())
    write_json(folder / "ratings.json", found)
    write_bytes(folder / "ratings.csv", _ratings_csv(found).encode())
    return found


def _ratings_csv(found: Mapping[str, Any]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["axis", "method", "model", "rating", "relative", "low", "high", "votes"])
    tables = {**found["axes"], **({"aggregated": found["aggregated"]} if "aggregated" in found else {})}
    for axis, table in tables.items():
        for method in ("elo_paper", "bradley_terry"):
            for r in table[method]:
                numbers = [f"{r[name]:.2f}" for name in ("rating", "relative", "low", "high")]
                writer.writerow([axis, method, r["model"], *numbers, r["votes"]])
    return stream.getvalue()
