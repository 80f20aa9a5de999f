"""Filters: thresholds, verdicts, reasons, funnel; against a plain Python judgement."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svd.catalogue import filters, schema, tables
from svd.catalogue.threshold_changes import few_clips_note, threshold_changes
from svd.config import FiltersConfig


def frame(**columns) -> pl.DataFrame:
    length = len(next(iter(columns.values())))
    table = pl.DataFrame({"clip_id": [f"c{i}" for i in range(length)], **columns})
    return pl.from_arrow(tables.with_schema(table, schema.CLIPS_SCHEMA))


def judge(table: pl.DataFrame, **config) -> tuple[pl.DataFrame, dict[str, float]]:
    clips, thresholds = filters.apply(table.lazy(), FiltersConfig.model_validate(config))
    return clips.collect(), thresholds


scores = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(values=scores, share=st.sampled_from([0.0, 0.125, 0.25, 0.5]))
def test_a_quantile_drops_its_share_from_the_right_end(values, share):
    table = frame(motion_score=values, text_area=values)
    kept, _ = judge(table, min_motion={"quantile": share})
    dropped = [v for v, k in zip(values, kept["keep"], strict=True) if not k]
    remaining = [v for v, k in zip(values, kept["keep"], strict=True) if k]
    # Never more than the share (rounded up); less only where scores tie at the threshold.
    assert len(dropped) <= -(-share * (len(values) - 1) // 1)
    assert not dropped or max(dropped) < min(remaining)
    kept, _ = judge(table, max_text_area={"quantile": share})
    dropped = [v for v, k in zip(values, kept["keep"], strict=True) if not k]
    remaining = [v for v, k in zip(values, kept["keep"], strict=True) if k]
    assert not dropped or min(dropped) > max(remaining)


def test_distinct_scores_lose_exactly_the_share():
    table = frame(motion_score=[float(i) for i in range(101)])
    for share, count in ((0.125, 13), (0.25, 25), (0.5, 50)):
        kept, _ = judge(table, min_motion={"quantile": share})
        assert (~kept["keep"]).sum() == count


@settings(max_examples=12, deadline=None)
@given(values=scores, bounds=st.lists(st.floats(0, 1, width=32), min_size=2, max_size=2).map(sorted))
def test_a_bounded_quantile_spares_the_good_and_drops_the_bad(values, bounds):
    table = frame(motion_score=values, text_area=values)
    low, high = bounds
    for option, good, bad in (
        ("min_motion", lambda v: v >= high, lambda v: v < low),
        ("max_text_area", lambda v: v <= low, lambda v: v > high),
    ):
        _, plain = judge(table, **{option: {"quantile": 0.25}})
        kept, bounded = judge(table, **{option: {"quantile": 0.25, "at_least": low, "at_most": high}})
        assert bounded == {name: min(max(value, low), high) for name, value in plain.items()}
        assert all(keep for value, keep in zip(values, kept["keep"], strict=True) if good(value))
        assert not any(keep for value, keep in zip(values, kept["keep"], strict=True) if bad(value))


@settings(max_examples=10, deadline=None)
@given(
    rows=st.lists(st.tuples(*[st.one_of(st.none(), st.sampled_from([0.0, 0.1, 0.2, 0.4, 0.8]))] * 3), min_size=1),
    share=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
)
def test_the_table_of_changes_says_what_those_thresholds_keep(rows, share):
    motion, similarity, text = (list(column) for column in zip(*rows, strict=True))
    table = frame(motion_score=motion, similarity=similarity, text_area=text)
    options = {"motion": "min_motion", "similarity": "min_similarity", "text_area": "max_text_area"}
    clips, thresholds = judge(table, **{option: {"quantile": share} for option in options.values()})
    table_of_changes = threshold_changes(clips.lazy(), thresholds)
    assert [row["axis"] for row in table_of_changes] == [*thresholds]
    for row in table_of_changes:
        assert [change["points"] for change in row["at"]] == [-10, -5, 0, 5, 10]
        assert row["at"][2]["threshold"] == thresholds[row["axis"]]
        kept = [change["kept"] for change in row["at"]]
        assert kept == sorted(kept, reverse=True)
        for change in row["at"]:
            other = thresholds | {row["axis"]: change["threshold"]}
            again, _ = judge(table, **{options[name]: {"absolute": value} for name, value in other.items()})
            assert again["keep"].sum() == change["kept"]


def test_a_point_of_change_is_a_hundredth_of_the_clips():
    clips, thresholds = judge(frame(motion_score=[float(i) for i in range(101)]), min_motion={"quantile": 0.25})
    (row,) = threshold_changes(clips.lazy(), thresholds)
    assert [change["kept"] for change in row["at"]] == [86, 81, 76, 71, 66]
    assert few_clips_note({"steps": [{"left": 101}], "quantiles": {"motion": 0.25}}).startswith(
        "101 clips are few for quantiles (25 % by motion)"
    )
    assert not few_clips_note({"steps": [{"left": 500}], "quantiles": {"motion": 0.25}})
    assert not few_clips_note({"steps": [{"left": 101}], "quantiles": {}})


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(*[st.one_of(st.none(), st.floats(0, 1, width=32))] * 3), min_size=1, max_size=40))
def test_verdicts_equal_a_plain_judgement(rows):
    motion, similarity, text = (list(column) for column in zip(*rows, strict=True))
    table = frame(motion_score=motion, similarity=similarity, text_area=text)
    clips, thresholds = judge(
        table, min_motion={"absolute": 0.3}, min_similarity={"absolute": 0.5}, max_text_area={"absolute": 0.07}
    )
    used = {
        name
        for name, column in (("motion", motion), ("similarity", similarity), ("text_area", text))
        if any(v is not None for v in column)
    }
    assert set(thresholds) == used
    for row, (m, s, t) in zip(clips.iter_rows(named=True), rows, strict=True):
        failed = []
        if "motion" in used and (m is None or m < 0.3):
            failed.append("motion")
        if "similarity" in used and s is not None and s < 0.5:
            failed.append("similarity")
        if "text_area" in used and (t is None or t > 0.07):
            failed.append("text_area")
        assert row["keep"] == (not failed)
        assert row["verdict"] == (failed[0] if failed else "kept")
        assert [part.split(" ")[0] for part in row["reason"].split("; ") if part] == failed
    steps = filters.funnel(clips.lazy(), thresholds)
    assert steps[0]["left"] == len(rows)
    assert steps[-1]["left"] == clips["keep"].sum()
    assert sum(step["dropped"] for step in steps) == len(rows) - steps[-1]["left"]


def test_reasons_name_score_sign_and_threshold():
    table = frame(motion_score=[0.021, None, 0.5], text_area=[0.102, 0.0, 0.0])
    clips, _ = judge(table, min_motion={"absolute": 0.043}, max_text_area={"absolute": 0.07})
    assert clips["reason"].to_list() == [
        "motion 0.021 < 0.043; text_area 0.102 > 0.07",
        "motion not measured",
        "",
    ]


def test_a_score_that_is_no_number_is_not_measured():
    table = frame(aesthetics=[float("nan"), 5.0, 3.0])
    clips, thresholds = judge(table, min_aesthetics={"quantile": 0.5})
    assert thresholds == {"aesthetics": 5.0}
    assert clips["reason"].to_list() == ["aesthetics not measured", "", "aesthetics 3.0 < 5"]


@pytest.mark.parametrize("config", [{}, {"min_aesthetics": {"quantile": 0.25}}])
def test_without_scores_an_axis_is_unused(config):
    clips, thresholds = judge(frame(motion_score=[1.0, 2.0]), **config)
    assert thresholds == {}
    assert clips["keep"].all()
    assert clips["pass_aesthetics"].is_null().all()
