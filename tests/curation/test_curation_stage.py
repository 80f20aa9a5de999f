"""The curation stage end to end: rows for everything, determinism, resuming, bad input, refiltering."""

from __future__ import annotations

import functools
import io
import json
import re
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import av
import polars as pl
import pytest
from curation_inputs import context, tiny, tree, write_broken, write_encoders, write_sources

from svd.catalogue import refilter, tables
from svd.catalogue.shards import iterate_samples, read_clip_bytes, read_thumbnail
from svd.config import FiltersConfig
from svd.core.errors import UserError
from svd.curation import stage


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    sources = write_sources(folder / "sources")
    expected = write_broken(sources / "footage", sources / "train" / "train_0000.mp4")
    return sources, write_encoders(folder / "encoders"), expected


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    sources, encoders, _ = inputs
    run = context(tiny(), sources, encoders, tmp_path_factory.mktemp("run"))
    return stage.run(run), run.output


def test_every_source_has_a_row_with_a_reason(inputs, finished):
    _, _, expected = inputs
    rows = {row["source_uri"]: row for row in tables.read_sources(finished[1]).iter_rows(named=True)}
    assert len(rows) == 3 + len(expected)
    assert rows["train/train_0001.mp4"]["scenes"] == 4 and rows["footage/truncated.mp4"]["scenes"] is None
    for name, verdicts in expected.items():
        row = rows[f"footage/{name}"]
        assert row["verdict"] in verdicts.split("|"), row
        assert row["verdict"] == "ok" or row["reason"]
        assert "\n" not in row["reason"]
    duplicate = [row for row in rows.values() if row["verdict"] == "duplicate"]
    assert [row["duplicate_of"] for row in duplicate] == ['footage/it\'s "quoted" žluťoučký.mp4']
    assert "unusable" in finished[0].summary


def test_clips_are_what_their_rows_say(finished):
    clips = tables.read_clips(finished[1])
    assert clips["clip_id"].n_unique() == len(clips) > 6
    for row in clips.iter_rows(named=True):
        assert row["clip_id"] == tables.clip_id(row["source_id"], row["start_pts"], row["end_pts"])
        with av.open(io.BytesIO(read_clip_bytes(finished[1], row))) as container:
            frames = list(container.decode(video=0))
        assert len(frames) == row["frames"]
        assert (frames[0].width, frames[0].height) == (row["width"], row["height"])
        assert read_thumbnail(finished[1], row).startswith(b"\xff\xd8")
        assert row["verdict"] == "kept" or row["reason"]
        told = {"motion"} if row["split"] == "footage" else {"motion", "sidecar"}
        assert {c["captioner"] for c in row["captions"]} == told
        assert 0 <= row["motion_bucket"] <= 255
    order = clips.sort("motion_score")["motion_bucket"].to_list()
    assert order == sorted(order)


def test_shards_hold_exactly_the_clips(finished):
    clips = tables.read_clips(finished[1])
    seen = []
    for shard in sorted((finished[1] / "shards").glob("*.tar")):
        for key, files in iterate_samples(shard):
            assert set(files) == {"mp4", "jpg", "json"}
            assert json.loads(files["json"])["clip_id"] == key
            seen.append(key)
    assert sorted(seen) == sorted(clips["clip_id"])


def test_planted_things_are_measured(finished):
    metrics = finished[0].metrics
    assert metrics["truth_hard_cut_recall"] >= 0.9
    assert metrics["truth_hard_cut_precision"] >= 0.9
    assert metrics["clips"] == len(tables.read_clips(finished[1]))
    assert metrics["sources_failed"] >= 5


def test_the_result_does_not_depend_on_workers_order_or_interruptions(inputs, finished, tmp_path):
    sources, encoders, _ = inputs
    moved = tmp_path / "elsewhere"
    shutil.copytree(sources, moved, symlinks=True)
    run = context(tiny(compute__curation__workers=1), moved, encoders, tmp_path)
    measured = run.work / "measured"
    # As a killed run leaves things: half a unit, half a score, a finished folder that was never published.
    for junk in (
        measured / ".clips-000001.tmp" / "clips",
        run.work / "scored" / ".clips-000000.tmp",
        run.work / "finished",
    ):
        junk.mkdir(parents=True)
        (junk / "half").write_bytes(b"half")
    stage.run(run)
    assert tree(run.output) == tree(finished[1])


def test_a_second_run_measures_nothing_again(inputs, finished, tmp_path, monkeypatch):
    sources, encoders, _ = inputs
    run = context(tiny(), sources, encoders, tmp_path)
    shutil.copytree(finished[1].parent / "work", run.work)
    monkeypatch.setattr(stage, "measure_unit", lambda *args: pytest.fail("measured again"))
    stage.run(run)
    assert tree(run.output) == tree(finished[1])


def test_refilter_changes_verdicts_and_no_video(finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished[1], folder)
    before, shards = tables.read_clips(folder), tree(folder / "shards")
    thresholds = refilter.renew_verdicts(folder, FiltersConfig.model_validate({"min_motion": {"quantile": 0.5}}))
    after = tables.read_clips(folder)
    assert tree(folder / "shards") == shards
    assert after["keep"].sum() == (before["motion_score"] >= thresholds["motion"]).sum() < before["keep"].len()
    judged = [
        column for column in after.columns if column.startswith("pass_") or column in ("keep", "verdict", "reason")
    ]
    assert after.drop(judged).equals(before.drop(judged))
    funnel = json.loads((folder / "funnel.json").read_text())
    assert [step["step"] for step in funnel["steps"]] == ["clips", "motion"]


def test_nothing_usable_is_one_clear_error(inputs, tmp_path):
    _, encoders, _ = inputs
    sources = tmp_path / "sources"
    (sources / "footage").mkdir(parents=True)
    run = context(tiny(), sources, encoders, tmp_path)
    with pytest.raises(UserError, match="no videos"):
        stage.run(run)
    (sources / "footage" / "text.mp4").write_text("no video")
    with pytest.raises(UserError, match=re.escape("not one of 1 sources gave a clip (footage/text.mp4: ")):
        stage.run(run)


def test_reading_says_where_a_catalogue_was_expected(tmp_path):
    with pytest.raises(UserError, match="no clip catalogue here"):
        tables.read_clips(tmp_path)
    (tmp_path / "catalogue").mkdir()
    pl.DataFrame({"clip_id": ["a"]}).write_parquet(tmp_path / "catalogue" / "clips.parquet")
    with pytest.raises(UserError, match="catalogue version 0"):
        tables.read_clips(tmp_path)


@pytest.mark.parametrize("per_unit", [1, 3])
def test_equal_bytes_behind_two_addresses_count_once(inputs, tmp_path, per_unit):
    """A source that must be fetched is hashed only then, so equal ones are found when the units are merged."""
    sources, encoders, _ = inputs
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(sources / "train"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    (tmp_path / "in" / "footage").mkdir(parents=True)
    uris = [f"{address}/train_0000.mp4", f"{address}/train_0000.mp4?again", f"{address}/gone.mp4"]
    rows = "".join(json.dumps({"uri": uri, "licence": "CC0-1.0", "views": 7}) + "\n" for uri in uris)
    (tmp_path / "in" / "footage" / "sources.jsonl").write_text(rows)
    run = context(tiny(sources__sources_per_shard=per_unit), tmp_path / "in", encoders, tmp_path)
    stage.run(run)
    server.shutdown()
    found = {row["source_uri"]: row for row in tables.read_sources(run.output).iter_rows(named=True)}
    assert [found[uri]["verdict"] for uri in uris] == ["ok", "duplicate", "failed"]
    assert found[uris[1]]["duplicate_of"] == uris[0] and "404" in found[uris[2]]["reason"]
    clips = tables.read_clips(run.output)
    assert set(clips["source_uri"]) == {uris[0]} and clips["clip_id"].n_unique() == len(clips) > 0
    assert set(clips["split"]) == {"footage"} and set(clips["licence"]) == {"CC0-1.0"}
    assert {json.loads(text)["views"] for text in clips["metadata"]} == {7}
    assert json.loads(found[uris[2]]["metadata"]) == {"views": 7}
