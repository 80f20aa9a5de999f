"""Statistics, contact sheets, reports, subsets and the dry run of a catalogue."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import polars as pl
import pytest
from catalogue_inputs import write_catalogue
from curation_inputs import SAMPLES, tiny, write_video

from svd.catalogue import filters, refilter, statistics, tables
from svd.catalogue.contact_sheets import pick
from svd.catalogue.report import write_report
from svd.catalogue.subsets import calibration_subsets, write_subsets
from svd.config import EncodersConfig, FiltersConfig
from svd.core.errors import UserError
from svd.curation.dry_run import plan_curation
from svd.curation.merge import bucket, motion_edges
from svd.curation.metrics import match_cuts
from svd.sources.listing import list_sources

TOY = EncodersConfig(kind="toy-clip")


@pytest.fixture
def folder(tmp_path):
    return write_catalogue(tmp_path / "out", config={"min_motion": {"absolute": 0.35}})


def test_the_rows_of_table_one(folder):
    clips = tables.scan_clips(folder)
    values = statistics.dataset_row(clips.filter(pl.col("keep")))
    assert values["clips"] == 8 and values["motion_annotations"] == 8
    assert values["clip_duration_seconds"] == 0.5 and values["mean_frames"] == 12
    assert values["mean_clips_per_video"] == pytest.approx(8 / 3)
    assert values["total_duration_years"] == pytest.approx(4 / (365.25 * 24 * 3600))
    assert statistics.dataset_row(clips.filter(pl.lit(False)))["mean_clips_per_video"] is None


def test_histograms_count_every_clip_once(folder):
    every, kept, edges = statistics.histogram(tables.scan_clips(folder), "motion_score", bins=4)
    assert every.sum() == 12 and kept.sum() == 8 and len(edges) == 5
    assert np.array_equal(kept[-2:], every[-2:])
    assert len(statistics.histogram(tables.scan_clips(folder), "nsfw")[0]) == 0


def test_a_report_of_two_catalogues_is_one_file_with_everything_in_it(folder, tmp_path):
    other = write_catalogue(tmp_path / "other", count=5, config={"max_text_area": {"quantile": 0.25}})
    for one in (folder, other):
        statistics.write_statistics(one, json.loads((one / "funnel.json").read_text())["thresholds"])
    page = write_report([folder, other], tmp_path / "report.html", ["first", "second"]).read_text()
    assert "first, filtered" in page and "second, filtered" in page and "LVD-10M-F (paper, other data)" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "motion, dropped" in page and "text area, kept" in page
    assert page.count("data:image/jpeg") == 4
    assert "3 static, 9 pan-left" in page.replace("9 pan-left, 3 static", "3 static, 9 pan-left")
    empty = r"<td>the file is empty</td><td>2</td><td>train/a.mp4</td>"
    assert len(re.findall(empty, page)) == 2 and page.index("the file is empty") < page.index("no video stream")
    assert "Scores by" not in page
    assert "<tr><td>motion</td><td>9 (0.3)</td><td>8 (0.4)</td><td>8 (0.35)</td><td>7 (0.5)</td>" in page
    assert (
        page.count("clips are few for quantiles") == 1 and "5 clips are few for quantiles (25 % by text_area)" in page
    )
    assert "<th>motion annotations</th>" in page and re.search(r"<td>first, filtered</td>.*<td>8</td>\s*</tr>", page)
    (folder / "models.json").write_text('{"similarity": "some network"}')
    assert "similarity: some network" in write_report([folder], tmp_path / "one.html").read_text()
    with pytest.raises(UserError, match=r"statistics\.json: missing; run `svd refilter"):
        write_report([write_catalogue(tmp_path / "bare", count=1)], tmp_path / "x.html")


def test_refiltering_renews_what_depends_on_verdicts(folder):
    refilter.renew_verdicts(folder, FiltersConfig.model_validate({"max_text_area": {"absolute": 0.1}}))
    assert json.loads((folder / "statistics.json").read_text())["kept"]["clips"] == 6
    assert {p.name for p in (folder / "contact").iterdir()} == {"text_area-kept.jpg", "text_area-dropped.jpg"}
    assert "text area" in (folder / "report.html").read_text()


def test_refiltering_renews_the_named_subsets_and_keeps_the_title(tmp_path):
    folder = write_catalogue(tmp_path / "mine" / "curation", config={"min_motion": {"absolute": 0.35}})
    half = FiltersConfig.model_validate({"min_motion": {"quantile": 0.5}})
    refilter.renew_verdicts(folder, FiltersConfig(), {"half": half})
    assert tables.read_clips(folder, "half")["keep"].sum() == 6 and tables.read_clips(folder)["keep"].all()
    quarter = FiltersConfig.model_validate({"min_motion": {"quantile": 0.25}})
    refilter.renew_verdicts(folder, FiltersConfig(), {"half": half, "quarter": quarter})
    assert json.loads((folder / "subsets.json").read_text()).keys() == {"half", "quarter"}
    refilter.renew_verdicts(folder, FiltersConfig())
    assert tables.read_clips(folder, "quarter")["keep"].sum() == 9
    page = (folder / "report.html").read_text()
    assert "<td>mine, filtered</td>" in page and "<td>curation" not in page


def test_clips_a_video_are_compared_with_the_scenes_of_metadata(folder):
    clips, sources = tables.scan_clips(folder), tables.read_sources(folder)
    assert statistics.clips_per_video(clips, sources) == {
        "cut detection": pytest.approx(3),
        "after filters": pytest.approx(2),
    }
    given = sources.with_columns(scenes=pl.Series([4, None, 1] + [9] * (len(sources) - 3)))
    ok = given.filter(verdict="ok")["scenes"].drop_nulls()
    assert statistics.clips_per_video(clips, given)["metadata"] == ok.mean()
    assert "metadata" not in statistics.clips_per_video(clips, sources.drop("scenes"))


def test_contact_sheets_span_the_scores():
    clips = pl.LazyFrame({"clip_id": [f"{i:03d}" for i in range(100)], "score": [float(i) for i in range(100)]})
    clips = clips.with_columns(shard=pl.lit("s"), thumbnail_offset=0, thumbnail_size=0)
    chosen = pick(clips, "score", 12)["score"].to_list()
    assert len(chosen) == 12 and (chosen[0], chosen[-1]) == (0.0, 99.0)
    assert set(np.diff(chosen)) <= {9.0}
    assert len(pick(clips.head(3), "score", 12)) == 3 and len(pick(clips.head(0), "score", 12)) == 0


def test_subsets_of_one_catalogue(folder):
    subsets = calibration_subsets(("motion", "text_area"))
    assert set(subsets) == {"unfiltered", *(f"{a}-{s}" for a in ("motion", "text_area") for s in ("12.5", "25", "50"))}
    found = write_subsets(
        folder,
        subsets
        | {
            "both": FiltersConfig.model_validate({"min_motion": {"absolute": 0.35}, "max_text_area": {"absolute": 0.1}})
        },
    )
    assert found["unfiltered"]["clips"] == 12 and found["motion-50"]["clips"] == 6
    chosen = tables.read_clips(folder, "motion-50")
    assert chosen.filter("keep")["motion_score"].min() >= chosen.filter(~pl.col("keep"))["motion_score"].max()
    assert tables.read_clips(folder)["keep"].sum() == 8
    assert found["both"]["clips"] == tables.read_clips(folder, "both")["keep"].sum() == 6
    stored = pl.read_parquet(folder / "catalogue" / "subsets.parquet")
    assert stored.columns[0] == "clip_id" and stored["clip_id"].equals(chosen["clip_id"])
    with pytest.raises(UserError, match="no subset 'clip_id'"):
        tables.read_clips(folder, "clip_id")
    with pytest.raises(UserError, match="another name"):
        write_subsets(folder, {"clip_id": FiltersConfig()})
    with pytest.raises(UserError, match="no subset 'best'; there are: unfiltered"):
        tables.read_clips(folder, "best")
    with pytest.raises(UserError, match=r"subset 'nsfw-12\.5': the catalogue has no scores for nsfw"):
        write_subsets(folder, calibration_subsets(("nsfw",)))
    with pytest.raises(UserError, match="unknown axis speed"):
        calibration_subsets(("speed",))


def test_motion_buckets_are_ranks():
    scores = np.random.default_rng(0).lognormal(size=5000).astype(np.float32)
    buckets = bucket(scores, motion_edges(scores))
    assert buckets.min() == 0 and buckets.max() == 255
    counts = np.bincount(buckets, minlength=256)
    assert counts.min() >= 18 and counts.max() <= 21
    assert (np.diff(buckets[np.argsort(scores)]) >= 0).all()
    assert abs(int(bucket(np.median(scores, keepdims=True), motion_edges(scores))[0]) - 127) <= 1
    assert bucket(np.array([0.5]), motion_edges(np.zeros(0))).tolist() == [255]


def test_cuts_are_matched_once_each():
    assert sorted(match_cuts([10, 11, 50], [12, 49, 90], 2)) == [1, 2]
    assert match_cuts([5, 6], [5], 2) == [0]
    assert match_cuts([5], [8], 2) == []


def test_the_dry_run_adds_up(tmp_path):
    write_video(tmp_path / "a.mp4", frames=48)
    write_video(tmp_path / "b.mp4", frames=24)
    (tmp_path / "broken.mp4").write_text("nothing")
    (tmp_path / "remote.txt").write_text("s3://bucket/c.mp4\n")
    sources = list_sources([str(tmp_path), str(tmp_path / "remote.txt")])
    found = plan_curation(sources, tiny().curation, 2, TOY, workers=2)
    assert (found.sources, found.unknown, found.units) == (4, 2, 2)
    assert found.hours == pytest.approx(3 / 3600, rel=0.05)
    split = plan_curation(sources, tiny(curation__part_seconds=0.5).curation, 2, TOY)
    assert split.units == 4 + 2 + 1, "the parts of two videos, and one unit of two sources"
    assert found.wall_hours == pytest.approx(found.cpu_hours / 2)
    real = plan_curation(list_sources([str(SAMPLES)]), tiny().curation, 2, TOY)
    assert real.cpu_hours > found.cpu_hours and any("sources" in line for line in real.lines())


def test_verdicts_of_other_clips_are_refused(folder):
    path = folder / "catalogue" / "verdicts.parquet"
    verdicts = pl.read_parquet(path)
    assert verdicts.columns[0] == "clip_id" and verdicts["clip_id"].equals(tables.read_clips(folder)["clip_id"])
    for other in (verdicts.reverse(), verdicts.head(11), pl.concat([verdicts, verdicts.head(1)])):
        for table in (other, other.drop("clip_id")) if len(other) != len(verdicts) else (other,):
            table.write_parquet(path)
            with pytest.raises(UserError, match=r"not the clips of clips\.parquet; run `svd refilter"):
                tables.read_clips(folder)
    verdicts.drop("clip_id").write_parquet(path)  # as earlier versions wrote it
    assert tables.read_clips(folder)["keep"].equals(verdicts["keep"])
    write_subsets(folder, {"half": FiltersConfig.model_validate({"min_motion": {"quantile": 0.5}})})
    subsets = pl.read_parquet(folder / "catalogue" / "subsets.parquet")
    subsets.reverse().write_parquet(folder / "catalogue" / "subsets.parquet")
    with pytest.raises(UserError, match=r"subsets\.parquet: its rows are not the clips"):
        tables.read_clips(folder, "half")


def test_verdicts_are_written_byte_for_byte_alike(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    for one in (folder, tmp_path / "copy"):
        filters.write_verdicts(one, FiltersConfig.model_validate({"min_motion": {"quantile": 0.25}}))
    first, second = ((p / "catalogue" / "verdicts.parquet").read_bytes() for p in (folder, tmp_path / "copy"))
    assert first == second
