"""Lineage both ways over a real MLflow server and a real DVC remote, by hash alone: the working folder is gone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl
import pytest
from lineage_history import (
    COPY,
    DVC,
    FILM,
    GEOMETRY,
    ID,
    MODEL,
    PRESET,
    History,
    X,
    Y,
    client,
    clip,
    commit,
    make_project,
    register,
    run,
)
from servers import free_ports, mlflow_server
from typer.testing import CliRunner

from flows.cli.app import app
from flows.lineage.forward import trace
from flows.lineage.objects import Missing, open_objects
from flows.lineage.records import Records
from flows.lineage.takedown import report_source
from svd.config import Geometry
from svd.config.load import load_preset
from svd.core.errors import UserError
from svd.latents.batches import Buckets, bucket_seed
from svd.latents.cache import LatentCache
from svd.latents.index import Index
from svd.latents.loader import Draws, Examples
from svd.training.usage import Usage, drawn, training_usage


@dataclass
class Made:
    """What the history of the project left."""

    folder: Path
    commit: str
    catalogues: tuple[str, str]
    latents: tuple[str, str]
    runs: dict[str, str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """The history, in a project whose cache and outputs are empty again: everything is in the remote."""
    folder = tmp_path_factory.mktemp("project")
    (port,) = free_ports(1)
    server = mlflow_server(folder / "mlflow", port, str(folder / "mlflow" / "artifacts"), {"AWS_ENDPOINT_URL": ""})
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        patch.delenv("SVD_STORE", raising=False)
        make_project(folder, folder / "store")
        history = History(push=True)
        first = history.data({X: 4, Y: 11})
        runs = {"image": history.training("image-pretraining")}
        runs["video"] = history.training("video-pretraining", "image-pretraining")
        runs["one"] = history.training("image-to-video", "video-pretraining")
        register(runs["one"], "champion")
        made = commit("version 1")
        second = history.data({Y: 11})
        runs["two"] = history.training("image-to-video", "video-pretraining")
        register(runs["two"], "candidate")
        shutil.rmtree(folder / "outputs")
        shutil.rmtree(folder / ".dvc" / "cache")
        yield Made(folder, made, (first[0], second[0]), (first[1], second[1]), runs)
    server.stop()


def said(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["lineage", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_from_a_model_to_its_sources(made: Made) -> None:
    found = json.loads(said(f"{MODEL}@champion", "--json"))
    assert (found["model"]["version"], found["model"]["aliases"]) == ("1", ["champion"])
    assert (found["run"]["id"], found["run"]["preset"], found["run"]["stage"]) == (
        made.runs["one"],
        PRESET,
        "image-to-video",
    )
    data = {item["stage"]: (item["md5"], item["run"]["id"]) for item in found["data"]}
    assert data["latents"][0] == made.latents[0] and data["curation"][0] == made.catalogues[0]
    assert data["video-pretraining"][1] == made.runs["video"]
    assert set(data) == {"latents", "curation", "sources", "video-pretraining", "image-pretraining"}
    (catalogue,) = found["catalogues"]
    assert (catalogue["md5"], catalogue["clips"], catalogue["kept"]) == (made.catalogues[0], 15, 13)
    assert (catalogue["trained"], catalogue["perhaps"], catalogue["validated"]) == (12, 0, 1)
    assert catalogue["sources"] == [[Y, 9, 0, 1, "CC-BY-4.0"], [X, 3, 0, 0, "CC-BY-4.0"]]
    assert not (made.folder / "outputs").exists()


def test_only_the_tables_travel(made: Made) -> None:
    shutil.rmtree(made.folder / ".dvc" / "cache", ignore_errors=True)
    with open_objects() as objects:
        trace(f"{MODEL}/1", Records(), objects)
        shard = objects.tree(made.catalogues[0])["shard-0.tar"]
    assert not (made.folder / ".dvc/cache/files/md5" / shard[:2] / shard[2:]).exists()


def test_a_model_that_started_from_another_has_both_catalogues(made: Made) -> None:
    text = said(f"{MODEL}@candidate", "--all")
    assert all(md5 in text for md5 in (*made.catalogues, *made.latents))
    assert X in text and made.commit in text


def test_a_run_and_an_output_folder_are_names_too(made: Made) -> None:
    with open_objects() as objects:
        records = Records()
        assert trace(made.runs["two"], records, objects).run.id == made.runs["two"]
        recorded = trace(f"outputs/{PRESET}/image-to-video", records, objects)
    assert recorded.run.id == made.runs["two"]


@pytest.mark.parametrize("source", [X, COPY, ID[X], "my films/holiday.mp4", "my films"])
def test_from_a_source_to_all_that_saw_it(made: Made, source: str) -> None:
    Path("my films").mkdir(exist_ok=True)
    Path("my films/holiday.mp4").write_bytes(FILM)  # the user's own file, of which the catalogue has a copy
    found = json.loads(said("--source", source, "--json"))
    (catalogue,) = found["found"]
    assert catalogue["catalogue"] == made.catalogues[0]
    assert set(catalogue["uris"]) == {X, COPY}
    assert set(catalogue["clips"]) == {clip(X, n) for n in range(4)}
    assert set(catalogue["kept"]) == {clip(X, n) for n in range(3)}
    held = {(item["stage"], item["clips"]) for item in found["data"]}
    assert held == {("curation", 4), ("sources", None), ("latents", 3)}
    runs = {item["run_id"]: (item["relation"], item["trained"]) for item in found["runs"]}
    assert runs == {made.runs[name]: ("trained", 3) for name in ("image", "video", "one")}
    models = {item["name"]: (item["relation"], item["through"]) for item in found["models"]}
    through = [f"{name} ({PRESET}): trained" for name in ("video-pretraining", "image-pretraining")]
    assert models == {
        f"{MODEL}/1 @champion": ("trained", [f"image-to-video ({PRESET}): trained", *through]),
        f"{MODEL}/2 @candidate": ("trained", through),
    }


def test_a_folder_of_sources_and_one_that_nobody_has(made: Made) -> None:
    folder = json.loads(said("--source", "videos", "--json"))
    assert [len(one["clips"]) for one in folder["found"]] == [15, 11]
    assert json.loads(said("--source", "video", "--json"))["found"] == []
    assert "no catalogue that can be read has video" in said("--source", "video")
    assert "may have seen" not in said("--source", X)


def test_what_cannot_be_read_any_more_may_have_seen_it(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = made.catalogues[0]
    shutil.rmtree(made.folder / ".dvc" / "cache", ignore_errors=True)
    stored = made.folder / "store/files/md5" / lost[:2] / lost[2:]
    content = stored.read_bytes()
    stored.unlink()
    try:
        with open_objects() as objects:
            found = report_source(X, Records(), objects)
            with pytest.raises(Missing, match=f"{lost} is neither in DVC's cache nor in a remote"):
                objects.path(lost)
    finally:
        stored.write_bytes(content)
    assert found.unreadable == [lost]
    assert {reader.name.split()[0]: reader.relation for reader in found.models} == {
        f"{MODEL}/1": "unknown",
        f"{MODEL}/2": "unknown",
    }


def test_a_model_whose_run_is_gone_may_have_seen_it(made: Made) -> None:
    version = str(client().create_model_version(MODEL, "s3://nowhere/model").version)
    try:
        models = json.loads(said("--source", X, "--json"))["models"]
    finally:
        client().delete_model_version(MODEL, version)
    assert [one["relation"] for one in models if one["name"] == f"{MODEL}/{version}"] == ["unknown"]


def test_equal_latents_of_two_catalogues_come_from_both(made: Made) -> None:
    """They differ in clips that were dropped: nobody can say which of them a training on the latents stands on."""
    records = Records()
    training = records.runs[made.runs["one"]]
    again = replace(records.maker("latents", made.latents[0]), id="again", inputs={"curation": "other"})  # type: ignore[type-var]
    records._add(again)
    assert {"other", made.catalogues[0]} <= {one.md5 for one in records.ancestry(training)}
    assert again in records.chain(training)


def test_damage_in_the_remote_is_not_taken(made: Made) -> None:
    shutil.rmtree(made.folder / ".dvc" / "cache", ignore_errors=True)
    stored = made.folder / "store/files/md5" / made.latents[0][:2] / made.latents[0][2:]
    content = stored.read_bytes()
    stored.chmod(0o644)
    stored.write_bytes(b"[]")
    try:
        with open_objects() as objects, pytest.raises(Missing):
            objects.tree(made.latents[0])
    finally:
        stored.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("svd-image-to-video@best", "there are svd-image-to-video/1, .*svd-image-to-video@candidate"),
        ("svd-image-to-video/9", "names no version"),
        ("nonsense", "neither MODEL@ALIAS nor MODEL/VERSION"),
        ("outputs/other/latents", "MLflow knows of no run that made it"),
    ],
)
def test_a_wrong_name_is_one_line(made: Made, name: str, message: str) -> None:
    with open_objects() as objects, pytest.raises(UserError, match=message):
        trace(name, Records(), objects)


def test_without_mlflow_it_is_one_line(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"MLflow at http://127\.0\.0\.1:9 can't be asked"):
        Records()


def test_the_history_is_what_dvc_and_mlflow_say(made: Made) -> None:
    """The fixture is not a stand-in: dvc.lock and MLflow agree, and `dvc pull` brings the newest."""
    lock = (made.folder / "dvc.lock").read_text()
    assert made.catalogues[1] in lock and made.catalogues[0] not in lock
    assert client().get_run(made.runs["two"]).data.tags["dvc.input.latents"] == made.latents[1]
    run(DVC, "pull", "-q", "latents")
    assert (made.folder / f"outputs/{PRESET}/latents/index.parquet").is_file()
    shutil.rmtree(made.folder / "outputs")
    assert os.environ["MLFLOW_TRACKING_URI"].startswith("http://127.0.0.1")


class RowsAlone(LatentCache):
    """A cache of rows alone."""

    def __init__(self, index: pl.DataFrame) -> None:
        self.folder, self.index = Path("nowhere"), Index(index.to_arrow())


def index(count: int) -> RowsAlone:
    rows: list[dict[str, object]] = [
        {
            "sample_id": f"{n:03}",
            "clip_id": f"clip-{n}",
            "geometry": GEOMETRY,
            "split": "test" if n == 0 else "train",
            "motion_score": float(n),
            "camera": "pan-left" if n % 2 else "static",
        }
        for n in range(count)
    ]
    return RowsAlone(pl.DataFrame(rows))


@pytest.mark.parametrize("iterations", [1, 2, 100])
def test_drawn_are_the_rows_that_the_loader_reads(iterations: int) -> None:
    phase = load_preset("tiny").image_to_video.phases[-1].model_copy(update={"iterations": iterations, "batch_size": 5})
    rows = index(40).index.rows
    examples = Examples(index(40), rows, phase.frames, Draws(7, 0.0, 1.0))
    read = {str(examples.row(i)["clip_id"]) for i in range(5 * iterations)}
    (found,) = drawn([rows], phase, 7)
    assert set(found.column("clip_id")) == read and len(read) == min(40, 5 * iterations)


@pytest.mark.parametrize("iterations", [3, 9, 100])
def test_drawn_of_buckets_are_the_rows_that_their_batches_read(iterations: int) -> None:
    tiny = load_preset("tiny").image_to_video.phases[-1]
    short = [Geometry(frames=3, height=tiny.height, width=tiny.width)]
    phase = tiny.model_copy(update={"iterations": iterations, "batch_size": 3, "buckets": short})
    rows = [index(40).index.rows, index(25).index.rows]
    examples = [
        Examples(index(40), rows[bucket], size.frames, Draws(bucket_seed(7, bucket), 0.0, 1.0))
        for bucket, size in enumerate(phase.by_bucket)
    ]
    buckets, read = Buckets(examples, [3, 6], 7), [set[str](), set[str]()]
    for index_of_all in (i for step in range(iterations) for i in buckets.indices(step)):
        number, bucket = divmod(index_of_all, 2)
        read[bucket].add(str(examples[bucket].row(number)["clip_id"]))
    assert [set(found.column("clip_id")) for found in drawn(rows, phase, 7)] == read


def test_a_training_uses_its_subset_its_cameras_and_no_more() -> None:
    half = load_preset("tiny", {"image_to_video.subset": {"min_motion": 0.5}})
    used = training_usage(index(41), half, "image-to-video")
    assert used == Usage(frozenset(f"clip-{n}" for n in range(20, 41)), validated=frozenset({"clip-0"}))
    lora = load_preset("tiny", {"camera_lora.motions": ["horizontal"]})
    assert training_usage(index(41), lora, "camera-lora").trained == {f"clip-{n}" for n in range(1, 41, 2)}


def test_the_seed_is_the_trainings_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch of the last phase of video pretraining, against the runner's own draws."""
    from svd.training import runner

    preset = load_preset("tiny")
    phases = [
        preset.video_pretraining.phases[-1].model_copy(update={"iterations": 1, "batch_size": 5, "image_share": 0})
    ]
    section = preset.video_pretraining.model_copy(update={"phases": phases})
    preset = preset.model_copy(update={"video_pretraining": section})
    cache = index(41)

    class Context:
        """What `Training.seed` reads of a context."""

    Context.preset = preset  # type: ignore[attr-defined]
    seed_of = runner.Training.seed
    training = type("Known", (), {"context": Context, "name": "video-pretraining"})()
    getter = seed_of.fget if isinstance(seed_of, property) else seed_of.func  # type: ignore[attr-defined]
    seed = int(runner.digest(getter(training), 0)[:12], 16)
    rows = cache.rows(phases[0], "train")
    examples = Examples(cache, rows, 8, Draws(seed, 0.0, 1.0))
    assert training_usage(cache, preset, "video-pretraining").trained == {examples.row(i)["clip_id"] for i in range(5)}
