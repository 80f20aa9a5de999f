"""Results of Fréchet evaluations: every row names metric, weights, protocol, number of clips, error bar and source."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from evaluation.frechet.distances import Distance
from evaluation.tables import Row, load_baselines
from svd.core.errors import UserError


@dataclass(frozen=True)
class Score:
    """The distance of one subject from the real clips."""

    subject: str
    seed: int | None
    distance: Distance


@dataclass(frozen=True)
class Result:
    """A whole evaluation: all that is needed to show it and to compare it with another one.

    sampling: how the generated clips were sampled; empty for clips from elsewhere. real_clips: a digest of the real
    clips' content.
    """

    dataset: str
    metric: str
    weights: str
    protocol: dict[str, Any]
    model: dict[str, str]
    scores: tuple[Score, ...]
    warnings: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    real_clips: str = ""

    def rows(self) -> list[Row]:
        """Return the measured rows."""
        return [self._row(score) for score in self.scores]

    def _row(self, score: Score) -> Row:
        d = score.distance
        return Row(
            dataset=self.dataset,
            subject=score.subject,
            metric=self.metric,
            value=d.frechet.value,
            standard_error=d.standard_error,
            bias_corrected=d.bias_corrected,
            infinity=d.infinity if math.isfinite(d.infinity) else None,
            mean_term=d.frechet.mean_term,
            covariance_term=d.frechet.covariance_term,
            kernel_unbiased=d.kernel.unbiased,
            kernel_standard_error=d.kernel_standard_error,
            real=d.real,
            generated=d.generated,
            seed=score.seed,
            weights=self.weights,
            protocol=str(self.protocol["digest"]),
        )

    def of(self, subject: str) -> list[Score]:
        """Return the scores of a subject, one per seed."""
        return [score for score in self.scores if score.subject == subject]


def paper_rows(dataset: str = "ucf101") -> list[Row]:
    """Return Tab. 2 of the paper, each row marked with its source."""
    table = load_baselines()["ucf101"]
    return [
        Row(
            dataset=dataset,
            subject=row["name"],
            metric=table["metric"],
            value=row["value"],
            generated=row.get("clips"),
            weights=row.get("weights", "not stated"),
            protocol=row.get("protocol", "not stated"),
            source=f"paper: {table['source']}",
        )
        for row in table["rows"]
    ]


def result_json(result: Result) -> dict[str, Any]:
    """Return a result as JSON values; numbers that aren't finite become null."""
    scores = []
    for score in result.scores:
        values = asdict(score.distance)
        values["frechet"]["value"] = score.distance.frechet.value
        values["infinity"] = values["infinity"] if math.isfinite(values["infinity"]) else None
        scores.append({"subject": score.subject, "seed": score.seed, "distance": values})
    return {
        "dataset": result.dataset,
        "metric": result.metric,
        "weights": result.weights,
        "protocol": result.protocol,
        "sampling": dict(result.sampling),
        "real_clips": result.real_clips,
        "model": result.model,
        "scores": scores,
        "warnings": list(result.warnings),
    }


def load_result(folder: Path) -> dict[str, Any]:
    """Read the `result.json` in an evaluation's folder; raises UserError when there is none or it is damaged."""
    path = folder / "result.json"
    try:
        return dict(json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no evaluation there; run the stage ucf101-evaluation first") from None
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); run the stage ucf101-evaluation again") from None
