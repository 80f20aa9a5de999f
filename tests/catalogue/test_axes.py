"""The list of axes agrees with the options, the columns and the code that measures; older catalogues lack an axis."""

from __future__ import annotations

from typing import get_args

import polars as pl
import pytest
from catalogue_inputs import write_catalogue
from fastapi.testclient import TestClient

from svd.catalogue import schema, tables
from svd.catalogue.axes import AXES, SUBSET_AXES, axes_by_column, axes_computed
from svd.catalogue.browser.app import create_app
from svd.catalogue.refilter import renew_verdicts
from svd.config import CalibrationConfig, FiltersConfig, Subset
from svd.curation.measuring.axis_scores import MEASURES
from svd.curation.merge import KNOWN


def test_every_axis_has_its_option_and_its_column():
    assert [axis.option for axis in AXES if axis.option not in FiltersConfig.model_fields] == []
    assert {axis.option for axis in AXES} == set(FiltersConfig.model_fields)
    assert all(axis.option.startswith(f"{axis.side}_") for axis in AXES)
    assert {axis.column for axis in AXES} <= set(schema.SCORES_SCHEMA.names)
    assert {f"pass_{axis.name}" for axis in AXES} <= set(schema.VERDICTS_SCHEMA.names)
    ends = [(axis.column, axis.side) for axis in AXES]
    for names in ([axis.name for axis in AXES], ends, schema.CLIPS_SCHEMA.names):
        assert len(set(names)) == len(names)


def test_both_ends_of_a_score_are_one_column():
    for column, (first, *others) in axes_by_column().items():
        assert schema.CLIPS_SCHEMA.names.count(column) == 1
        assert all(other.name == other.option for other in others)
        for other in others:
            assert (first.title, first.unit, first.computed) == (other.title, other.unit, other.computed)


def test_trainings_and_calibration_name_axes_of_the_list():
    assert {axis.option for axis in SUBSET_AXES} == set(Subset.model_fields)
    (names,) = get_args(CalibrationConfig.model_fields["axes"].annotation)
    assert set(get_args(names)) <= {axis.name for axis in AXES} | {"captions"}


def test_every_measured_axis_is_measured():
    assert set(MEASURES) == {axis.name for axis in axes_computed("measured")}


def test_known_scores_are_in_the_catalogue():
    named = {axis.column for axis in axes_computed("known")}
    assert named - set(KNOWN) == {"duration", "fps", "decoded_share"}, "the first two are measured, the last joined"


def test_a_score_is_filtered_at_both_ends(tmp_path):
    wanted = {"min_motion": {"absolute": 0.2}, "max_motion": {"absolute": 0.85}, "max_duration": {"absolute": 0.4}}
    folder = write_catalogue(tmp_path / "out", config=dict(list(wanted.items())[:2]))
    clips = tables.read_clips(folder)
    assert clips["verdict"].to_list() == ["motion"] * 2 + ["kept"] * 7 + ["max_motion"] * 3
    assert clips["reason"][11] == "max_motion 1.1 > 0.85"
    renew_verdicts(folder, FiltersConfig.model_validate(wanted))
    assert tables.read_clips(folder)["verdict"].to_list()[2:9] == ["max_duration"] * 7
    assert {path.stem for path in (folder / "plots").iterdir()} >= {"motion", "duration"}
    assert not (folder / "plots" / "max_motion.png").exists()
    renew_verdicts(folder, FiltersConfig.model_validate({"max_fps": {"absolute": 30}}))
    assert "fps" in {path.stem for path in (folder / "plots").iterdir()}
    assert {path.stem for path in (folder / "contact").iterdir()} == {"max_fps-kept"}
    renew_verdicts(folder, FiltersConfig())
    assert "fps" not in {path.stem for path in (folder / "plots").iterdir()}


@pytest.fixture
def older(tmp_path):
    """A catalogue that was written before two of the axes were added."""
    folder = write_catalogue(tmp_path / "out", config={"min_motion": {"absolute": 0.35}})
    path = tables.clips_path(folder)
    table = pl.read_parquet(path).drop("nsfw", "text_area").to_arrow()
    tables.write_table(path, table.replace_schema_metadata({b"svd.catalogue.version": str(schema.VERSION).encode()}))
    return folder


def test_an_axis_that_a_catalogue_lacks_is_unused(older):
    wanted = {"min_motion": {"absolute": 0.35}, "max_text_area": {"absolute": 0.1}}
    assert renew_verdicts(older, FiltersConfig.model_validate(wanted)) == {"motion": 0.35}
    clips = tables.read_clips(older)
    assert clips["keep"].sum() == 8 and clips["text_area"].is_null().all() and clips["pass_nsfw"].is_null().all()


def test_the_page_shows_a_catalogue_that_lacks_an_axis(older):
    client = TestClient(create_app(older), base_url="http://127.0.0.1")
    found = client.post("/api/clips", json={"sort": "text_area", "thresholds": {"motion": 0.35}}).json()
    assert found["kept"] == 8 and len(found["clips"]) == 12
    assert all(clip["text_area"] is None for clip in found["clips"])
