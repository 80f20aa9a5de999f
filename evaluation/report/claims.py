"""The claims of a run: of its trainings, from their metrics, and of its evaluations, from their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import hypot
from pathlib import Path
from typing import Any

from evaluation.claims import Claim, read_claims

TRAININGS = (
    "image-pretraining",
    "video-pretraining",
    "high-quality-finetuning",
    "image-to-video",
    "multiview-finetuning",
)
ANIMATIONS = TRAININGS[3:]  # stages whose network is given frames
FINETUNES = TRAININGS[2:]  # stages that must end below what they started from
EVALUATIONS = ("recognition-evaluation", "image-to-video-evaluation", "multiview-benchmark")
_CONTROLS = ("untrained", "mean-frame", "noise")


@dataclass(frozen=True)
class ClaimGroup:
    """The claims about one stage, under its title."""

    title: str
    claims: tuple[Claim, ...]


def training_claims(stage: str, metrics: Mapping[str, Any]) -> list[Claim]:
    """Return the claims about a training: its loss is below a linear filter's, below its own with another clip's frames
    or caption, and a finetune's below that of its start.
    """
    signal = "frames" if stage in ANIMATIONS else "caption"
    controls = [("linear", "the best linear filter"), ("swapped", f"its own, given another clip's {signal}")]
    if stage in FINETUNES:
        controls.append(("start", "the network it started from"))
    return [
        Claim(
            "the validation loss is lower",
            float(metrics["validation_loss_after"]),
            control,
            float(metrics[f"validation_loss_{name}"]),
            metrics.get(f"validation_margin_{name}"),
            int(metrics["validation_clips"]),
        )
        for name, control in controls
        if f"validation_loss_{name}" in metrics
    ]


def distance_claims(result: Mapping[str, Any]) -> list[Claim]:
    """Return the claims of a Fréchet evaluation: generated clips nearer to real ones than each control.

    The errors of two distances to the same real clips are added as if independent, which is too careful.
    """
    first = {score["subject"]: score["distance"] for score in reversed(result.get("scores", ()))}
    own, claims = first.get("generated"), []
    for name in _CONTROLS:
        if own is None or name not in first:
            continue
        other = first[name]
        value, control = own["frechet"]["value"], other["frechet"]["value"]
        error = hypot(own["standard_error"], other["standard_error"])
        margin = (control - value) / error if error > 0 else None
        text, subject, protocol = "generated clips are nearer to real ones", name.replace("-", " "), result["protocol"]
        unit = str(result["metric"])
        claims.append(Claim(text, value, subject, control, margin, own["generated"], unit, protocol=protocol["digest"]))
    return claims


def gather_claims(
    inputs: Mapping[str, Path], titles: Mapping[str, str], metrics: Mapping[str, Mapping[str, Any]],
    result: Mapping[str, Any],
) -> list[ClaimGroup]:  # fmt: skip
    """Return all claims of a run, in the order of its stages; stages without any are left out."""
    found: dict[str, Sequence[Claim]] = {stage: training_claims(stage, metrics.get(stage, {})) for stage in TRAININGS}
    found["ucf101-evaluation"] = distance_claims(result)
    found |= {stage: read_claims(inputs[stage]) for stage in EVALUATIONS if stage in inputs}
    return [ClaimGroup(titles.get(stage, stage), tuple(claims)) for stage, claims in found.items() if claims]


def verdicts(groups: Sequence[ClaimGroup]) -> tuple[int, int]:
    """Return how many claims are shown, and how many there are."""
    claims = [claim for group in groups for claim in group.claims]
    return sum(claim.shown for claim in claims), len(claims)


def claim_row(claim: Claim) -> dict[str, str]:
    """Return the cells of a claim's line as text."""
    share = claim.unit == "share"

    def number(value: float) -> str:
        return f"{100 * value:.0f} %" if share else f"{value:.3g}" + (f" {claim.unit}" if claim.unit == "dB" else "")

    value = number(claim.value)
    if claim.low is not None and claim.high is not None:
        value += f" [{100 * claim.low:.0f}–{100 * claim.high:.0f}]"
    margin = "–" if claim.margin is None else f"{claim.margin:+.1f}"
    return {
        "text": claim.text,
        "value": value,
        "control": claim.control,
        "control_value": number(claim.control_value),
        "margin": margin,
        "n": str(claim.n),
        "verdict": claim.verdict,
        "protocol": claim.protocol[:12],
        "unit": "" if claim.unit in ("share", "dB") else claim.unit.replace("_", " "),
    }
