"""Results in a store: only what differs travels, nothing half is ever read, every stage runs on it."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from PIL import Image
from project_folder import give_presets
from typer.testing import CliRunner

from evaluation.report.page import run as run_report
from flows.cli.app import app
from flows.places import Place
from flows.prefect_flows.full_pipeline import PipelineRun
from flows.recording import dvc as versioning
from flows.recording import results_store as store
from flows.running import runner
from flows.stages import find_stage
from flows.tracking.runs import Lineage
from svd import storage
from svd.config.load import load_preset
from svd.core.errors import UserError
from svd.core.files import write_json
from svd.core.retries import Unreachable
from svd.stage import Report, StageContext, publish


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store in S3, and one in a shared folder."""
    if request.param == "local":
        return str(tmp_path / "store")
    return f"{request.getfixturevalue('bucket')}/results"


def fill(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_only_what_differs_travels(root: str, tmp_path: Path) -> None:
    made = fill(tmp_path / "made", a="1", **{"sub/b": "22", "sub/c": "333"})
    uri = storage.join(root, "tiny", "stage")
    assert store.publish_folder(made, uri) == 6
    assert store.publish_folder(made, uri) == 0
    assert store.fetch_folder(uri, tmp_path / "got") == 6
    assert contents(tmp_path / "got") == contents(made)
    fill(made, a="4444").joinpath("sub/c").unlink()
    assert store.publish_folder(made, uri) == 4
    fill(tmp_path / "got", stray="x")
    assert store.fetch_folder(uri, tmp_path / "got") == 4
    assert contents(tmp_path / "got") == {"a": "4444", "sub/b": "22"}
    assert store.fetch_folder(uri, tmp_path / "got") == 0
    assert {e.relative for e in storage.list_files(uri)} == {"a", "sub/b", store.MANIFEST}


def test_a_killed_publish_is_never_read_and_goes_on(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = storage.join(root, "stage")
    store.publish_folder(fill(tmp_path / "made", a="old", b="old"), uri)
    fill(tmp_path / "made", a="new1", b="new2")
    real, sent = storage.upload, []

    def killed_at_second(path: Path, location: str) -> None:
        sent.append(location)
        if len(sent) == 2:
            raise KeyboardInterrupt
        real(path, location)

    monkeypatch.setattr(storage, "upload", killed_at_second)
    with pytest.raises(KeyboardInterrupt):
        store.publish_folder(tmp_path / "made", uri)
    with pytest.raises(UserError, match="nothing whole is stored there"):
        store.fetch_folder(uri, tmp_path / "got")
    assert not (tmp_path / "got").exists()
    assert store.publish_folder(tmp_path / "made", uri) == 4
    store.fetch_folder(uri, tmp_path / "got")
    assert contents(tmp_path / "got") == {"a": "new1", "b": "new2"}


def test_a_fetch_of_something_else_keeps_the_old_folder(root: str, tmp_path: Path) -> None:
    uri = storage.join(root, "stage")
    store.publish_folder(fill(tmp_path / "made", a="1", b="2"), uri)
    storage.write_bytes(storage.join(uri, "b"), b"tampered")
    fill(tmp_path / "got", a="0")
    with pytest.raises(storage.Truncated, match="not the file of"):
        store.fetch_folder(uri, tmp_path / "got")
    assert contents(tmp_path / "got") == {"a": "0"}


def test_two_runs_that_publish_at_once_leave_one_whole_result(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = storage.join(root, "stage")
    first, second = fill(tmp_path / "1", a="one", b="one"), fill(tmp_path / "2", a="two", b="two")
    real, sent = storage.upload, []

    def joined_after_the_first_file(path: Path, location: str) -> None:
        real(path, location)
        sent.append(location)
        if len(sent) == 1:
            store.publish_folder(second, uri)

    monkeypatch.setattr(storage, "upload", joined_after_the_first_file)
    store.publish_folder(first, uri)
    store.fetch_folder(uri, tmp_path / "got")
    assert contents(tmp_path / "got") == contents(first)


def test_a_run_that_keeps_publishing_there_is_told_of(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = storage.join(root, "stage")
    folder = fill(tmp_path / "1", a="one", b="one")
    real = storage.write_bytes

    def spoilt(location: str, data: bytes) -> None:
        real(location, data)
        real(storage.join(uri, "a"), b"two")

    monkeypatch.setattr(storage, "write_bytes", spoilt)
    with pytest.raises(Unreachable, match="another run publishes there"):
        store.publish_folder(folder, uri)
    with pytest.raises(UserError, match="nothing whole is stored there"):
        store.fetch_folder(uri, tmp_path / "got")


def test_a_fetch_that_meets_a_publish_brings_the_new_result(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = storage.join(root, "stage")
    store.publish_folder(fill(tmp_path / "old", a="old", b="old", c="old"), uri)
    fill(tmp_path / "new", a="new", b="new")
    real, asked = storage.download, []

    def published_after_the_first_file(location: str, path: Path) -> Path:
        real(location, path)
        asked.append(location)
        if len(asked) == 1:
            store.publish_folder(tmp_path / "new", uri)
        return path

    monkeypatch.setattr(storage, "download", published_after_the_first_file)
    store.fetch_folder(uri, tmp_path / "got")
    assert contents(tmp_path / "got") == {"a": "new", "b": "new"}


def test_of_two_that_want_a_folder_one_fetches(root: str, tmp_path: Path) -> None:
    uri = storage.join(root, "stage")
    store.publish_folder(fill(tmp_path / "made", **{name: "0123456789" for name in "abcdefgh"}), uri)
    with ThreadPoolExecutor(2) as pool:
        moved = list(pool.map(lambda _: store.fetch_folder(uri, tmp_path / "got"), range(2)))
    assert sorted(moved) == [0, 80]


def test_a_local_copy_follows_what_is_stored(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ("first", "other"):  # of equal size, as a retrained checkpoint
        for name in ("model.safetensors", "folder/a", "folder/b"):
            storage.write_bytes(f"{bucket}/{name}", text.encode())
        assert store.local_copy(f"{bucket}/model.safetensors").read_text() == text
        assert contents(store.local_copy(f"{bucket}/folder")) == {"a": text, "b": text}
    monkeypatch.setattr(storage, "download", None)  # nothing is fetched twice
    assert store.local_copy(f"{bucket}/folder").is_dir() and store.local_copy(f"{bucket}/model.safetensors").is_file()


def make_outputs(context: StageContext) -> Report:
    """A stage that notes what it read."""
    finished = context.work / "finished"
    read = {name: sorted(contents(path)) for name, path in context.inputs.items()}
    fill(finished, note=json.dumps({"read": read, "meshes": context.preset.orbits.meshes}))
    return publish(finished, context.output, Report({"inputs": len(read)}, "done"))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty machine: no outputs, no git."""
    import subprocess
    import sys

    folder = tmp_path / "machine"
    folder.mkdir()
    monkeypatch.chdir(give_presets(folder))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    dvc = Path(sys.executable).parent / "dvc"
    subprocess.run([dvc, "init", "-q", "--no-scm"], check=True)
    return folder


def test_a_stage_runs_with_inputs_and_output_in_s3(
    project: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = load_preset("tiny", {"orbits.meshes": [f"{bucket}/meshes"]})
    storage.write_bytes(f"{bucket}/meshes/ball.obj", b"v 0 0 0")
    for name in ("sources", "encoders"):
        store.publish_folder(fill(tmp_path / name, a="1"), f"{bucket}/results/tiny/{name}")
    fill(project / "outputs/tiny/sources", a="another version")
    monkeypatch.setattr(type(find_stage("curation")), "load", lambda self: make_outputs)
    monkeypatch.setenv("SVD_STORE", f"{bucket}/results")
    runner.run_preset_stage("curation", preset)
    assert contents(project / "outputs/tiny/sources") == {"a": "1"}
    assert store.fetch_folder(f"{bucket}/results/tiny/curation", tmp_path / "elsewhere") > 0
    note = json.loads((tmp_path / "elsewhere/note").read_text())
    assert note["read"] == {"sources": ["a"], "encoders": ["a"]}
    runner.run_preset_stage("orbits", preset)
    note = json.loads((project / "outputs/tiny/orbits/note").read_text())
    assert [Path(p).name for p in note["meshes"]] == ["meshes"]
    assert (project / note["meshes"][0] / "ball.obj").read_bytes() == b"v 0 0 0"


def test_what_the_store_holds_is_not_brought_here(
    project: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pulled: list[str] = []

    def pull(items: list[Lineage]) -> None:
        pulled.extend(item.md5 for item in items)
        fill(project / "outputs/tiny/orbits", a="2")

    monkeypatch.setattr(versioning, "pull", pull)
    uri = f"{bucket}/results/tiny/orbits"
    store.publish_folder(fill(tmp_path / "elsewhere", a="1"), uri, "1.dir")
    run = PipelineRun(load_preset("tiny"), None, "key", f"{bucket}/results")  # type: ignore[arg-type]
    run._keep_in_store("orbits", Lineage("orbits", "outputs/tiny/orbits", "1.dir"))
    assert pulled == [] and not (project / "outputs").exists()
    run._keep_in_store("orbits", Lineage("orbits", "outputs/tiny/orbits", "2.dir"))
    assert pulled == ["2.dir"] and store.stored_version(uri) == "2.dir"
    store.fetch_folder(uri, tmp_path / "got")
    assert contents(tmp_path / "got") == {"a": "2"}


def test_a_missing_address_in_the_preset_is_named(project: Path, bucket: str) -> None:
    preset = load_preset("tiny", {"orbits.meshes": [f"{bucket}/nothing"]})
    with pytest.raises(UserError, match=f"{bucket}/nothing: no such object or folder"):
        runner.run_preset_stage("orbits", preset)


def test_a_second_process_is_refused(project: Path) -> None:
    stage, preset = find_stage("orbits"), load_preset("tiny")
    place = Place(preset.name, stage.name)
    with (
        runner.only_one(place),
        pytest.raises(UserError, match=f"is being run by process {os.getpid()}"),
        runner.only_one(place),
    ):
        raise AssertionError("two at once")
    with runner.only_one(place):
        assert (project / "work/tiny/.orbits.lock").read_text() == str(os.getpid())


def test_the_report_opens_from_s3(project: Path, bucket: str, tmp_path: Path) -> None:
    preset = load_preset("tiny")
    curation = fill(tmp_path / "curation", note="1")
    (curation / "plots").mkdir()
    Image.new("RGB", (40, 30), "red").save(curation / "plots" / "funnel.png")
    write_json(curation / "metrics.json", {"kept": 3})
    context = StageContext(preset, {"curation": curation}, project / "outputs/tiny/report", tmp_path / "work")
    context.work.mkdir()
    run_report(context)
    store.publish_folder(context.output, f"{bucket}/tiny/report")
    said = CliRunner().invoke(app, ["report", "--preset", "tiny", "--store", bucket])
    answer = httpx.get(said.output.strip()).raise_for_status()
    assert answer.headers["content-type"].startswith("text/html")
    page = answer.content.decode()
    assert page == (context.output / "report.html").read_text()
    assert page.rstrip().endswith("</html>")
    for attribute in ('src="', "url("):
        targets = [part.split('"')[0].split(")")[0] for part in page.split(attribute)[1:]]
        assert all(t.strip("'\"").startswith(("data:", "#")) for t in targets), f"{attribute} leaves the page"


def test_a_fresh_machine_takes_over_what_is_unchanged(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "fresh", "other"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(fill(tmp_path / "first", **{"dvc.lock": "1", "branches/dvc.lock": "2"}))
    store.keep_locks(root, "tiny")
    monkeypatch.chdir(tmp_path / "fresh")
    store.fetch_locks(root, "tiny")
    assert contents(Path()) == {"dvc.lock": "1", "branches/dvc.lock": "2"}
    monkeypatch.chdir(fill(tmp_path / "other", **{"dvc.lock": "its own"}))
    store.fetch_locks(root, "tiny")
    assert contents(Path()) == {"dvc.lock": "its own"}
    store.fetch_locks(root, "another preset")
    assert contents(Path()) == {"dvc.lock": "its own"}
