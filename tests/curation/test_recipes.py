"""An axis and a captioner added from outside, by the recipes of CONTRIBUTING.md, in the promised number of files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile

import polars as pl
import pytest
from curation_inputs import write_encoders, write_sources
from recipes import CodeCopy, add_axis, add_captioner

CURATE = """
import sys
from pathlib import Path

from svd.config.load import load_preset
from svd.curation import stage
from svd.stage import StageContext

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    preset = load_preset(
        str(Path(sys.argv[2]) / "tiny.yaml"),
        {
            "curation.filters.min_brightness": {"quantile": 0.5},
            "curation.captions.captioners": ["sidecar", "colour"],
            "curation.captions.probabilities": {"sidecar": 0.5, "colour": 0.5},
        },
    )
    inputs = {name: folder / name for name in ("sources", "encoders")}
    stage.run(StageContext(preset, inputs, folder / "output", folder / "work"))
    print(stage.__file__)
"""


def test_an_axis_touches_three_files(tmp_path):
    code = CodeCopy.make(tmp_path)
    add_axis(code)
    assert len(code.touched) == 3


def test_a_captioner_touches_two_files(tmp_path):
    code = CodeCopy.make(tmp_path)
    add_captioner(code)
    assert len(code.touched) == 2


@pytest.mark.slow
def test_the_added_axis_and_captioner_reach_every_output(tmp_path):
    code = CodeCopy.make(tmp_path / "code")
    add_axis(code)
    add_captioner(code)
    write_sources(tmp_path / "sources", train=2, test=1, scenes=3)
    write_encoders(tmp_path / "encoders")
    (tmp_path / "curate.py").write_text(CURATE)
    done = subprocess.run(
        [sys.executable, tmp_path / "curate.py", tmp_path, code.folder / "presets"],
        env=os.environ | {"PYTHONPATH": str(code.folder), "SVD_NO_PROGRESS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(str(code.folder)), "the run used the code of the copy"

    output = tmp_path / "output"
    clips = pl.read_parquet(output / "catalogue" / "clips.parquet")
    verdicts = pl.read_parquet(output / "catalogue" / "verdicts.parquet")
    assert clips["brightness"].is_between(0.05, 0.95).all() and clips["brightness"].n_unique() > 1
    assert 0 < verdicts["pass_brightness"].sum() < len(clips)
    assert {"brightness-kept.jpg", "brightness-dropped.jpg"} <= {path.name for path in (output / "contact").iterdir()}
    assert (output / "plots" / "brightness.png").is_file()
    assert "brightness" in {step["step"] for step in json.loads((output / "funnel.json").read_text())["steps"]}
    assert "brightness, dropped" in (output / "report.html").read_text()
    for row in clips.iter_rows(named=True):
        captions = {caption["captioner"]: caption["text"] for caption in row["captions"]}
        assert captions["colour"].startswith("mostly ")
    with tarfile.open(next((output / "shards").glob("*.tar"))) as tar:
        name = next(name for name in tar.getnames() if name.endswith(".json"))
        sample = json.loads(tar.extractfile(name).read())
    assert "brightness" in sample and "colour" in [caption["captioner"] for caption in sample["captions"]]
