"""The one list of axes: the scores that clips are filtered by.

Everything that treats all axes alike reads this list: the columns of the catalogue, filters, statistics, plots, contact
sheets, report, browser page, the subset that a training selects, and the threshold calibration. Code that names an axis
is the code that measures it.

Adding an axis touches three files: a row here; its option in `svd.config.data.FiltersConfig`; and the function that
computes the score (`svd.curation.measuring.axis_scores` for what the decoded frames show).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from svd.config import Subset

Computed = Literal["measured", "scored", "merged"]


@dataclass(frozen=True)
class Axis:
    """One score that clips are filtered by.

    name: names the axis in verdicts, files and messages; `pass_<name>` is the column of its verdicts.
    column: column of the catalogue, float32; null means "not measured".
    option: field of a section of filters, such as `curation.filters.min_motion`.
    side: the end that is kept; "min" keeps scores ≥ the threshold, "max" keeps scores ≤ the threshold.
    computed: "measured" from the decoded video, "scored" by networks, or "merged" from the whole catalogue.
    title: label of plots and of the browser page. label: name in the evaluation report. unit: unit and range.
    optional: a clip without this score passes, because there is nothing that could be wrong (the only caption is the
    measured camera motion) or repeated (there is no earlier clip).
    by_quality: the threshold calibration decides by visual quality alone (E.2.2), else by the mean of both questions.
    """

    name: str
    column: str
    option: str
    side: Literal["min", "max"]
    computed: Computed
    title: str
    label: str
    unit: str
    optional: bool = False
    by_quality: bool = False


# The order matters: a clip's verdict names the first axis that it fails.
AXES = (
    Axis(
        name="motion",
        column="motion_score",
        option="min_motion",
        side="min",
        computed="measured",
        title="optical flow",
        label="motion",
        unit="pixels of the stored flow map per sample step",
        by_quality=True,
    ),
    Axis(
        name="aesthetics",
        column="aesthetics",
        option="min_aesthetics",
        side="min",
        computed="scored",
        title="aesthetic score",
        label="aesthetics",
        unit="LAION's scale, about 1 to 10",
        by_quality=True,
    ),
    Axis(
        name="similarity",
        column="similarity",
        option="min_similarity",
        side="min",
        computed="scored",
        title="CLIP similarity",
        label="text–image similarity",
        unit="cosine, −1 to 1",
        optional=True,
    ),
    Axis(
        name="text_area",
        column="text_area",
        option="max_text_area",
        side="max",
        computed="measured",
        title="text area",
        label="text area",
        unit="share of the frame, 0 to 1",
    ),
    Axis(
        name="nsfw",
        column="nsfw",
        option="max_nsfw",
        side="max",
        computed="scored",
        title="NSFW score",
        label="NSFW",
        unit="probability, 0 to 1",
    ),
    Axis(
        name="duplicate",
        column="duplicate_similarity",
        option="max_duplicate_similarity",
        side="max",
        computed="merged",
        title="similarity to an earlier clip",
        label="duplicates",
        unit="cosine, −1 to 1",
        optional=True,
    ),
)
OPTIONS = {axis.name: axis.option for axis in AXES}
# The axes that a training may select its clips by: those with an option in the section `subset`.
SUBSET_AXES = tuple(axis for axis in AXES if axis.option in Subset.model_fields)


def axes_computed(computed: Computed) -> tuple[Axis, ...]:
    """Return the axes whose scores are computed at one of the three steps, in order."""
    return tuple(axis for axis in AXES if axis.computed == computed)
