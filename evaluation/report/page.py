"""Stage `report`: one HTML file that shows a whole run: clips, curves, scores, and the weights behind them.

The page loads nothing from a network.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from evaluation.report.charts import Dot, dot_plot, funnel_chart, line_chart
from evaluation.report.claims import claim_row, verdicts
from evaluation.report.gather import STAGES, Gathered, gather_outputs
from evaluation.tables import MEASURED, load_baselines
from svd.config import Preset
from svd.core.margins import NEEDED
from svd.stage import Report, StageContext, publish
from svd.storage import write_bytes

_SAMPLED = (
    "image-pretraining",
    "video-pretraining",
    "high-quality-finetuning",
    "image-to-video",
)
_JUDGED = {
    "recognition-evaluation": "Generated clips, each above the real clip of its prompt.",
    "image-to-video-evaluation": "Pictures of test clips, animated; each above the film as the autoencoder decodes it.",
}
MODEL_FREE = ("copy of the input view", "mean view")  # subjects of the multi-view benchmark that need no model
MEDIA_BUDGET = 350_000  # bytes of samples per stage; keeps the page of a small run below 5 MB


def render_page(preset: Preset, inputs: Mapping[str, Path]) -> tuple[str, Gathered]:
    """Return the page and its content; equal inputs give equal pages. Raises UserError for damaged inputs."""
    found = gather_outputs(inputs, MEDIA_BUDGET)
    environment = Environment(
        loader=PackageLoader("evaluation", "pages"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": figure, "claim": claim_row}
    page = environment.get_template("report.html.j2").render(
        preset=preset,
        found=found,
        stages=STAGES,
        charts=charts(found),
        measured=[row for row in found.rows if row["source"] == MEASURED],
        published=[row for row in found.rows if row["source"] != MEASURED],
        baselines=load_baselines(),
        trained_galleries=[stage for stage in _SAMPLED if stage in found.galleries],
        headline=headline(found),
        planted=planted(found.metrics.get("curation", {})),
        learned=[curve for curve in found.curves if curve.change],
        needed=NEEDED,
        judged=_JUDGED,
    )
    return page, found


def figure(value: Any) -> str:
    """Format a number for people: four significant digits, thousands separated; a dash for None and "".

    >>> figure(12345.0), figure(0.123456), figure("text"), figure(None)
    ('12,345', '0.1235', 'text', '–')
    """
    if value in (None, ""):
        return "–"
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    if number == int(number) and abs(number) < 1e12:
        return f"{int(number):,}"
    return f"{number:.4g}"


def charts(found: Gathered) -> dict[str, Any]:
    """Draw all charts, as safe markup."""
    drawn: dict[str, Any] = {"losses": [], "funnel": "", "scores": ""}
    for curve in found.curves:
        svg = line_chart(curve.series, f"{curve.stage}: losses over training steps")
        drawn["losses"].append((curve, Markup(svg)))
    if found.funnel:
        drawn["funnel"] = Markup(funnel_chart(found.funnel, "Clips left after each filter"))
    if found.dots:
        name = f"{found.evaluation['metric']} to the real clips (log scale, ± 2 standard errors); left is better"
        drawn["scores"] = Markup(dot_plot(found.dots, "Distance to the real clips", name))
    return drawn


_PLANTED = (
    ("hard cuts, within 2 frames", "hard_cut_recall", "hard_cut_precision", "precision"),
    ("fades and dissolves, by overlap", "gradual_recall", "gradual_precision", "precision"),
    ("clips that lie in one scene", "clips_in_one_scene", "", ""),
    ("camera motion named correctly", "camera_accuracy", "", ""),
    ("static shots dropped", "static_dropped", "static_clean_dropped", "of clean clips dropped too"),
    ("text overlays found", "text_found", "text_false_alarms", "false alarms"),
    ("text overlays dropped", "text_dropped", "text_clean_dropped", "of clean clips dropped too"),
    ("wrong captions dropped", "wrong_caption_dropped", "wrong_caption_clean_dropped", "of clean clips dropped too"),
)


def planted(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return rows (what was planted in the synthetic videos, share found, its cost); empty without known truth."""

    def share(name: str) -> str:
        return f"{100 * float(metrics[f'truth_{name}']):.1f} %"

    rows = []
    for what, found, cost, unit in _PLANTED:
        if f"truth_{found}" in metrics:
            rows.append((what, share(found), f"{share(cost)} {unit}" if f"truth_{cost}" in metrics else ""))
    return rows


def headline(found: Gathered) -> list[tuple[str, str, str]]:
    """Return the figures at the top: (value, name, remark)."""
    figures = []
    shown, claims = verdicts(found.claims)
    if claims:
        figures.append(
            (f"{shown} / {claims}", "claims shown", f"better than their control by {NEEDED:g} standard errors")
        )
    curation = found.metrics.get("curation", {})
    if "clips_kept" in curation:
        remark = f"of {figure(curation['clips'])} cut from {figure(curation['sources'])} videos"
        figures.append((figure(curation["clips_kept"]), "clips kept", remark))
    falls = [curve for curve in found.curves if curve.before and curve.after is not None]
    better = sum(curve.after < curve.before for curve in falls if curve.after is not None and curve.before)
    if falls:
        figures.append((f"{better} / {len(falls)}", "stages learned", "better on held-out worlds than before"))
    own = next((dot for dot in found.dots if dot.emphasis), None)
    if own is not None:
        rest = " · ".join(f"{dot.name} {figure(round(dot.value, 1))}" for dot in nearest(found))
        figures.append((figure(round(own.value, 2)), f"{found.evaluation['metric']}, less is better", rest))
    psnr = found.metrics.get("multiview-benchmark", {}).get("psnr")
    if psnr is not None:
        others = found.views.of("psnr", MODEL_FREE) if found.views else []
        remark = " · ".join(f"{name} {float(value):.1f}" for name, value in others)
        figures.append((f"{psnr:.1f} dB", "PSNR of novel views, more is better", remark))
    return figures


def nearest(found: Gathered) -> list[Dot]:
    """Return what the model's distance is compared with: real clips (the floor) and the nearest control."""
    others = sorted((dot for dot in found.dots if not dot.emphasis), key=lambda dot: dot.value)
    floor = [dot for dot in others if "real" in dot.name]
    return floor[:1] + [dot for dot in others if "real" not in dot.name][:1]


def run(context: StageContext) -> Report:
    """Write `report.html` from the outputs of the other stages; a missing one is named in the report."""
    page, found = render_page(context.preset, context.inputs)
    finished = context.work / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    write_bytes(finished / "report.html", page.encode())
    metrics = {"bytes": len(page.encode()), "missing_parts": len(found.missing), "clip_pairs": len(found.pairs)}
    context.tracker.log_file(finished / "report.html")
    return publish(finished, context.output, Report(metrics, f"report: {context.output / 'report.html'}"))
