"""The one list of axes: the scores that clips are filtered by.

Everything that treats all axes alike reads this list: the columns of the catalogue, filters, statistics, plots, contact
sheets, report, browser page, the subset that a training selects, and the threshold calibration. Code that names an axis
is the code that measures it.

Adding an axis touches three files: a row here; its option in `svd.config.data.FiltersConfig`; and the function that
computes the score (`svd.curation.measuring.axis_scores` for what the decoded frames show). Filtering a score at its
other end takes a second row on its column and an option, and no third file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from svd.config import Subset

Computed = Literal["measured", "scored", "merged", "known"]


@dataclass(frozen=True)
class Axis:
    """One score that clips are filtered by.

    name: names the axis in verdicts, files and messages; `pass_<name>` is the column of its verdicts. The second of two
    axes on one column, for its other end, is named by its option.
    column: column of the catalogue, a number (float32 unless the schema places it); null means "not measured".
    option: field of a section of filters, such as `curation.filters.min_motion`.
    side: the end that is kept; "min" keeps scores ≥ the threshold, "max" keeps scores ≤ the threshold.
    computed: "measured" from the decoded video, "scored" by networks, "merged" from the whole catalogue, or "known" of
    the clip and its source without any of these; a plot of a known score is drawn where a filter uses it.
    title: label of plots and of the browser page, one per column. label: name in the evaluation report. unit: unit and
    range.
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
    Axis(
        name="max_motion",
        column="motion_score",
        option="max_motion",
        side="max",
        computed="measured",
        title="optical flow",
        label="too much motion",
        unit="pixels of the stored flow map per sample step",
    ),
    Axis(
        name="resolution",
        column="resolution",
        option="min_resolution",
        side="min",
        computed="known",
        title="resolution",
        label="resolution",
        unit="pixels of the shorter side",
    ),
    Axis(
        name="aspect",
        column="aspect",
        option="min_aspect",
        side="min",
        computed="known",
        title="aspect ratio",
        label="too narrow",
        unit="width / height as shown, 1 is square",
    ),
    Axis(
        name="max_aspect",
        column="aspect",
        option="max_aspect",
        side="max",
        computed="known",
        title="aspect ratio",
        label="too wide",
        unit="width / height as shown, 1 is square",
    ),
    Axis(
        name="duration",
        column="duration",
        option="min_duration",
        side="min",
        computed="known",
        title="duration",
        label="too short",
        unit="seconds",
    ),
    Axis(
        name="max_duration",
        column="duration",
        option="max_duration",
        side="max",
        computed="known",
        title="duration",
        label="too long",
        unit="seconds",
    ),
    Axis(
        name="fps",
        column="fps",
        option="min_fps",
        side="min",
        computed="known",
        title="frame rate",
        label="too few frames a second",
        unit="frames per second",
    ),
    Axis(
        name="max_fps",
        column="fps",
        option="max_fps",
        side="max",
        computed="known",
        title="frame rate",
        label="too many frames a second",
        unit="frames per second",
    ),
    Axis(
        name="sharpness",
        column="sharpness",
        option="min_sharpness",
        side="min",
        computed="measured",
        title="sharpness",
        label="sharpness",
        unit="variance of the Laplacian of 8-bit luma, shorter side 256 pixels",
    ),
    Axis(
        name="luma",
        column="luma",
        option="min_luma",
        side="min",
        computed="measured",
        title="mean luma",
        label="too dark",
        unit="mean of the picture, 0 to 1",
    ),
    Axis(
        name="max_luma",
        column="luma",
        option="max_luma",
        side="max",
        computed="measured",
        title="mean luma",
        label="too bright",
        unit="mean of the picture, 0 to 1",
    ),
    Axis(
        name="clipped",
        column="clipped",
        option="max_clipped",
        side="max",
        computed="measured",
        title="black or white pixels",
        label="exposure",
        unit="share of the picture, 0 to 1",
    ),
    Axis(
        name="bars",
        column="bars",
        option="max_bars",
        side="max",
        computed="measured",
        title="letterbox bars",
        label="bars",
        unit="share of the frame, 0 to 1",
    ),
    Axis(
        name="decoded_share",
        column="decoded_share",
        option="min_decoded_share",
        side="min",
        computed="known",
        title="decoded share",
        label="broken sources",
        unit="share of the duration that the source declares, 0 to 1",
        optional=True,
    ),
)
OPTIONS = {axis.name: axis.option for axis in AXES}
# The axes that a training may select its clips by: those with an option in the section `subset`.
SUBSET_AXES = tuple(axis for axis in AXES if axis.option in Subset.model_fields)


def axes_by_column() -> dict[str, tuple[Axis, ...]]:
    """Return the axes of each column, in order: one, or two where both ends of a score are filtered."""
    columns = dict.fromkeys(axis.column for axis in AXES)
    return {column: tuple(axis for axis in AXES if axis.column == column) for column in columns}


def axes_computed(computed: Computed) -> tuple[Axis, ...]:
    """Return the axes whose scores are computed at one of the steps, in order; of two on one column the first."""
    return tuple(axis for axis, *_ in axes_by_column().values() if axis.computed == computed)
