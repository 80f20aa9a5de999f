"""The columns of the catalogue, in one place, versioned."""

from __future__ import annotations

import pyarrow as pa

VERSION = 1


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


# Measured once, with the video at hand.
MEASURED = [
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
    ("fps", pa.float32()),
    ("width", pa.int32()),
    ("height", pa.int32()),
    ("codec", pa.string()),
    ("method", pa.string()),
    ("shot_start_frame", pa.int64()),
    ("shot_end_frame", pa.int64()),
    ("start_cut", BOUNDARY),
    ("end_cut", BOUNDARY),
    ("motion_score", pa.float32()),
    ("camera", pa.string()),
    ("camera_motion", CAMERA),
    ("text_area", pa.float32()),
    ("text_areas", pa.list_(pa.float32())),
    ("licence", pa.string()),
    ("metadata", pa.string()),
]


# Scored by networks, and where the bytes lie.
SCORED = [
    ("captions", pa.list_(CAPTION)),
    ("similarities", pa.list_(SIMILARITY)),
    ("similarity", pa.float32()),
    ("aesthetics", pa.float32()),
    ("nsfw", pa.float32()),
    ("shard", pa.string()),
    ("offset", pa.int64()),
    ("size", pa.int64()),
    ("thumbnail_offset", pa.int64()),
    ("thumbnail_size", pa.int64()),
]


# Functions of the whole catalogue.
MERGED = [
    ("motion_bucket", pa.int16()),
    ("duplicate_of", pa.string()),
    ("duplicate_similarity", pa.float32()),
]


AXES = ("motion", "aesthetics", "similarity", "text_area", "nsfw", "duplicate")


FILTERED = [
    *((f"pass_{axis}", pa.bool_()) for axis in AXES),
    ("verdict", pa.string()),
    ("keep", pa.bool_()),
    ("reason", pa.string()),
]


_METADATA = {b"svd.catalogue.version": str(VERSION).encode()}


MEASURED_SCHEMA = pa.schema(MEASURED, metadata=_METADATA)


SCORED_SCHEMA = pa.schema([("clip_id", pa.string()), *SCORED], metadata=_METADATA)


SCORES_SCHEMA = pa.schema([*MEASURED, *SCORED, *MERGED], metadata=_METADATA)


VERDICTS_SCHEMA = pa.schema(FILTERED, metadata=_METADATA)


CLIPS_SCHEMA = pa.schema([*MEASURED, *SCORED, *MERGED, *FILTERED], metadata=_METADATA)


SOURCES_SCHEMA = pa.schema(
    [
        ("source_id", pa.string()),
        ("source_uri", pa.string()),
        ("split", pa.string()),
        ("verdict", pa.string()),  # ok, failed, duplicate, no-clips
        ("reason", pa.string()),
        ("duplicate_of", pa.string()),
        ("bytes", pa.int64()),
        ("container", pa.string()),
        ("codec", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("fps", pa.float32()),
        ("duration", pa.float64()),
        ("frames", pa.int64()),
        ("cuts", pa.int32()),
        ("clips", pa.int32()),
        ("scenes", pa.int32()),  # as the source's own metadata cut it; null where they don't
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
