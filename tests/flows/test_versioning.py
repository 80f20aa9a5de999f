"""The flows' view of DVC against DVC's own: same dvc.lock as `dvc repro`, push and pull by hash."""

import subprocess
import sys
from pathlib import Path

import pytest

from flows.recording import dvc as versioning
from flows.tracking.runs import Lineage
from svd.core.errors import UserError

DVC = str(Path(sys.executable).parent / "dvc")
PIPELINE = """
vars:
  - params.yaml
stages:
  sources:
    cmd: mkdir -p outputs/${preset}/sources && cp code.py outputs/${preset}/sources/a
    deps:
      - code.py
    outs:
      - outputs/${preset}/sources
  curation:
    cmd: mkdir -p outputs/${preset}/curation && cat outputs/${preset}/sources/a > outputs/${preset}/curation/b
    deps:
      - outputs/${preset}/sources
    params:
      - presets/${preset}.yaml:
          - curation
    outs:
      - outputs/${preset}/curation
"""


def run(*command: str, cwd: Path) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "project"
    (root / "presets").mkdir(parents=True)
    run("git", "init", "-q", ".", cwd=root)
    run(DVC, "init", "-q", cwd=root)
    (root / "dvc.yaml").write_text(PIPELINE)
    (root / "params.yaml").write_text("preset: tiny\n")
    (root / "presets" / "tiny.yaml").write_text("curation: {a: 1}\nother: 2\n")
    (root / "code.py").write_text("print(1)\n")
    run(DVC, "remote", "add", "-d", "store", str(tmp_path / "store"), cwd=root)
    monkeypatch.chdir(root)
    return root


def outputs(project: Path, name: str) -> list[Lineage]:
    run("bash", "-c", f"mkdir -p outputs/tiny/{name} && cp code.py outputs/tiny/{name}/x", cwd=project)
    return versioning.save_outputs(name, "tiny")


def test_record_writes_the_lock_that_repro_writes(project: Path) -> None:
    run(DVC, "repro", "-q", cwd=project)
    expected = (project / "dvc.lock").read_text()
    (project / "dvc.lock").unlink()
    known: dict[str, Lineage] = {}
    for name in ("sources", "curation"):
        assert versioning.changed(name, "tiny")
        made = versioning.save_outputs(name, "tiny")
        versioning.record(name, "tiny", made, known)
        known |= {item.path: item for item in made}
    assert (project / "dvc.lock").read_text() == expected
    assert "didn't change" in run(DVC, "repro", cwd=project)


def test_only_what_depends_on_a_parameter_changes(project: Path) -> None:
    run(DVC, "repro", "-q", cwd=project)
    assert not versioning.changed("sources", "tiny")
    (project / "presets" / "tiny.yaml").write_text("curation: {a: 1}\nother: 3\n")
    assert not versioning.changed("curation", "tiny")
    (project / "presets" / "tiny.yaml").write_text("curation: {a: 2}\nother: 3\n")
    assert versioning.changed("curation", "tiny") and not versioning.changed("sources", "tiny")


def test_an_empty_machine_pulls_by_hash(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = outputs(project, "sources")
    assert versioning.push(made) > 0
    clone = tmp_path / "clone"
    run("cp", "-r", str(project), str(clone), cwd=tmp_path)
    run("rm", "-rf", "outputs", ".dvc/cache", cwd=clone)
    monkeypatch.chdir(clone)
    assert versioning.pull(made) == 1
    assert (clone / "outputs/tiny/sources/x").read_text() == "print(1)\n"
    assert versioning.pull(made) == 0
    assert versioning.hash_folder(Path("outputs/tiny/sources")).md5 == made[0].md5


def test_a_hash_that_is_nowhere_is_one_clear_error(project: Path) -> None:
    missing = Lineage("sources", "outputs/tiny/sources", "0" * 32 + ".dir", 1, 1)
    with pytest.raises(UserError, match="nor in the DVC remote"):
        versioning.pull([missing])


def test_outside_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="not a DVC repository"):
        versioning.changed("sources", "tiny")


def test_another_preset_after_the_first_is_recorded_as_repro_would(project: Path) -> None:
    run(DVC, "repro", "-q", cwd=project)
    (project / "presets" / "mine.yaml").write_text("curation: {a: 3}\n")
    (project / "params.yaml").write_text("preset: mine\n")
    (project / "outputs/mine/sources").mkdir(parents=True)
    (project / "outputs/mine/sources/a").write_text((project / "code.py").read_text())
    made = versioning.save_outputs("sources", "mine")
    versioning.record("sources", "mine", made, {})
    assert not versioning.changed("sources", "mine")
    assert versioning.pull(made) == 0
    assert "hash: md5" in (project / "dvc.lock").read_text().split("path: outputs/mine/sources")[1][:40]


def test_a_stage_belongs_to_its_own_preset_whatever_params_says(project: Path) -> None:
    run(DVC, "repro", "-q", cwd=project)
    (project / "presets" / "mine.yaml").write_text("curation: {a: 3}\n")
    (project / "outputs/mine/sources").mkdir(parents=True)
    (project / "outputs/mine/sources/a").write_text("another preset's\n")
    tiny, mine = (versioning.save_outputs("sources", name)[0] for name in ("tiny", "mine"))
    assert (tiny.path, mine.path) == ("outputs/tiny/sources", "outputs/mine/sources")
    assert tiny.md5 != mine.md5
    assert not versioning.changed("sources", "tiny") and versioning.changed("sources", "mine")
    assert versioning.lineage("sources", "mine") == ([], [])
    run("rm", "-rf", "outputs/mine", cwd=project)
    assert versioning.pull([mine]) == 1
    assert (project / "outputs/mine/sources/a").read_text() == "another preset's\n"
    versioning.record("sources", "mine", [mine], {})
    assert "outputs/mine/sources" in (project / "dvc.lock").read_text()
    assert (project / "params.yaml").read_text() == "preset: tiny\n"


@pytest.mark.parametrize("path", ["outputs/tiny/nothing", "elsewhere/tiny/sources", "outputs/sources"])
def test_a_path_that_no_stage_makes_is_one_clear_error(project: Path, path: str) -> None:
    with pytest.raises(UserError, match=f"'{path}' is no output of a stage"):
        versioning.pull([Lineage("x", path, "0" * 32 + ".dir")])
