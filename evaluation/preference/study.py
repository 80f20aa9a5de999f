"""A study in a folder: models and prompts, harmonised clips, votes, results.

`study.json` names models, prompts and axes; `clips/` holds what raters see. Votes are in `votes.db`, unless a database
URL is given or `study.json` names a file outside the folder: for folders that are replaced while people vote.
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

from evaluation.preference.clips import CLIP_SUFFIXES, Box, ModelClips, prepare_clips
from evaluation.preference.pairs import QUESTION_NAMES, schedule
from evaluation.preference.plots import ratings_plot
from evaluation.preference.ratings import (
    aggregated_bradley_terry,
    aggregated_elo,
    agreement,
    bradley_terry,
    elo,
    models_of,
    side_bias,
)
from evaluation.preference.store import VoteStore, copy_votes
from svd.core.errors import UserError
from svd.core.files import write_json
from svd.storage import write_bytes


@dataclass(frozen=True)
class Study:
    """A study as stored.

    models: in the order of the clips' numbers. prompts: text by id. watermarks: black in every clip. votes_file: where
    votes are kept, relative to the study's folder; empty: inside it.
    """

    models: tuple[str, ...]
    prompts: dict[str, str]
    axes: tuple[str, ...]
    votes: int
    seed: int
    watermarks: tuple[Box, ...] = ()
    votes_file: str = ""


def create_study(
    folder: Path,
    sources: Sequence[ModelClips],
    prompts: Mapping[str, str] | None = None,
    *,
    axes: Sequence[str] = QUESTION_NAMES,
    votes: int = 3,
    seed: int = 0,
    database: str | None = None,
    votes_file: str = "",
) -> Study:
    """Harmonise the clips of `sources` into `folder` and store the schedule; the same call again changes nothing.

    prompts: text by id; an id is the file name of the clips without ending. None: the names that all folders share are
    ids and texts. votes_file: where `svd vote serve` keeps the votes, if not in the folder. Raises UserError for
    missing clips and for a folder that holds another study.
    """
    texts = dict(prompts) if prompts is not None else _shared(sources)
    if odd := [key for key in texts if Path(key).name != key]:
        raise UserError(f"{folder}: prompt '{odd[0]}' is no file name; ids are names of clips without ending")
    watermarks = tuple(box for source in sources for box in source.watermarks)
    models = tuple(source.model for source in sources)
    study = Study(models, texts, tuple(axes), votes, seed, watermarks, votes_file)
    try:
        questions = schedule(study.models, list(texts), axes=axes, votes=votes, seed=seed)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from None
    folder.mkdir(parents=True, exist_ok=True)
    stored = folder / "study.json"
    if stored.is_file() and load_study(folder) != study:
        raise UserError(f"{folder}: holds another study; give another folder or the same models, prompts and options")
    prepare_clips(sources, texts, folder / "clips")
    open_store(folder, database).plan(questions)
    write_json(stored, asdict(study))
    return study


def _shared(sources: Sequence[ModelClips]) -> dict[str, str]:
    """Return the names of clips that every folder has, as id and text."""
    names = [{p.stem for p in s.folder.glob("*") if p.suffix.lower() in CLIP_SUFFIXES} for s in sources]
    shared = sorted(set.intersection(*names)) if names else []
    if not shared:
        folders = ", ".join(str(source.folder) for source in sources)
        raise UserError(f"no clip has the same name in all of: {folders}; name clips by their prompt")
    return {name: name for name in shared}


def read_named_prompts(path: Path) -> dict[str, str]:
    """Read texts by clip name: a JSON object {name: text}, or a CSV file with the columns `name` and `prompt`.

    Raises UserError for a file that is neither, or names no prompts.
    """
    try:
        if path.suffix.lower() == ".csv":
            with path.open(newline="", encoding="utf-8-sig") as stream:
                found = {row["name"]: row["prompt"] for row in csv.DictReader(stream)}
        else:
            found = dict(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"no column {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{path}: no prompts ({reason}); expected JSON {{name: text}} or CSV with the columns name and prompt"
        ) from None
    if not found or not all(isinstance(text, str) and text for text in found.values()):
        raise UserError(f"{path}: every clip's name needs a text")
    return found


def load_study(folder: Path) -> Study:
    """Read the study in `folder`; raises UserError when there is none."""
    path = folder / "study.json"
    try:
        values = json.loads(path.read_text())
        return Study(
            tuple(values["models"]),
            dict(values["prompts"]),
            tuple(values["axes"]),
            values["votes"],
            values["seed"],
            tuple(Box(**box) for box in values.get("watermarks", [])),
            values.get("votes_file", ""),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no study there ({error}); create it first") from None


def open_store(folder: Path, database: str | None = None) -> VoteStore:
    """Open the votes of a study: at an SQLAlchemy URL, or in the file that it names (default `<folder>/votes.db`).

    When that file is missing and the folder holds a copy of it, voting goes on from the copy. Raises UserError when the
    database can't be opened.
    """
    if database:
        return VoteStore(database)
    kept, outside = folder / "votes.db", _votes_file(folder)
    if outside:
        live = folder / outside
        copy_votes(kept, live)
        kept = live
    return VoteStore(f"sqlite:///{kept.resolve()}")


def _votes_file(folder: Path) -> str:
    return load_study(folder).votes_file if (folder / "study.json").is_file() else ""


def results(study: Study, store: VoteStore, shuffles: int = 1000, resamples: int = 600) -> dict[str, Any]:
    """Rate by axis and in total, with agreement, side bias and the number of excluded raters; axes need votes."""
    found: dict[str, Any] = {"axes": {}, "excluded_raters": len(store.inattentive())}
    by_axis = {axis: votes for axis in study.axes if (votes := store.votes(axis))}
    for axis, votes in by_axis.items():
        bias, same = side_bias(votes), agreement(votes)
        found["axes"][axis] = {
            "votes": len(votes),
            "models": models_of(votes),
            "elo_paper": [asdict(rating) for rating in elo(votes, shuffles)],
            "bradley_terry": [asdict(rating) for rating in bradley_terry(votes, resamples)],
            "agreement": None if math.isnan(same) else same,
            "side_bias": asdict(bias),
        }
    if by_axis:
        parts = list(by_axis.values())
        found["aggregated"] = {
            "elo_paper": [asdict(rating) for rating in aggregated_elo(parts, shuffles)],
            "bradley_terry": [asdict(rating) for rating in aggregated_bradley_terry(parts, resamples)],
        }
    return found


def export_results(folder: Path, database: str | None = None) -> dict[str, Any]:
    """Write votes and ratings into the study's folder and return the ratings.

    Files: `votes.csv`, `votes.json`, `ratings.json`, `ratings.csv` and, once there are votes, `ratings.png`.
    """
    study, store = load_study(folder), open_store(folder, database)
    found = results(study, store)
    write_bytes(folder / "votes.csv", store.export_csv().encode())
    write_bytes(folder / "votes.json", store.export_json().encode())
    write_json(folder / "ratings.json", found)
    write_bytes(folder / "ratings.csv", _ratings_csv(found).encode())
    if found["axes"]:
        ratings_plot(folder / "ratings.png", study.models, found)
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
