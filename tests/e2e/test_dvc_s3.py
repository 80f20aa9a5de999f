"""DVC on a real S3 server: a stage's flow pushes, an empty clone pulls by hash, an external bucket is not copied."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flows.recording import dvc as versioning
from svd import storage
from svd.core.errors import UserError
from svd.storage import s3

DVC = str(Path(sys.executable).parent / "dvc")
PIPELINE = """
vars: [params.yaml]
stages:
  sources:
    cmd: svd stage sources --preset ${preset}
    outs:
      - outputs/${preset}/sources
"""


def run(*command: str, cwd: Path) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def project(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "project"
    root.mkdir()
    run("git", "init", "-q", ".", cwd=root)
    run(DVC, "init", "-q", cwd=root)
    (root / "dvc.yaml").write_text(PIPELINE)
    (root / "params.yaml").write_text("preset: tiny\n")
    monkeypatch.chdir(root)
    versioning.set_local_remote("stack", f"{bucket}/dvc", s3.client().meta.endpoint_url)
    return root


def test_an_empty_clone_pulls_by_hash(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = project / "outputs/tiny/sources"
    made.mkdir(parents=True)
    (made / "video.mp4").write_bytes(b"frames" * 1000)
    items = versioning.save_outputs("sources", "tiny")
    assert versioning.has_remote() and versioning.push(items) == 2
    assert versioning.push(items) == 0
    assert "AWS" not in (project / ".dvc/config.local").read_text()
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in (".git", ".dvc/config", ".dvc/config.local", "dvc.yaml", "params.yaml"):
        run("cp", "-r", "--parents", name, str(clone), cwd=project)
    monkeypatch.chdir(clone)
    assert versioning.pull(items) == 1
    assert (clone / "outputs/tiny/sources/video.mp4").read_bytes() == b"frames" * 1000
    versioning.set_local_remote("stack", None)
    assert not versioning.has_remote()


def test_a_damaged_remote_is_one_clear_error(
    project: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = project / "outputs/tiny/sources"
    made.mkdir(parents=True)
    (made / "video.mp4").write_bytes(b"frames")
    items = versioning.save_outputs("sources", "tiny")
    versioning.push(items)
    for entry in list(storage.list_files(f"{bucket}/dvc")):
        if not entry.relative.endswith(".dir"):
            storage.delete(entry.location)
    run("rm", "-rf", "outputs", ".dvc/cache", cwd=project)
    with pytest.raises(UserError, match=r"can't pull outputs/tiny/sources from .*: 1 objects did not arrive"):
        versioning.pull(items)


def test_an_external_bucket_is_imported_without_copying(project: Path, bucket: str) -> None:
    for number in range(3):
        storage.write_bytes(f"{bucket}/ucf101/{number}.avi", b"video" * 100)
    run(DVC, "remote", "add", "source", bucket, cwd=project)
    run(DVC, "remote", "modify", "source", "endpointurl", s3.client().meta.endpoint_url, cwd=project)
    run(DVC, "import-url", "--no-download", "remote://source/ucf101", "ucf101", cwd=project)
    recorded = yaml.safe_load((project / "ucf101.dvc").read_text())
    assert recorded["deps"][0]["nfiles"] == 3 and recorded["deps"][0]["size"] == 1500
    assert not (project / "ucf101").exists()
    assert [e.relative for e in storage.list_files(bucket) if not e.relative.startswith("ucf101/")] == []
    run(DVC, "pull", "-q", "ucf101.dvc", cwd=project)
    assert sorted(p.name for p in (project / "ucf101").iterdir()) == ["0.avi", "1.avi", "2.avi"]
