"""A plot of a study's ratings above the last-ranked model, as in the paper (Fig. 4e)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from svd.storage import write_bytes

_METHODS = {
    "elo_paper": "Elo as in the paper (K = 1)\ndepends on the number of votes",
    "bradley_terry": "Bradley-Terry\n95 % over prompts",
}


def ratings_plot(path: Path, models: Sequence[str], found: Mapping[str, Any]) -> None:
    """Write a PNG of the results of `study.results`: each model's ratings above the last-ranked one, by question.

    The paper's Elo is on the left, Bradley-Terry with intervals on the right. Models are in the order of the aggregated
    Bradley-Terry rating; one without votes has no bar.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tables = {**found["axes"], "aggregated": found["aggregated"]}
    if len(found["axes"]) == 1:
        tables.pop("aggregated")
    votes = sum(table["votes"] for table in found["axes"].values())
    ranked = [rating["model"] for rating in found["aggregated"]["bradley_terry"]]
    order = [*ranked, *(model for model in models if model not in ranked)][::-1]
    figure = Figure(figsize=(9, 1.4 + 0.42 * len(order) * max(2, len(tables)) / 2), dpi=110, layout="constrained")
    panels = FigureCanvasAgg(figure).figure.subplots(1, 2, sharey=True)
    for panel, (method, title) in zip(panels, _METHODS.items(), strict=True):
        _bars(panel, order, {name: table[method] for name, table in tables.items()}, method == "bradley_terry")
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("points above the last-ranked model", fontsize=9)
    panels[0].set_yticks(range(len(order)), order)
    panels[0].legend(fontsize=8, loc="lower right")
    figure.suptitle(f"{votes} votes", fontsize=10)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    write_bytes(path, stream.getvalue())


def _bars(panel: Any, order: Sequence[str], tables: Mapping[str, Sequence[Mapping[str, Any]]], intervals: bool) -> None:
    """Draw one group of bars per model, one bar per question."""
    height = 0.8 / len(tables)
    for number, (name, ratings) in enumerate(tables.items()):
        places = [order.index(r["model"]) + 0.4 - (number + 0.5) * height for r in ratings]
        lengths = [r["relative"] for r in ratings]
        panel.barh(places, lengths, height=0.9 * height, label=name, zorder=2)
        if intervals:
            spread = [[r["rating"] - r["low"] for r in ratings], [r["high"] - r["rating"] for r in ratings]]
            clipped = [[max(0.0, value) for value in side] for side in spread]
            panel.errorbar(lengths, places, xerr=clipped, fmt="none", ecolor="0.25", capsize=2, linewidth=1, zorder=3)
    panel.grid(axis="x", alpha=0.3)
    panel.axvline(0, color="0.4", linewidth=0.8)
