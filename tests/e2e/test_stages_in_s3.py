"""Every stage on a machine with an empty folder: inputs come from S3, the result goes there, footage is read there."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from micro_project import ROOT, micro_preset
from servers import BIN

from flows.recording.results_store import read_manifest
from flows.running import runner
from flows.stages import STAGES
from svd import storage
from svd.config import Preset

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture
def preset(bucket: str) -> Preset:
    """The micro preset, with footage and a mesh that lie in the bucket."""
    storage.upload(next((ROOT / "samples").glob("*.mp4")), f"{bucket}/footage/clip.mp4")
    for n in range(1, 5):
        mesh = f"v 0 0 0\nv {n} 0 0\nv 0 1 0\nv 0 0 1\nf 1 2 3\nf 1 3 4\nf 1 4 2\nf 2 3 4\n"
        storage.write_bytes(f"{bucket}/meshes/{n}.obj", mesh.encode())
    values = micro_preset(sources__paths=[f"{bucket}/footage"], orbits__meshes=[f"{bucket}/meshes"])
    return Preset.model_validate(values)


def test_every_stage(preset: Preset, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = f"{bucket}/results"
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name, stage in STAGES.items():
        machine = tmp_path / name
        machine.mkdir()
        monkeypatch.chdir(machine)
        subprocess.run([str(BIN / "dvc"), "init", "-q", "--no-scm"], check=True)
        runner.run_preset_stage(name, preset, store_option=store)
        made = {path.name for path in (machine / "outputs" / "micro").iterdir() if not path.name.startswith(".")}
        assert made == {name, *stage.inputs}
        stored = read_manifest(f"{store}/micro/{name}")
        assert stored is not None and "metrics.json" in stored
