"""Every stage on a machine with an empty folder: inputs come from S3 by hash, the result goes there, footage is read
there; and an empty clone pulls everything with DVC alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from micro_project import ROOT, micro_preset
from servers import BIN

from flows.recording import results_store
from flows.recording.dvc import hash_folder
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


def empty_machine(folder: Path, preset: Preset, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project as an image brings it: no outputs, no cache, no lock."""
    (folder / "presets").mkdir(parents=True)
    monkeypatch.chdir(folder)
    for name in ("dvc.yaml", "requirements.lock"):
        shutil.copy(ROOT / name, folder)
    (folder / "branches").mkdir()
    shutil.copy(ROOT / "branches" / "dvc.yaml", folder / "branches")
    values = preset.model_dump(mode="json", exclude_unset=True)
    (folder / "presets" / "micro.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    (folder / "params.yaml").write_text("preset: micro\n")
    subprocess.run([str(BIN / "dvc"), "init", "-q", "--no-scm"], check=True)
    return folder


def test_every_stage(preset: Preset, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = f"{bucket}/results"
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name, stage in STAGES.items():
        machine = empty_machine(tmp_path / name, preset, monkeypatch)
        runner.run_preset_stage(name, preset, store_option=store)
        made = {path.name for path in (machine / "outputs" / "micro").iterdir() if not path.name.startswith(".")}
        whole = {other for other in stage.inputs if not stage.reads_part_of(other)}
        assert made - {"inventory"} == {name, *whole}
        stored = results_store.stored_output(store, "micro", name)
        assert stored is not None and hash_folder(Path(stored.path)).md5 == stored.md5
    assert not list(storage.list_files(f"{store}/work"))
    clone = empty_machine(tmp_path / "clone", preset, monkeypatch)
    results_store.fetch_locks(store, "micro")
    for command in (["remote", "add", "-d", "results", f"{store}/dvc"], ["pull", "--allow-missing"]):
        subprocess.run([str(BIN / "dvc"), *command], check=True, env=os.environ)
    for name in (name for name, stage in STAGES.items() if not stage.branch):
        stored = results_store.stored_output(store, "micro", name)
        assert stored is not None and hash_folder(clone / stored.path).md5 == stored.md5
