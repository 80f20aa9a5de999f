"""Stage `threshold-calibration`: how much to filter away on each axis, by preference between small models (E.2.2).

For each axis, models trained without the worst 0, 12.5, 25 and 50 % of one start set are compared in pairs on fixed
prompts, by two questions; the axis `captions` compares one model per captioner. Elo ranks the models, and the paper's
rule chooses.

With `judge: people` the stage publishes a study for each axis and says how many votes are missing. After
`svd vote serve <output>/studies/<axis>` run the stage again: it takes the votes and its own clips, and trains nothing.
The page may stay up meanwhile: votes are kept in files beside the output, which holds copies of them. With
`judge: encoders` rules vote (evaluation/calibration/automatic_votes.py), and all results say `automatic`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.calibration.automatic_votes import (
    RATER,
    cast_votes,
    prompt_scores,
    quality_scores,
    real_clips,
    scores_table,
)
from evaluation.calibration.candidates import (
    NAME,
    Candidate,
    candidates,
    choose_prompts,
    encode_start_set,
    sample_models,
    start_set,
    train_models,
    training_subset,
)
from evaluation.calibration.outcomes import Outcome, conclude, outcome_metrics, plot, rule, write_ratings, write_votes
from evaluation.preference.clips import ModelClips
from evaluation.preference.pairs import QUESTION_NAMES, schedule
from evaluation.preference.ratings import Vote
from evaluation.preference.store import copy_votes
from evaluation.preference.study import create_study, open_store
from svd.catalogue.axes import AXES as FILTERS
from svd.catalogue.tables import clips_path
from svd.core.device import pick_device
from svd.core.files import exclusive, write_json
from svd.latents.cache import digest
from svd.model.formats.encoders import load_encoders
from svd.model.formats.folders import checkpoint_hash, load_autoencoder
from svd.stage import Report, StageContext, publish
from svd.training.ranks import rank


@dataclass(frozen=True)
class Made:
    """Trained and sampled models: `folder` holds `calibration.json` (`about`), `samples/` and `losses/`."""

    folder: Path
    about: Mapping[str, Any]

    @property
    def prompts(self) -> dict[str, str]:
        """The texts by id."""
        return dict(self.about["prompts"])


def run(context: StageContext) -> Report:
    """Calibrate the thresholds. Inputs: curation, autoencoder, encoders, image-pretraining.

    Publishes `samples/<model>/`, `losses/`, `calibration.json`; per axis `<axis>/ratings.csv` and `plots/<axis>.png`
    once all votes are in; `studies/<axis>/` (people) or `<axis>/votes.csv` and `automatic_scores.csv` (encoders);
    `chosen.json` with shares and thresholds. Raises UserError for axes without scores, too few clips or captions.
    """
    axes = candidates(context.preset)
    key = identity(context)
    made = published(context.output, key)
    if made is None:
        made = make_models(context, axes, key)
    if rank() != 0:
        return Report({}, "trained; the first rank publishes")
    finished = context.work / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    finished.mkdir(parents=True)
    for part in ("samples", "losses"):
        shutil.copytree(made.folder / part, finished / part)
    if (made.folder / "automatic_scores.csv").is_file():
        shutil.copy(made.folder / "automatic_scores.csv", finished)
    write_json(finished / "calibration.json", made.about)
    report = rate_axes(context, axes, made, finished)
    for path in sorted([*finished.glob("*/ratings.csv"), *finished.glob("plots/*.png"), finished / "chosen.json"]):
        context.tracker.log_file(path, "calibration")
    return publish(finished, context.output, report)


def identity(context: StageContext) -> str:
    """Return a digest of all that votes belong to: the preset's section and seed, the catalogue, the networks.

    An option that the preset's file doesn't set is left out, so that a new option doesn't invalidate votes.
    """
    preset, inputs = context.preset, context.inputs
    networks = ("autoencoder", "encoders", "image-pretraining")
    return digest(
        preset.seed,
        preset.threshold_calibration.model_dump(mode="json", exclude_unset=True),
        preset.latents.model_dump(mode="json", include={"min_fps", "max_fps", "windows"}, exclude_unset=True),
        preset.model.model_dump(mode="json", exclude_unset=True),
        preset.curation.captions.model_dump(mode="json", exclude_unset=True),
        hashlib.sha256(clips_path(inputs["curation"]).read_bytes()).hexdigest(),
        [checkpoint_hash(inputs[name]) for name in networks],
    )


def published(output: Path, key: str) -> Made | None:
    """Return the models of an earlier run of the same calibration, whose clips people vote on, if there is one."""
    path = output / "calibration.json"
    if not path.is_file():
        return None
    about = json.loads(path.read_text())
    return Made(output, about) if about["key"] == key else None


def make_models(context: StageContext, axes: Mapping[str, list[Candidate]], key: str) -> Made:
    """Draw the start set, train and sample all models in `context.work`; finished parts of a killed run are kept.

    All ranks train; the first one samples.
    """
    device = pick_device()
    config = context.preset.threshold_calibration
    models = list({model.name: model for of_axis in axes.values() for model in of_axis}.values())
    start = start_set(context.inputs["curation"], config, context.preset.seed)
    subsets = {model.name: training_subset(start, model) for model in models}
    prompts = choose_prompts(start, context.preset)
    with exclusive(context.work / ".lock"):  # the first rank makes it, the others find it
        cache = encode_start_set(context, start)
    facts = train_models(context, models, subsets, cache)
    about = {"key": key, "prompts": prompts, "models": facts}
    if rank() == 0:
        samples = sample_models(context, facts, prompts, cache, device)
        (context.work / "losses").mkdir(exist_ok=True)
        for model in models:
            shutil.copy(context.work / "models" / model.name / "losses.csv", context.work / f"losses/{model.name}.csv")
        if config.judge == "encoders":
            autoencoder = load_autoencoder(context.inputs["autoencoder"]).eval()
            real = real_clips(cache, autoencoder, config.phases[-1])
            encoders = load_encoders(context.inputs["encoders"], context.preset.encoders, device)
            names = list(facts)
            scores = {
                "quality": quality_scores(samples, names, list(prompts), real, device),
                "prompt": prompt_scores(samples, names, prompts, encoders),
            }
            scores_table(scores).write_csv(context.work / "automatic_scores.csv")
    return Made(context.work, about)


def rate_axes(context: StageContext, axes: Mapping[str, list[Candidate]], made: Made, finished: Path) -> Report:
    """Collect the votes of every axis; rate the models and choose where no vote is missing."""
    config = context.preset.threshold_calibration
    by_people = config.judge == "people"
    label = "people" if by_people else RATER
    cast = missing = 0
    outcomes: list[Outcome] = []
    for axis, models in axes.items():
        names = [model.name for model in models]
        needed = len(schedule(names, list(made.prompts), votes=config.votes, check_every=0))
        votes = (
            human_votes(context, axis, names, made, finished) if by_people else automatic_votes(context, names, made)
        )
        cast += len(votes)
        missing += max(0, needed - len(votes))
        if len(votes) < needed:
            continue
        outcome = conclude(axis, models, votes)
        outcomes.append(outcome)
        write_ratings(finished / axis / "ratings.csv", outcome, made.about["models"], label)
        write_votes(finished / axis / "votes.csv", votes)
        plot(finished / "plots" / f"{axis}.png", outcome, label)
    write_json(finished / "chosen.json", {o.axis: choice(o, made.about["models"], label) for o in outcomes})
    metrics: dict[str, float | int | str] = {"models": len(made.about["models"]), "prompts": len(made.prompts)}
    metrics |= {f"votes_{label}": cast, "votes_missing": missing, "votes_open": int(missing > 0)}
    for outcome in outcomes:
        metrics |= outcome_metrics(outcome, label)
    for name, facts in made.about["models"].items():
        metrics |= {f"clips_{name}": facts["clips"], f"validation_loss_{name}": facts["validation_loss_after"]}
    return Report(metrics, calibration_summary(context, outcomes, missing, label))


def automatic_votes(context: StageContext, names: list[str], made: Made) -> list[Vote]:
    """Return votes by the stored scores of the automatic judge."""
    import polars as pl

    table = pl.read_csv(made.folder / "automatic_scores.csv")
    scores = {
        axis: {(r["model"], r["prompt"]): r["score"] for r in table.filter(pl.col("question") == axis).to_dicts()}
        for axis in QUESTION_NAMES
    }
    config = context.preset.threshold_calibration
    return cast_votes(names, list(made.prompts), scores, config.votes, context.preset.seed)


def human_votes(context: StageContext, axis: str, names: list[str], made: Made, finished: Path) -> list[Vote]:
    """Make the study of an axis, with a copy of the votes cast so far; returns the votes of attentive raters.

    Publishing replaces the folder that people may be voting on, so its `study.json` names a file outside of it. The
    file's name holds the key of the models: other models have other votes.
    """
    study, published_study = finished / "studies" / axis, context.output / "studies" / axis
    live = context.output.parent / f"{NAME}-votes" / f"{axis}-{made.about['key'][:16]}.db"
    if made.folder == context.output:
        copy_votes(published_study / "votes.db", live)
    live.parent.mkdir(parents=True, exist_ok=True)
    url = f"sqlite:///{live.resolve()}"
    sources = [ModelClips(name, finished / "samples" / name) for name in names]
    config = context.preset.threshold_calibration
    create_study(
        study,
        sources,
        made.prompts,
        votes=config.votes,
        seed=context.preset.seed,
        database=url,
        votes_file=os.path.relpath(live, published_study),
    )
    store = open_store(study, url)
    votes = store.votes()
    store.engine.dispose()
    copy_votes(live, study / "votes.db")
    return votes


def choice(outcome: Outcome, models: Mapping[str, Mapping[str, Any]], judge: str) -> dict[str, Any]:
    """Return what was chosen on an axis and why; `option`, `threshold`: for the preset's `curation.filters`."""
    facts = models[outcome.chosen.name]
    options = {axis.name: axis.option for axis in FILTERS}
    return {
        "model": outcome.chosen.name,
        "removed": outcome.chosen.removed,
        "captioner": outcome.chosen.captioner,
        "option": "captions.probabilities" if outcome.axis == "captions" else options[outcome.axis],
        "threshold": facts["thresholds"].get(outcome.axis),
        "clips": facts["clips"],
        "decided_by": rule(outcome.axis),
        "judge": judge,
        "votes": outcome.votes,
    }


def calibration_summary(context: StageContext, outcomes: list[Outcome], missing: int, label: str) -> str:
    """Return one line: what was chosen, or that votes are open and where to cast them."""
    found = ", ".join(f"{o.axis} {o.chosen.captioner or f'{100 * o.chosen.removed:g} % removed'}" for o in outcomes)
    if missing:
        open_votes = (
            f"votes are open, {missing} missing: svd vote serve {context.output}/studies/<axis>, then run again"
        )
        return f"{found}; {open_votes}" if found else open_votes
    note = " (automatic votes, no people)" if label != "people" else ""
    return f"{NAME}: {found}{note}"
