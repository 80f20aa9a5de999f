"""`svd gc` on a project with a history, over a real MLflow server, real DVC remotes and git: what is needed stays."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lineage_history import (
    DVC,
    PRESET,
    History,
    X,
    Y,
    client,
    commit,
    make_project,
    register,
    run,
    write_text,
)
from mlflow.exceptions import MlflowException
from servers import S3Server, free_ports, mlflow_server
from typer.testing import CliRunner

from flows.cleaning.collect import DAY, planned
from flows.cleaning.kinds import Thing, stale_work
from flows.cleaning.needed import Needed, hashes_in
from flows.cleaning.store import object_hash, store_files, unneeded
from flows.cli.app import app
from flows.lineage import records
from flows.places import Place
from flows.recording import dvc as versioning
from flows.running.lease import held
from flows.tracking import runs
from flows.tracking.runs import Lineage
from svd import storage
from svd.core.errors import UserError

LONG_AGO = time.time() - 30 * DAY


@pytest.fixture(scope="module")
def mlflow_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("mlflow")
    (port,) = free_ports(1)
    server = mlflow_server(folder, port, str(folder / "artifacts"), {"AWS_ENDPOINT_URL": ""})
    server.start()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@dataclass
class Project:
    """A project whose newest state is recorded in git; some of what it made before is needed, some is not."""

    folder: Path
    store: str
    registered: tuple[str, str]  # hashes of catalogue and latents of the registered model
    tagged: str  # a hash that only the lock of a tag names
    garbage: str  # a hash that nothing names


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, mlflow_url: str) -> Iterator[Project]:
    folder = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", mlflow_url)
        yield tell(folder, patch, str(folder / "store"), "../store/dvc")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: Project, mlflow_url: str) -> Project:
    """A copy of the project and its store, long ago made; MLflow is shared."""
    shutil.copytree(template.folder.parent, tmp_path, symlinks=True, dirs_exist_ok=True)
    make_old(tmp_path)
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_url)
    monkeypatch.setenv("SVD_STORE", str(tmp_path / "store"))
    return replace(template, folder=tmp_path / "project", store=str(tmp_path / "store"))


def tell(folder: Path, patch: pytest.MonkeyPatch, store: str, remote: str) -> Project:
    """Make the project: its DVC remote is the one in the store."""
    (folder / "project").mkdir()
    patch.chdir(folder / "project")
    make_project(folder / "project", remote)
    if store.startswith("s3://"):
        run(DVC, "remote", "modify", "store", "endpointurl", os.environ["AWS_ENDPOINT_URL"])
        commit("endpoint")
    history = History(push=True)
    first = history.data({X: 4, Y: 11})
    history.training("image-pretraining")
    _, garbage = history.stage("video-pretraining", ("latents", "image-pretraining"), lambda f: write_text(f, "bad"))
    history.training("video-pretraining", "image-pretraining")
    register(history.training("image-to-video", "video-pretraining"), "champion")
    history.data({Y: 3})
    commit("for the paper")
    run("git", "tag", "paper")
    tagged = history.known["curation"].md5
    history.data({Y: 12})
    commit("newest")
    storage.upload(Path("dvc.lock"), storage.join(store, PRESET, "dvc.lock"))
    return Project(folder / "project", store, first, tagged, garbage)


def make_old(folder: Path) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (LONG_AGO, LONG_AGO), follow_symlinks=False)


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def gc(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["gc", *arguments], env={"COLUMNS": "200"}, catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def in_cache(md5: str, cache: Path) -> bool:
    return (cache / md5[:2] / md5[2:]).exists()


def doomed(store: str | None, days: float = 7) -> dict[str, list[str]]:
    with planned(days, store, delete=False) as plan:
        return {kind.title: [thing.name for thing in kind.doomed] for kind in plan.kinds}


def pull_everything(project: Project, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into an empty clone: what git's branch and tag record, and the data of the registered model."""
    run("git", "clone", "-q", str(project.folder), str(clone))
    monkeypatch.chdir(clone)
    for revision in ("main", "paper"):
        run("git", "checkout", "-q", revision)
        run(DVC, "pull", "-q")
        assert "in sync" in run(DVC, "status", "-c")
    curation, latents = project.registered
    for name, md5 in (("curation", curation), ("latents", latents)):
        versioning.pull([Lineage(name, str(Place(PRESET, name).output), md5)])
        assert versioning.hash_folder(Place(PRESET, name).output).md5 == md5


def test_what_is_needed_still_pulls_and_the_rest_is_gone(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, stored = project.folder / ".dvc/cache/files/md5", Path(project.store) / "dvc/files/md5"
    before = files(tmp_path)
    said = gc("--verbose")
    assert "can be freed: --delete" in said
    assert {name: size for name, size in files(tmp_path).items() if "/.dvc/tmp/" not in name}.items() <= before.items()
    assert all(in_cache(project.garbage, folder) for folder in (cache, stored))
    said = gc("--delete")
    gone = {name: size for name, size in before.items() if not Path(name).exists() and "/.dvc/tmp/" not in name}
    assert f"{sum(gone.values()):,} bytes freed" in said
    assert not any(in_cache(project.garbage, folder) for folder in (cache, stored))
    assert all(in_cache(md5, cache) for md5 in (*project.registered, project.tagged))
    assert len(gone) == 4  # the bad weights and their folder's list, here and in the store
    assert not any(doomed(project.store).values())
    pull_everything(project, tmp_path / "clone", monkeypatch)


@pytest.mark.slow  # what a store in a folder shows above, on a real S3
def test_a_store_in_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow_url: str, bucket: str) -> None:
    store = f"{bucket}/results"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_url)
    monkeypatch.setattr(runs, "EXPERIMENT", "in-s3")
    monkeypatch.setattr(records, "EXPERIMENT", "in-s3")
    project = tell(tmp_path, monkeypatch, store, f"{store}/dvc")
    found = doomed(project.store, days=0)["the store's objects"]
    assert len(found) == 2 and any(object_hash(name) == project.garbage for name in found)
    assert doomed(project.store)["the store's objects"] == []  # they are young there
    gc("--delete", "--older-than", "0", "--store", project.store)
    assert doomed(project.store, days=0)["the store's objects"] == []
    pull_everything(project, tmp_path / "clone", monkeypatch)


def test_what_is_young_stays(project: Project) -> None:
    os.utime(next(Path(project.store).rglob(project.garbage[2:])))
    assert len(doomed(project.store)["the store's objects"]) == 1
    assert len(doomed(project.store, days=40)["DVC's cache here"]) == 0


def test_a_branch_that_lost_its_stage_still_keeps_what_it_recorded(project: Project) -> None:
    """A lock in a branch keeps everything it names, whatever dvc.yaml has become since."""
    lock = yaml.safe_load((project.folder / "dvc.lock").read_text())
    lock["stages"]["gone"] = {"cmd": "x", "outs": [{"path": "outputs/a", "hash": "md5", "md5": project.garbage}]}
    run("git", "checkout", "-q", "-b", "other")
    (project.folder / "dvc.lock").write_text(yaml.safe_dump(lock))
    commit("other")
    run("git", "checkout", "-q", "main")
    assert doomed(project.store)["the store's objects"] == []


@pytest.mark.parametrize("name", ["dvc", "work", "leases"])
def test_a_preset_may_be_called_as_a_part_of_the_store(project: Project, name: str) -> None:
    lock = yaml.safe_dump({"stages": {"orbits": {"outs": [{"path": "x", "md5": project.garbage}]}}})
    storage.write_bytes(storage.join(project.store, name, "dvc.lock"), lock.encode())
    assert doomed(project.store)["the store's objects"] == []


def test_a_cache_that_other_projects_share_is_left_alone(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.move(project.folder / ".dvc/cache", tmp_path / "shared")
    run(DVC, "cache", "dir", "--local", str(tmp_path / "shared"))
    assert doomed(None)["DVC's cache here"] == []
    assert "others may need what is there" in capsys.readouterr().out
    gc("--delete")
    assert in_cache(project.garbage, tmp_path / "shared/files/md5")


def test_a_stage_that_begins_elsewhere_meanwhile_waits(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may make just what nothing needs so far: the store has that already, so nothing would be sent."""
    monkeypatch.setenv("SVD_LEASE_BEAT", "0.5")
    began = threading.Event()

    def stage() -> None:
        with held(project.store, PRESET, "latents"):
            began.set()

    with planned(7, project.store, delete=True) as plan:
        thread = threading.Thread(target=stage)
        thread.start()
        assert not began.wait(3)
        plan.delete()
    assert began.wait(30)
    thread.join()


def test_who_may_not_delete_is_told_so_in_one_line(
    project: Project, bucket: str, monkeypatch: pytest.MonkeyPatch, s3_server: S3Server
) -> None:
    name = f"dvc/files/md5/ab/{'c' * 30}"
    storage.write_bytes(f"{bucket}/results/{name}", b"x")
    for variable, value in s3_server.environment(reader=True).items():
        monkeypatch.setenv(variable, value)
    with versioning.open_repo() as repo:
        listed = store_files(repo, f"{bucket}/results", time.time())
    assert name in listed.things
    with pytest.raises(UserError, match=r"results can't be cleaned: .*docs/stores\.md has the rights") as refused:
        listed.remove([name])
    assert "\n" not in str(refused.value)


def test_nothing_is_removed_while_something_runs(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = Place(PRESET, "latents").lock
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"from svd.core.files import exclusive\nfrom pathlib import Path\n"
            f"with exclusive(Path({str(lock)!r}), wait=False):\n    print('held', flush=True); input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    try:
        with pytest.raises(UserError, match=rf"while latents of tiny \(process {holder.pid}\) runs"):
            gc("--delete")
    finally:
        holder.communicate(b"\n")
    lease = Path(project.store) / "leases" / PRESET / "latents.json"
    lease.parent.mkdir(parents=True)
    lease.write_text(json.dumps({"token": 1, "owner": "host:1:a", "beat": 1}))
    beating = subprocess.Popen([sys.executable, "-c", BEATING, str(lease)])
    monkeypatch.setenv("SVD_LEASE_BEAT", "0.5")
    try:
        with pytest.raises(UserError, match=r"leases/tiny/latents\.json by host:1:a runs"):
            gc("--delete")
    finally:
        beating.kill()
        beating.wait()
    assert "bytes freed" in gc("--delete")  # its holder is dead
    lease.write_text(json.dumps({"token": 1, "owner": "", "beat": 9}))
    assert "waiting" not in gc("--delete")


BEATING = """
import json, os, sys, time
from pathlib import Path
for beat in range(10**6):
    Path(sys.argv[1] + ".new").write_text(json.dumps({"token": 1, "owner": "host:1:a", "beat": beat}))
    os.replace(sys.argv[1] + ".new", sys.argv[1])
    time.sleep(0.2)
"""


def test_without_mlflow_or_with_a_broken_lock_nothing_goes(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(Path(project.store))
    with monkeypatch.context() as away:
        away.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        with pytest.raises(UserError, match="can't be asked"):
            gc("--delete")
    (project.folder / "dvc.lock").write_text("<<<<<<< HEAD\nstages: {\n")
    with pytest.raises(UserError, match=r"dvc\.lock: not a lock file of DVC"):
        gc("--delete")
    assert {name: size for name, size in files(Path(project.store)).items() if "/leases/" not in name} == before


def test_with_another_mlflow_nothing_goes(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when MLFLOW_TRACKING_URI was forgotten: the embedded default knows no registered model."""
    before = files(Path(project.store))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    with pytest.raises(UserError, match=r"other\.db knows of no run .* set MLFLOW_TRACKING_URI"):
        gc("--delete")
    assert {name: size for name, size in files(Path(project.store)).items() if "/leases/" not in name} == before


def test_an_mlflow_that_goes_away_in_between_is_one_line(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    class Away:
        def list_artifacts(self, path: str | None = None) -> list[str]:
            raise MlflowException("API request to http://u:SECRET@host failed\nTraceback of the server")

    monkeypatch.setattr("flows.cleaning.artifacts.get_artifact_repository", lambda *given: Away())
    with pytest.raises(UserError, match=r"can't be asked: API request to http://host failed$"):
        gc()


def test_a_model_that_was_just_deleted_keeps_its_artifacts(project: Project, tmp_path: Path) -> None:
    (tmp_path / "unet.bin").write_bytes(b"weights")
    experiment = client().get_experiment_by_name(runs.EXPERIMENT).experiment_id
    model = client().create_logged_model(experiment, "deleted by mistake")
    client().log_model_artifacts(model.model_id, str(tmp_path))
    client().delete_logged_model(model.model_id)
    assert doomed(None)["MLflow artifacts"] == []
    note = project.folder / ".dvc/tmp/svd-gone.json"
    seen = json.loads(note.read_text())
    assert list(seen) == [f"models/{model.model_id}"]
    note.write_text(json.dumps({name: when - 8 * DAY for name, when in seen.items()}))
    assert doomed(None)["MLflow artifacts"] == [f"models/{model.model_id}"]


def test_work_caches_and_results_of_lost_presets(project: Project) -> None:
    for name in ("old", "newest"):
        write_text(project.folder / f"work/{PRESET}/latents/{name}", "half")
    for name in ("old", "newest"):
        write_text(project.folder / f"work/lost/latents/{name}", "half")
        write_text(Path(project.store) / f"work/{PRESET}/curation/{name}", "half")
    write_text(project.folder / "work/tracking/some-run", "waits for MLflow")
    write_text(project.folder / ".cache/s3/bucket", "copy")
    write_text(project.folder / "outputs/lost/orbits", "result")
    write_text(project.folder / "outputs/mine/curation", "of svd curate --name mine")
    (project.folder / "presets/lost.yaml").write_text("name: lost\n")
    commit("a preset")
    (project.folder / "presets/lost.yaml").unlink()
    commit("no more")
    make_old(project.folder)
    make_old(Path(project.store))
    for folder in (
        project.folder / f"work/{PRESET}/latents/newest",
        Path(project.store) / f"work/{PRESET}/curation/newest",
    ):
        for path in folder.rglob("*"):
            os.utime(path, (LONG_AGO + DAY, LONG_AGO + DAY))
    found = doomed(project.store)
    assert found["work in progress here"] == [
        "work/lost/latents/newest",
        "work/lost/latents/old",
        f"work/{PRESET}/latents/old",
    ]
    assert found["work in progress in the store"] == [f"work/{PRESET}/curation/old"]
    assert found["copies in .cache/"] == [".cache/s3/bucket/data.txt"]
    assert found["results in outputs/"] == ["outputs/lost/orbits"]
    gc("--delete")
    assert (project.folder / "work/tracking/some-run/data.txt").exists()
    assert (project.folder / "outputs/mine/curation/data.txt").exists()
    assert (project.folder / f"work/{PRESET}/latents/newest/data.txt").exists()
    assert not (project.folder / "outputs/lost/orbits").exists()
    assert not (Path(project.store) / f"work/{PRESET}/curation/old/data.txt").exists()


def test_outputs_that_wait_to_be_recorded_stay(project: Project) -> None:
    """Here (delivered.json of a killed pipeline) and in the store (the snapshot of a stage that has pushed)."""
    write_text(project.folder / f"work/{PRESET}/latents/abc", "work")
    delivered = project.folder / f"work/{PRESET}/latents/abc/delivered.json"
    delivered.write_text(json.dumps({"path": "outputs/tiny/latents", "md5": project.garbage}))
    assert doomed(project.store)["the store's objects"] == []
    delivered.unlink()
    assert len(doomed(project.store)["the store's objects"]) == 2
    manifest = Path(project.store) / f"work/{PRESET}/latents/abc/manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"files": {}, "run_key": "", "output": project.garbage}))
    assert doomed(project.store)["the store's objects"] == []


def test_artifacts_of_deleted_runs_and_models_go_registered_ones_stay(project: Project, tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"x" * 1000)
    known = records.Records()
    (champion,) = [model for model in known.models if model.run_id in known.runs]
    experiment = client().get_experiment_by_name(runs.EXPERIMENT).experiment_id
    found = client().search_runs([experiment], "tags.stage = 'video-pretraining'")
    behind, other = found[0].info.run_id, found[1].info.run_id  # the champion started from the newer one
    for run_id in (other, behind, champion.run_id):
        client().log_artifact(run_id, str(tmp_path / "clip.mp4"), "samples")
        client().delete_run(run_id)
    before = [len(client().list_artifacts(run_id)) for run_id in (behind, champion.run_id)]
    assert doomed(None)["MLflow artifacts"] == []
    # A model that another test here has deleted may be among them.
    assert [name for name in doomed(None, days=0)["MLflow artifacts"] if not name.startswith("models/")] == [other]
    gc("--delete", "--older-than", "0")
    assert client().list_artifacts(other) == []
    assert [len(client().list_artifacts(run_id)) for run_id in (behind, champion.run_id)] == before


md5s = st.text("0123456789abcdef", min_size=32, max_size=32).flatmap(lambda t: st.sampled_from([t, f"{t}.dir"]))


class Listed:
    """Files of a store as a listing gives them."""

    def __init__(self, things: list[Thing]) -> None:
        self.things = {thing.name: thing for thing in things}


@given(st.lists(st.tuples(md5s, st.booleans(), st.floats(0, 100)), unique_by=lambda item: item[0]), st.floats(0, 50))
def test_no_needed_and_no_young_object_goes(objects: list[tuple[str, bool, float]], old: float) -> None:
    things = {md5: Thing(f"dvc/files/md5/{md5[:2]}/{md5[2:]}", 1, age) for md5, _, age in objects}
    needed = Needed(frozenset(md5 for md5, wanted, _ in objects if wanted), frozenset())
    others = [Thing("dvc/files/md5/no/hash", 1, 99), Thing("tiny/dvc.lock", 1, 99)]
    kind = unneeded("x", Listed([*things.values(), *others]), ("dvc", "files", "md5"), needed, old)  # type: ignore[arg-type]
    gone = {object_hash(thing.name) for thing in kind.doomed}
    assert gone == {md5 for md5, wanted, age in objects if not wanted and age > old}
    assert len(kind.doomed) + len(kind.kept) == len(objects)


entries = st.recursive(
    st.dictionaries(st.sampled_from(["path", "hash"]), st.text(max_size=5)),
    lambda inner: st.dictionaries(st.sampled_from(["outs", "deps", "stages"]), inner | st.lists(inner, max_size=3)),
    max_leaves=8,
)


@given(entries, st.lists(md5s, max_size=4), st.data())
def test_every_hash_in_a_lock_counts_wherever_it_stands(tree: object, hashes: list[str], data: st.DataObject) -> None:
    for md5 in hashes:
        places = list(dicts(tree))
        data.draw(st.sampled_from(places)).setdefault(f"x{len(places)}", []).append({"md5": md5})
    assert sorted(hashes_in(yaml.safe_dump(tree), "x")) == sorted(hashes)


def dicts(value: object) -> Iterator[dict[str, list[object]]]:
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from dicts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from dicts(inner)


@given(st.dictionaries(st.sampled_from(["latents", "orbits"]), st.lists(st.floats(0, 100), min_size=1, max_size=5)))
def test_the_newest_work_of_a_stage_always_stays(ages: dict[str, list[float]]) -> None:
    works = {("tiny", s): [Thing(f"{s}/{n}", 1, age) for n, age in enumerate(some)] for s, some in ages.items()}
    goes = stale_work(works, set(), 10)
    for things in works.values():
        kept = [thing for thing in things if not goes(thing)]
        assert min(thing.age for thing in things) in {thing.age for thing in kept}
        assert all(goes(thing) for thing in things if thing not in kept) and all(
            t in kept for t in things if t.age <= 10
        )
