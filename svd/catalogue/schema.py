"""The columns of all tables of the catalogue, in one place, versioned.

`clips.parquet` joins three groups of columns by the step that computes them: MEASURED, with the video at hand; SCORED,
by networks; MERGED, from the whole catalogue or what is known of clip and source. `verdicts.parquet` holds the clip's
id and FILTERED. Scores come from the list of axes.
"""

from __future__ import annotations

import pyarrow as pa

from svd.catalogue.axes import AXES, Computed, axes_computed

VERSION = 2

Column = tuple[str, pa.DataType]

BOUNDARY = pa.struct(
    [
        ("kind", pa.string()),
        ("detector", pa.string()),
        ("score", pa.float32()),
        ("threshold", pa.float32()),
        ("seconds", pa.float64()),
    ]
)
CAMERA = pa.struct(
    [(n, pa.float32()) for n in ("confidence", "pan", "tilt", "zoom", "roll", "shake", "residual", "moving")]
)
CAPTION = pa.struct([("captioner", pa.string()), ("text", pa.string())])
SIMILARITY = pa.struct([("captioner", pa.string()), ("value", pa.float32())])


def _score(name: str) -> Column:
    """Return the column of an axis, for the axes whose place in the table is fixed."""
    return next((axis.column, pa.float32()) for axis in AXES if axis.name == name)


def _other_scores(computed: Computed, placed: list[Column]) -> list[Column]:
    """Return the columns of all other axes computed at a step: an axis that is added to the list has a column."""
    known = {name for name, _ in placed}
    return [(axis.column, pa.float32()) for axis in axes_computed(computed) if axis.column not in known]


_MEASURED: list[Column] = [
    ("clip_id", pa.string()),
    ("source_id", pa.string()),
    ("source_uri", pa.string()),
    ("split", pa.string()),
    ("unit", pa.int32()),
    ("start_frame", pa.int64()),
    ("end_frame", pa.int64()),
    ("start_pts", pa.int64()),
    ("end_pts", pa.int64()),
    ("time_base", pa.string()),
    ("start_seconds", pa.float64()),
    ("end_seconds", pa.float64()),
    ("duration", pa.float64()),
    ("frames", pa.int32()),
    ("fps", pa.float32()),  # of the clip's own frames, also where the rate varies
    ("variable_rate", pa.bool_()),
    ("width", pa.int32()),  # of the picture that players show
    ("height", pa.int32()),
    ("codec", pa.string()),
    ("method", pa.string()),
    # How the clip's file is coded; players and readers go by it (svd/media/shown.py).
    ("pixel_format", pa.string()),
    ("transfer", pa.string()),  # such as "bt709" or "smpte2084" (PQ); null where the file doesn't say
    ("sample_aspect", pa.string()),  # width of a pixel in heights, such as "4/3"
    ("rotation", pa.int16()),  # degrees by which players turn its frames clockwise
    ("interlaced", pa.bool_()),
    ("shot_start_frame", pa.int64()),
    ("shot_end_frame", pa.int64()),
    ("start_cut", BOUNDARY),
    ("end_cut", BOUNDARY),
    _score("motion"),
    ("camera", pa.string()),
    ("camera_motion", CAMERA),
    _score("text_area"),
    ("text_areas", pa.list_(pa.float32())),
]
MEASURED: list[Column] = [
    *_MEASURED,
    *_other_scores("measured", _MEASURED),
    ("licence", pa.string()),
    ("metadata", pa.string()),
]

_SCORED: list[Column] = [
    ("captions", pa.list_(CAPTION)),
    ("similarities", pa.list_(SIMILARITY)),
    _score("similarity"),
    _score("aesthetics"),
    _score("nsfw"),
]
# Where the bytes of a clip and of its thumbnail lie.
MEMBERS: list[Column] = [
    ("shard", pa.string()),
    ("offset", pa.int64()),
    ("size", pa.int64()),
    ("thumbnail_offset", pa.int64()),
    ("thumbnail_size", pa.int64()),
]
SCORED: list[Column] = [*_SCORED, *_other_scores("scored", _SCORED), *MEMBERS]

_MERGED: list[Column] = [
    ("motion_bucket", pa.int16()),
    ("duplicate_of", pa.string()),
    _score("duplicate"),
]
MERGED: list[Column] = [*_MERGED, *_other_scores("merged", _MERGED), *_other_scores("known", MEASURED)]

FILTERED: list[Column] = [
    *((f"pass_{axis.name}", pa.bool_()) for axis in AXES),
    ("verdict", pa.string()),  # "kept", or the name of the first axis that the clip fails
    ("keep", pa.bool_()),
    ("reason", pa.string()),
]

_METADATA = {b"svd.catalogue.version": str(VERSION).encode()}

MEASURED_SCHEMA = pa.schema(MEASURED, metadata=_METADATA)
SCORED_SCHEMA = pa.schema([("clip_id", pa.string()), *SCORED], metadata=_METADATA)
SCORES_SCHEMA = pa.schema([*MEASURED, *SCORED, *MERGED], metadata=_METADATA)
VERDICTS_SCHEMA = pa.schema([("clip_id", pa.string()), *FILTERED], metadata=_METADATA)
CLIPS_SCHEMA = pa.schema([*MEASURED, *SCORED, *MERGED, *FILTERED], metadata=_METADATA)

SOURCES_SCHEMA = pa.schema(
    [
        ("source_id", pa.string()),
        ("source_uri", pa.string()),
        ("split", pa.string()),
        ("verdict", pa.string()),  # ok, failed, skipped, duplicate, no-clips
        ("reason", pa.string()),
        ("duplicate_of", pa.string()),
        ("bytes", pa.int64()),
        ("container", pa.string()),
        ("codec", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("fps", pa.float32()),
        ("duration", pa.float64()),
        ("decoded_share", pa.float32()),  # of the duration that the header declares; null where it declares none
        ("frames", pa.int64()),
        ("cuts", pa.int32()),
        ("clips", pa.int32()),
        ("scenes", pa.int32()),  # spans of lists and scenes of sidecars; null without any
        ("warnings", pa.list_(pa.string())),
        ("licence", pa.string()),
        ("metadata", pa.string()),
    ],
    metadata=_METADATA,
)

CUTS_SCHEMA = pa.schema(
    [
        ("source_uri", pa.string()),
        ("kind", pa.string()),
        ("frame", pa.int64()),
        ("start_frame", pa.int64()),
        ("end_frame", pa.int64()),
        ("seconds", pa.float64()),
        ("detector", pa.string()),
        ("score", pa.float32()),
        ("threshold", pa.float32()),
    ],
    metadata=_METADATA,
)

DROPPED_SCHEMA = pa.schema(
    [
        ("source_uri", pa.string()),
        ("start_frame", pa.int64()),
        ("end_frame", pa.int64()),
        ("start_seconds", pa.float64()),
        ("end_seconds", pa.float64()),
        ("reason", pa.string()),
    ],
    metadata=_METADATA,
)
