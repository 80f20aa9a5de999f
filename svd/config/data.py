"""Options of the data: sources, curation, encoders, orbits."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from svd.config.base import Fraction, PositiveInt, Renderer, Section


class SyntheticWorlds(Section):
    """Rendered, captioned videos whose cuts, motions and defects are known (svd/synthetic/videos.py)."""

    style: Literal["textured", "plain"] = Field(
        "textured", description="plain: few words, even colours, one motion at a time, which minutes of training learn"
    )
    train_videos: PositiveInt = 24
    test_videos: PositiveInt = 6
    scenes_per_video: PositiveInt = 10
    height: PositiveInt = 128
    width: PositiveInt = 192
    fps: PositiveInt = 24
    ucf101_clips_per_class: PositiveInt = 1


class SourcesConfig(Section):
    """Where raw videos come from: folders, globs, s3://, lists (CSV, Parquet, JSONL), WebDataset tars."""

    paths: list[str] = []
    synthetic: SyntheticWorlds | None = None
    sources_per_shard: PositiveInt = Field(
        64, description="sources curated as one unit; defines a result, because a unit's clips share shards"
    )
    copied_bytes: Annotated[int, Field(ge=0)] = Field(
        2_000_000_000,
        description="local files of up to this many bytes together are copied and so versioned; more are listed",
    )


class CutPass(Section):
    """One pass of the cut cascade (§3.1, App. C): a detector at its own frame rate and threshold."""

    detector: Literal["content", "adaptive", "hash", "histogram", "threshold", "transnetv2"] = "content"
    fps: float | None = Field(None, gt=0, description="None: every frame of the source")
    threshold: float = Field(gt=0)

    @model_validator(mode="after")
    def _every_frame(self) -> Self:
        if self.detector == "transnetv2" and self.fps is not None:
            raise ValueError("'transnetv2' reads every frame of the source: leave 'fps' out")
        return self


class CutsConfig(Section):
    """Cascaded cut detection (§3.1)."""

    passes: list[CutPass]
    min_scene_seconds: float = Field(0.4, ge=0)


class ClipsConfig(Section):
    """Keyframe-aware clipping (App. C)."""

    min_seconds: float = Field(1.0, gt=0)
    max_seconds: float = Field(60.0, gt=0)
    no_keyframe: Literal["reencode", "drop"] = Field(
        "reencode", description="what becomes of frames that no copied clip holds, because clips begin at keyframes"
    )
    end: Literal["packet", "keyframe"] = Field(
        "packet",
        description="keyframe: a clip ends before a keyframe, as in the paper; packet: at its last whole frame",
    )

    @model_validator(mode="after")
    def _some_length_is_left(self) -> Self:
        if self.max_seconds < self.min_seconds:
            raise ValueError("'max_seconds' must be at least 'min_seconds'")
        return self


class MotionConfig(Section):
    """Optical flow (§3.1, App. C): Farnebäck at 2 fps, or RAFT at 800x450."""

    algorithm: Literal["farneback", "raft"] = "farneback"
    fps: float = Field(2.0, gt=0)
    short_side: PositiveInt = 64
    stored_short_side: PositiveInt = 16
    raft_weights: str | None = None


class TextConfig(Section):
    """Text detection on first, middle and last frame (App. C)."""

    detector: Literal["rapidocr", "craft"] = "rapidocr"
    craft_weights: str | None = None
    craft_long_side: PositiveInt = Field(
        1280, description="the longer side, in pixels, is scaled down to this for CRAFT"
    )
    width: PositiveInt = 704
    height: PositiveInt = 384
    box_threshold: Fraction = 0.5


class EncodersConfig(Section):
    """Text and image encoders (§2, D.2). `toy-clip` is a small open_clip model trained on synthetic captions."""

    kind: Literal["open_clip", "toy-clip"] = "open_clip"
    model: str = "ViT-H-14"
    weights: str = "laion2b_s32b_b79k"
    sha256: str | None = None
    toy_iterations: PositiveInt = 300
    toy_width: PositiveInt = 64
    toy_tokens: Annotated[int, Field(ge=8)] = Field(
        77,
        description="length of a text; a cross-attention that has just begun to learn spreads over all of them alike, "
        "so that each word of a short caption counts for little among 77",
    )
    toy_worlds: list[Literal["textured", "plain"]] = Field(
        ["textured"], min_length=1, description="styles of the synthetic worlds it learns from, in equal parts"
    )
    aesthetics_weights: str | None = None


# Those with a network run in this order. A new captioner is its name here and a module svd/curation/captions/<name>.py.
CaptionerName = Literal["coca", "video", "llm", "sidecar", "motion"]


class CaptionsConfig(Section):
    """Three captions per clip (§3.1): which captioners run, and with which probability training draws each (E.2.2).

    llm_endpoint stays here although it says *where*: `llm_model` then names a model of that server, not files.
    """

    captioners: list[CaptionerName]
    probabilities: dict[CaptionerName, Fraction]
    coca_model: str = "coca_ViT-L-14"
    coca_weights: str = "mscoco_finetuned_laion2B-s13B-b90k"
    video_model: str | None = None
    llm_model: str | None = None
    llm_endpoint: str | None = None


class Threshold(Section):
    """Keep a clip when its score is on the right side of an absolute value or of a quantile of the catalogue.

    A quantile drops its share however good the clips are, so a small catalogue loses good ones with it. `at_least` and
    `at_most` bound the value that the quantile resolves to: `min_motion: {quantile: 0.25, at_most: 0.8}` drops the
    quarter that moves least, but no clip of 0.8 or more; `max_text_area: {quantile: 0.25, at_least: 0.01, at_most:
    0.07}` drops none of up to 1 % text, and all above 7 %.
    """

    absolute: float | None = None
    quantile: Fraction | None = None
    at_least: float | None = Field(None, description="with a quantile: the threshold is never below this")
    at_most: float | None = Field(None, description="with a quantile: the threshold is never above this")

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.absolute is None) == (self.quantile is None):
            raise ValueError("give exactly one of 'absolute' and 'quantile'")
        bounds = [bound for bound in (self.at_least, self.at_most) if bound is not None]
        if bounds and self.quantile is None:
            raise ValueError("'at_least' and 'at_most' bound a quantile: give 'quantile' instead of 'absolute'")
        if bounds != sorted(bounds):
            raise ValueError("'at_least' must not be above 'at_most'")
        return self


class FiltersConfig(Section):
    """Filters per axis (§3.3, E.2.2): `min_*` drops the low end, `max_*` the high end; quantiles are shares dropped.

    One option per axis of svd.catalogue.axes, which says what is measured and in which unit.
    """

    min_motion: Threshold | None = None
    min_aesthetics: Threshold | None = None
    min_similarity: Threshold | None = None
    max_text_area: Threshold | None = None
    max_nsfw: Threshold | None = None
    max_duplicate_similarity: Threshold | None = None
    max_motion: Threshold | None = None
    min_resolution: Threshold | None = None
    min_aspect: Threshold | None = None
    max_aspect: Threshold | None = None
    min_duration: Threshold | None = None
    max_duration: Threshold | None = None
    min_fps: Threshold | None = None
    max_fps: Threshold | None = None
    min_sharpness: Threshold | None = None
    min_luma: Threshold | None = None
    max_luma: Threshold | None = None
    max_clipped: Threshold | None = None
    max_bars: Threshold | None = None
    min_decoded_share: Threshold | None = None


class CurationConfig(Section):
    """The data engine (§3, App. C)."""

    cuts: CutsConfig
    clips: ClipsConfig
    motion: MotionConfig
    text: TextConfig
    captions: CaptionsConfig
    filters: FiltersConfig
    subsets: dict[str, FiltersConfig] = Field(
        {}, description="named subsets of the same catalogue, beside the column `keep`"
    )
    nsfw_weights: str | None = Field(None, description="head on the image embeddings; None: the axis is unused")
    near_duplicates: bool = Field(True, description="compare every clip's embedding with those of earlier clips")
    shard_bytes: PositiveInt = Field(1_000_000_000, description="size at which a shard of clips is closed")
    hdr: Literal["refuse", "tonemap"] = Field(
        "refuse", description="videos in PQ or HLG: sources that fail with this reason, or mapped to BT.709's colours"
    )
    part_seconds: float = Field(
        1800.0,
        gt=0,
        description="a longer local source is split by time, at keyframes, into parts of about this length; "
        "defines a result, because no clip crosses the border of a part",
    )


class OrbitsConfig(Section):
    """Rendered orbits for the multi-view finetuning (§4.5, D.6): full circles at constant elevation, random light."""

    objects: PositiveInt = 150_000
    meshes: list[str] = Field([], description="folders or files (GLB, OBJ); empty: procedural textured meshes")
    style: Literal["patterned", "plain"] = Field("patterned", description="of procedural meshes; plain: even colours")
    up: Literal["y", "z"] = Field("y", description="the upright axis of the mesh files (glTF: y)")
    views: PositiveInt = 21
    size: PositiveInt = 576
    min_elevation: float = Field(-5, ge=-90, le=90)
    max_elevation: float = Field(30, ge=-90, le=90)
    environments: list[str] = Field([], description="folders or files of .hdr light; empty: procedural skies")
    fov: float = Field(33.8, gt=0, lt=180, description="vertical field of view in degrees")
    radius: float = Field(2.0, gt=0, description="distance of the camera; the object's longest side is 1")
    renderer: Renderer = "auto"
