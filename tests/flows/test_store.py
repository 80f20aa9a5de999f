"""Results in a store: every version by hash, the newest named by a pointer, an empty machine needs nothing else."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml
from PIL import Image
from project_folder import give_presets
from servers import S3Server
from typer.testing import CliRunner

from evaluation.report.page import run as run_report
from flows.cli.app import app
from flows.places import Place
from flows.prefect_flows.full_pipeline import PipelineRun, locks_kept_with
from flows.prefect_flows.nightly import EVALUATED, EVALUATION, require_judged
from flows.recording import dvc as versioning
from flows.recording import results_store as store
from flows.recording.local_copies import local_copy
from flows.recording.results_store import Fence, LeaseLost
from flows.running import runner
from flows.running.inputs import bring_inputs
from flows.running.lease import held
from flows.stages import STAGES, find_stage
from flows.tracking.journal import Journal
from flows.tracking.runs import Lineage, MlflowTracker
from svd import storage
from svd.config.load import load_preset
from svd.core.errors import UserError
from svd.core.files import write_json
from svd.core.retries import Unreachable
from svd.stage import STREAMED, Report, StageContext, publish

DVC = Path(sys.executable).parent / "dvc"
FENCE = Fence("pipeline", 1)


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


def new_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make `folder` the project on an empty machine, without git and with its own DVC cache."""
    folder.mkdir()
    monkeypatch.chdir(give_presets(folder))
    for name in ("MLFLOW_TRACKING_URI", "SVD_STORE"):
        monkeypatch.delenv(name, raising=False)
    subprocess.run([DVC, "init", "-q", "--no-scm"], check=True)
    stages = {
        name: {"cmd": name, "deps": [str(path) for path in Place("${preset}", name).inputs.values()]}
        | {"outs": [f"outputs/${{preset}}/{name}"]}
        for name in STAGES
    }
    Path("dvc.yaml").write_text(yaml.safe_dump({"vars": ["params.yaml"], "stages": stages}))
    Path("params.yaml").write_text("preset: tiny\n")
    return folder


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty machine: no outputs, no git."""
    return new_machine(tmp_path / "machine", monkeypatch)


def made(stage: str, **files: str) -> Lineage:
    """The output of a stage with these files, in DVC's cache."""
    folder = Place("tiny", stage).output
    shutil.rmtree(folder, ignore_errors=True)
    fill(folder, **files)
    (output,) = versioning.save_outputs(stage, "tiny")
    return output


def publish_output(root: str, stage: str, **files: str) -> Lineage:
    """Push an output and point the store at it."""
    output = made(stage, **files)
    versioning.push([output], root)
    versioning.record(stage, "tiny", [output], {str(path): output for path in Place("tiny", stage).inputs.values()})
    store.keep_entry(root, "tiny", stage, FENCE)
    return output


def test_every_version_stays_and_only_what_is_missing_travels(
    project: Path, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = made("sources", a="1", **{"sub/b": "22"})
    assert versioning.push([first], root) == 3 and versioning.push([first], root) == 0
    second = made("sources", a="other", **{"sub/b": "22"})
    assert versioning.push([second], root) == 2
    assert "svd-store" not in (project / ".dvc/config").read_text()
    assert not (project / ".dvc/config.local").exists()
    new_machine(tmp_path / "empty", monkeypatch)
    for output, text in ((first, "1"), (second, "other")):
        assert versioning.pull([output], root) == 1
        assert contents(Path(output.path)) == {"a": text, "sub/b": "22"}


def test_the_users_own_remote_stays_his(project: Path, root: str, tmp_path: Path) -> None:
    subprocess.run([DVC, "remote", "add", "-d", "mine", str(tmp_path / "mine")], check=True, capture_output=True)
    before = (project / ".dvc/config").read_text()
    versioning.push([made("sources", a="1")], root)
    assert (project / ".dvc/config").read_text() == before and not (tmp_path / "mine").exists()


def test_a_killed_push_goes_on(project: Path, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"{number:04}": f"file {number} " * 20_000 for number in range(120)}
    output = made("sources", **files)
    code = f"from flows.recording import dvc; from flows.tracking.runs import Lineage; dvc.push([{output}], {root!r})"
    push = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(storage.list_files(f"{root}/dvc"))) < 5:
        assert push.poll() is None
        time.sleep(0.01)
    push.kill()
    push.wait()
    there = len([e for e in storage.list_files(f"{root}/dvc") if not Path(e.location).name.startswith(".")])
    assert not storage.exists(versioning.stored_object(root, output.md5)), "killed too late"
    sent = versioning.push([output], root)
    assert there >= 5 and sent <= 121 - there + 20  # a file that was on its way is sent again
    new_machine(tmp_path / "empty", monkeypatch)
    assert versioning.pull([output], root) == 1 and contents(Path(output.path)) == files


def test_what_is_damaged_or_missing_there_is_one_line(
    project: Path, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = made("sources", a="1" * 1000, b="2")
    versioning.push([output], root)
    (big,) = [e for e in storage.list_files(f"{root}/dvc") if e.size == 1000]
    new_machine(tmp_path / "empty", monkeypatch)
    storage.delete(big.location)
    storage.write_bytes(big.location, b"x" * 1000)
    with pytest.raises(UserError, match=r"outputs/tiny/sources at \w+.dir is damaged in .*; delete") as damaged:
        versioning.pull([output], root)
    storage.delete(big.location)
    with pytest.raises(UserError, match="DVC can't pull outputs/") as missing:
        versioning.pull([output], root)
    assert "\n" not in f"{damaged.value}{missing.value}" and not Path(output.path).exists()
    nowhere = Lineage("sources", "outputs/tiny/sources", "0" * 32 + ".dir", 1, 1)
    with pytest.raises(UserError, match="neither on this machine nor in the DVC remote"):
        versioning.pull([nowhere], root)


def forget_in_cache(text: str) -> None:
    """Remove the object with this content from DVC's cache here."""
    (found,) = [p for p in Path(".dvc/cache/files/md5").rglob("*") if p.is_file() and p.read_text() == text]
    found.unlink()


def test_a_push_never_reports_success_for_what_did_not_arrive(
    project: Path, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DVC leaves out what its cache lost, and says so in its log alone."""
    output = made("sources", a="1" * 1000, b="2")
    forget_in_cache("1" * 1000)
    shutil.move(output.path, tmp_path / "aside")
    with pytest.raises(UserError, match=r"outputs/tiny/sources at \w+.dir: 1 of its files .* in DVC's cache"):
        versioning.push([output], root)
    assert not storage.exists(versioning.stored_object(root, output.md5))
    shutil.move(tmp_path / "aside", output.path)  # the folder itself is what it should be
    versioning.push([output], root)
    new_machine(tmp_path / "empty", monkeypatch)
    assert versioning.pull([output], root) == 1
    assert contents(Path(output.path)) == {"a": "1" * 1000, "b": "2"}


def test_the_advice_about_damage_mends_it(
    project: Path, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = made("sources", a="1" * 1000, b="2")
    versioning.push([output], root)
    (big,) = [e for e in storage.list_files(f"{root}/dvc") if e.size == 1000]
    storage.delete(big.location)
    storage.write_bytes(big.location, b"x" * 1000)
    empty = new_machine(tmp_path / "empty", monkeypatch)
    with pytest.raises(UserError, match=r"is damaged in .*; delete .* and push it again") as damaged:
        versioning.pull([output], root)
    for word in str(damaged.value).replace(";", " ").replace(",", " ").split():
        if "/dvc/files/md5/" in word:
            storage.delete(word)
    monkeypatch.chdir(project)
    versioning.push([output], root)
    monkeypatch.chdir(empty)
    assert versioning.pull([output], root) == 1 and contents(Path(output.path))["a"] == "1" * 1000


def test_a_store_that_refuses_is_one_line(
    project: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, s3_server: S3Server
) -> None:
    output = made("sources", a="1")
    with pytest.raises(UserError, match="no such bucket"):
        versioning.push([output], "s3://not-there/results")
    for name, value in s3_server.environment(reader=True).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"DVC can't push to .* did not arrive: Access Denied"):
        versioning.push([output], f"{bucket}/results")


def test_a_store_that_hangs_is_given_up(
    project: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, s3_server: S3Server, impatient: None
) -> None:
    output = made("sources", a="1")
    monkeypatch.setitem(versioning.TIMEOUTS, "read_timeout", 1)
    ask = storage.exists

    def then_hang(location: str) -> bool:
        found = ask(location)
        s3_server.kill(signal.SIGSTOP)
        monkeypatch.setattr(storage, "exists", lambda location: False)
        return found

    monkeypatch.setattr(storage, "exists", then_hang)
    began = time.monotonic()
    try:
        with pytest.raises(Unreachable, match="DVC can't push to"):
            versioning.push([output], bucket)
    finally:
        s3_server.kill(signal.SIGCONT)
    assert time.monotonic() - began < 90


def test_a_local_copy_follows_what_is_stored(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ("first", "other"):  # of equal size, as a retrained checkpoint
        for name in ("model.safetensors", "folder/a", "folder/b"):
            storage.write_bytes(f"{bucket}/{name}", text.encode())
        assert local_copy(f"{bucket}/model.safetensors").read_text() == text
        assert contents(local_copy(f"{bucket}/folder")) == {"a": text, "b": text}
    monkeypatch.setattr(storage, "download", None)  # nothing is fetched twice
    assert local_copy(f"{bucket}/folder").is_dir() and local_copy(f"{bucket}/model.safetensors").is_file()


def make_outputs(context: StageContext) -> Report:
    """A stage that notes what it read."""
    finished = context.work / "finished"
    read = {name: sorted(contents(path)) for name, path in context.inputs.items()}
    fill(finished, note=json.dumps({"read": read, "meshes": context.preset.orbits.meshes}))
    return publish(finished, context.output, Report({"inputs": len(read)}, "done"))


def test_a_stage_runs_with_inputs_and_output_in_s3(
    project: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset, root = load_preset("tiny", {"orbits.meshes": [f"{bucket}/meshes"]}), f"{bucket}/results"
    storage.write_bytes(f"{bucket}/meshes/ball.obj", b"v 0 0 0")
    for name in ("sources", "encoders"):
        publish_output(root, name, a="1")
    monkeypatch.setattr(type(find_stage("curation")), "load", lambda self: make_outputs)
    machine = new_machine(tmp_path / "other", monkeypatch)
    fill(machine / "outputs/tiny/sources", a="another version")
    monkeypatch.setenv("SVD_STORE", root)
    runner.run_preset_stage("curation", preset)
    assert contents(machine / "outputs/tiny/sources") == {"a": "1"}
    assert not list(machine.glob("work/tiny/curation/*")) and not list(storage.list_files(f"{root}/work"))
    note = json.loads(storage.read_bytes(store.stored_file(root, "tiny", "curation", "note")))
    assert note["read"] == {"sources": ["a"], "encoders": ["a"]}
    runner.run_preset_stage("orbits", preset)
    note = json.loads((machine / "outputs/tiny/orbits/note").read_text())
    assert [Path(p).name for p in note["meshes"]] == ["meshes"]
    assert (machine / note["meshes"][0] / "ball.obj").read_bytes() == b"v 0 0 0"


def test_a_stage_that_reads_part_of_an_input_brings_only_that(
    project: Path, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, preset = find_stage("ucf101-evaluation"), load_preset("tiny")
    files = {"metrics.json": "{}", "ucf101_fixture/a/1.mp4": "clip", "synthetic/huge.mp4": "video"}
    sources = publish_output(root, "sources", **files)
    for name in stage.inputs[1:]:
        publish_output(root, name, a="1")
    monkeypatch.setattr(type(stage), "load", lambda self: make_outputs)
    machine = new_machine(tmp_path / "other", monkeypatch)
    for folder in ("first", "again"):
        runner.run_preset_stage(stage.name, preset, store_option=root)
        note = json.loads((machine / "outputs/tiny/ucf101-evaluation/note").read_text())
        assert note["read"]["sources"] == ["metrics.json", "ucf101_fixture/a/1.mp4"], folder
    assert not (machine / "outputs/tiny/sources").exists()
    assert not [p for p in machine.rglob("*") if p.is_file() and p.read_bytes() == b"video"]
    read, _ = versioning.lineage(stage.name, "tiny")
    assert {item.path: item.md5 for item in read}[sources.path] == sources.md5
    assert versioning.pull([sources], root) == 1 and contents(Path(sources.path)) == files


def test_a_training_leaves_in_the_store_what_it_streams(
    project: Path, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, preset = find_stage("video-pretraining"), load_preset("tiny")
    brought = {"metrics.json": "{}", "index.parquet": "index"}
    item = publish_output(root, "latents", **brought, **{"shards/4x16x16-ab.safetensors": "samples"})
    folder = Path(item.path)
    digest = runner.work_digest(stage, preset, {"latents": folder})
    new_machine(tmp_path / "other", monkeypatch)
    for _ in range(2):
        part = bring_inputs(stage, "tiny", [item], root, stream=True)["latents"]
        found = contents(part.folder)
        ((name, location),) = json.loads(found.pop(STREAMED)).items()
        assert (name, found, part.whole) == ("shards/4x16x16-ab.safetensors", brought, item)
        assert storage.read_bytes(location) == b"samples" and not folder.exists()
    assert runner.work_digest(stage, preset, {"latents": part.folder}) == digest
    assert bring_inputs(stage, "tiny", [item], root) == {} and (folder / name).read_text() == "samples"
    assert bring_inputs(stage, "tiny", [item], root, stream=True) == {}, "what is here is read here"


@pytest.mark.parametrize("content", ["other", None])
def test_a_part_that_was_damaged_here_is_brought_again(
    content: str | None, project: Path, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, preset = find_stage("ucf101-evaluation"), load_preset("tiny")
    files = {"metrics.json": "{}", "ucf101_fixture/a/1.mp4": "clip"}
    item = publish_output(root, "sources", **files)
    new_machine(tmp_path / "other", monkeypatch)
    part = bring_inputs(stage, preset.name, [item], root)["sources"].folder
    (part / "metrics.json").unlink()
    if content is not None:
        (part / "metrics.json").write_text(content)
    again = bring_inputs(stage, preset.name, [item], root)["sources"].folder
    assert again == part and contents(part) == files


def test_a_damaged_file_of_a_part_is_named(
    project: Path, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = find_stage("ucf101-evaluation")
    for name in stage.inputs:
        publish_output(root, name, **{"metrics.json": f'"{name}"'})
    damaged = store.stored_file(root, "tiny", "sources", "metrics.json")
    if not storage.is_remote(root):
        os.chmod(damaged, 0o644)
    storage.write_bytes(damaged, b"other")
    machine = new_machine(tmp_path / "other", monkeypatch)
    with pytest.raises(UserError, match=r"is damaged; delete it there"):
        runner.run_preset_stage(stage.name, load_preset("tiny"), store_option=root)
    assert not list(machine.rglob(".cache/parts/*/*/metrics.json"))


@pytest.mark.parametrize(
    ("name", "relative", "read"),
    [
        ("curation", "plots/motion.png", True),
        ("curation", "contact/kept.jpg", True),
        ("high-quality-finetuning", "samples/clip-1.mp4", True),
        ("high-quality-finetuning", "unet/diffusion_pytorch_model.safetensors", False),
        ("curation", "shards/00000.tar", False),
        ("latents", "8x64x96/00000.safetensors", False),
        ("sources", "synthetic/train/000.mp4", False),
    ],
)
def test_the_report_brings_what_it_shows(name: str, relative: str, read: bool) -> None:
    assert find_stage("report").reads_file(name, relative) is read
    assert find_stage("latents").reads_file("curation", relative)


def test_a_push_that_fails_loses_and_repeats_no_work(
    project: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def once(context: StageContext) -> Report:
        calls.append(1)
        return make_outputs(context)

    def away(items: list[Lineage], root: str | None = None) -> int:
        raise Unreachable(f"{root}: does not answer")

    monkeypatch.setattr(type(find_stage("orbits")), "load", lambda self: once)
    with monkeypatch.context() as broken, pytest.raises(Unreachable):
        broken.setattr(versioning, "push", away)
        runner.run_preset_stage("orbits", load_preset("tiny"), store_option=bucket)
    assert store.stored_output(bucket, "tiny", "orbits") is None
    runner.run_preset_stage("orbits", load_preset("tiny"), store_option=bucket)
    assert calls == [1] and store.stored_output(bucket, "tiny", "orbits") is not None


def test_a_stage_that_was_pushed_and_not_recorded_comes_from_the_store_and_once_only(
    project: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def count(context: StageContext) -> Report:
        calls.append(1)
        return make_outputs(context)

    monkeypatch.setattr(type(find_stage("orbits")), "load", lambda self: count)
    preset = load_preset("tiny")
    first = runner.run_preset_stage("orbits", preset, store_option=bucket, keep=True)
    new_machine(tmp_path / "second", monkeypatch)  # the parent died before it recorded the output
    assert runner.run_preset_stage("orbits", preset, store_option=bucket, keep=True) == first and calls == [1]
    assert (tmp_path / "second/outputs/tiny/orbits/note").is_file()
    (output,) = versioning.save_outputs("orbits", "tiny")
    versioning.record("orbits", "tiny", [output], {})
    store.keep_entry(bucket, "tiny", "orbits", FENCE)
    new_machine(tmp_path / "third", monkeypatch)  # asked for again after it was recorded
    runner.run_preset_stage("orbits", preset, store_option=bucket, keep=True)
    assert calls == [1, 1]


def test_pull_brings_a_clone_what_the_store_names(
    project: Path, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = publish_output(root, "sources", a="1")
    publish_output(root, "encoders", a="1")
    new_machine(tmp_path / "clone", monkeypatch)
    said = CliRunner().invoke(app, ["pull", "sources", "--preset", "tiny", "--store", root])
    assert said.exit_code == 0, said.output
    assert contents(Path("outputs")) == {"tiny/sources/a": "1"}
    assert versioning.lineage("sources", "tiny")[1] == [output] and not versioning.lineage("encoders", "tiny")[1]
    assert CliRunner().invoke(app, ["pull", "--store", root]).exit_code == 0
    assert Path("outputs/tiny/encoders/a").is_file()
    nothing = CliRunner().invoke(app, ["pull", "orbits", "--store", root])
    assert isinstance(nothing.exception, UserError)


def test_results_that_were_never_recorded_are_not_overwritten(
    project: Path, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = publish_output(root, "orbits", weights="in the store")
    other = new_machine(tmp_path / "other", monkeypatch)
    folder = fill(other / first.path, weights="days of `svd stage` without a store")
    assert versioning.pull([first], root) == 1
    assert contents(folder) == {"weights": "in the store"}
    (aside,) = folder.parent.glob("orbits.*")
    assert contents(aside) == {"weights": "days of `svd stage` without a store"}
    second = made("orbits", weights="recorded")
    assert versioning.pull([first], root) == 1 and versioning.pull([second], root) == 1
    assert len(list(folder.parent.glob("orbits.*"))) == 1


def test_a_candidate_is_judged_by_its_own_evaluation(project: Path) -> None:
    folders = {stage: Place("tiny", stage).output for stage in (EVALUATED, EVALUATION)}
    known = {str(path): made(name, a="1") for name, path in Place("tiny", EVALUATION).inputs.items()}
    versioning.record(EVALUATION, "tiny", [made(EVALUATION, scores="good")], known)
    require_judged("tiny", folders)
    made(EVALUATED, a="trained again meanwhile")
    with pytest.raises(UserError, match=f"{EVALUATED} is not what '{EVALUATION}' was recorded with"):
        require_judged("tiny", folders)


def test_what_the_store_holds_is_not_brought_here(
    project: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = publish_output(bucket, "orbits", a="1")
    newer = made("orbits", a="2")
    run = PipelineRun(load_preset("tiny"), None, "key", bucket, _Leading())  # type: ignore[arg-type]
    lock = Path("dvc.lock").read_text()
    empty = new_machine(tmp_path / "empty", monkeypatch)
    (empty / "dvc.lock").write_text(lock)
    run._keep_in_store("orbits", [output])
    assert not (empty / "outputs").exists()
    monkeypatch.chdir(project)
    run._keep_in_store("orbits", [newer])
    assert storage.exists(versioning.stored_object(bucket, newer.md5))


class _Leading:
    fence = FENCE


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
    (output,) = versioning.save_outputs("report", "tiny")
    versioning.push([output], bucket)
    inputs = {str(path): output for path in Place("tiny", "report").inputs.values()}
    versioning.record("report", "tiny", [output], inputs)
    store.keep_entry(bucket, "tiny", "report", FENCE)
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
    project: Path, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.fence_off(root, "tiny", FENCE, [find_stage("sources")])
    output = publish_output(root, "sources", a="1")
    new_machine(tmp_path / "fresh", monkeypatch)
    store.fetch_locks(root, "tiny")
    assert versioning.lineage("sources", "tiny")[1] == [output] == [store.stored_output(root, "tiny", "sources")]
    assert not versioning.changed("sources", "tiny")
    assert store.stored_output(root, "another preset", "sources") is None
    other = new_machine(tmp_path / "other", monkeypatch)
    (other / "dvc.lock").write_text("its own")
    store.fetch_locks(root, "tiny")
    assert (other / "dvc.lock").read_text() == "its own"


def test_two_runs_keep_their_entries_side_by_side(project: Path, root: str) -> None:
    first = publish_output(root, "sources", a="1")
    Path("dvc.lock").unlink()
    second = publish_output(root, "encoders", a="1")
    assert store.stored_output(root, "tiny", "sources") == first
    assert store.stored_output(root, "tiny", "encoders") == second


def test_who_lost_the_lease_can_not_publish(project: Path, root: str) -> None:
    first = publish_output(root, "sources", a="1")
    store.fence_off(root, "tiny", Fence("pipeline", 2), [find_stage("sources")])
    with pytest.raises(LeaseLost, match="nothing is published"):
        publish_output(root, "sources", a="2")
    assert store.stored_output(root, "tiny", "sources") == first
    store.keep_entry(root, "tiny", "sources", Fence("sources", 1))  # another lease has its own tokens


@pytest.mark.parametrize("left", [None, b"", b"{", b"{}", b"[]", b'{"token": "x", "owner": ""}'])
def test_a_lease_that_somebody_deleted_locks_nobody_out(project: Path, root: str, left: bytes | None) -> None:
    store.fence_off(root, "tiny", Fence("sources", 7), [find_stage("sources")])
    if left is not None:
        storage.write_bytes(f"{root}/leases/tiny/sources.json", left)
        with pytest.raises(UserError, match=r"leases/tiny/sources\.json: not a lease; delete it"):
            held(root, "tiny", "sources").__enter__()
        storage.delete(f"{root}/leases/tiny/sources.json")
    with held(root, "tiny", "sources") as lease:
        store.fence_off(root, "tiny", lease.fence, [find_stage("sources")])
        assert lease.fence.token == 8


def test_a_writer_that_slept_over_the_take_over_can_not_publish(
    project: Path, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = publish_output(root, "sources", a="1")
    plain = storage.replace

    def sleep(location: str, data: bytes, expected: str | None) -> str:
        monkeypatch.setattr(storage, "replace", plain)
        store.fence_off(root, "tiny", Fence("pipeline", 2), [find_stage("sources")])
        return plain(location, data, expected)

    monkeypatch.setattr(storage, "replace", sleep)
    with pytest.raises(LeaseLost):
        publish_output(root, "sources", a="2")
    assert store.stored_output(root, "tiny", "sources") == first


def test_the_locks_that_mlflow_gets_hold_no_credentials(project: Path) -> None:
    """`dvc.lock` repeats the options of a preset word for word."""
    paths = ["https://u:SECRET@h/a b.mp4?sig=SECRET&v=1", "videos"]
    lock = {"stages": {"sources": {"params": {"presets/tiny.yaml": {"sources": {"paths": paths}}}}}}
    Path("dvc.lock").write_text(yaml.safe_dump(lock))
    Path("branches").mkdir()
    Path("branches/dvc.lock").write_text("# as DVC wrote it\nstages: {}\n")
    with locks_kept_with(MlflowTracker(Journal(project / "journal"))):
        pass
    kept = project / "journal/files/dvc"
    shown = yaml.safe_load((kept / "dvc.lock").read_text())["stages"]["sources"]["params"]["presets/tiny.yaml"]
    assert shown == {"sources": {"paths": ["https://h/a b.mp4?v=1", "videos"]}}
    assert (kept / "branches/dvc.lock").read_text() == "# as DVC wrote it\nstages: {}\n"
