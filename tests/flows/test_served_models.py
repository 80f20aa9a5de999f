"""Every registered model, from the outputs of its stage through a real registry (MLflow on SQLite) to the clip."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from fastapi.testclient import TestClient
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PyFuncModel, scoring_server
from PIL import Image
from toy_models import toy_autoencoder, toy_unet

from flows.places import Place
from flows.running import runner
from flows.running.runner import git_commit
from flows.stages import STAGES, Stage
from flows.tracking.mlflow_delivery import Delivery
from flows.tracking.runs import EXPERIMENT, Lineage, RunInfo, tracked_run, tracking_uri
from svd.config import Preset
from svd.config.load import load_preset
from svd.media.video import Frames, read_frames
from svd.model.formats.clip import build_clip, save_toy, toy_config
from svd.model.formats.folders import save_autoencoder, save_unet
from svd.model.lora import add_lora, save_lora
from svd.tasks.registry import task_of_stage

TRAINED = ("image_pretraining", "video_pretraining", "high_quality_finetuning", "image_to_video")
UNETS = {
    "high-quality-finetuning": {"in_channels": 4, "ids": 2},
    "image-to-video": {"in_channels": 8, "ids": 3},
    "multiview-finetuning": {"in_channels": 8, "ids": 4},
    "frame-interpolation": {"in_channels": 9, "ids": 3, "learned_mask": True},
}
OWN_CARD = "---\nlicense: mit\n---\n\n# The card of the output\n"
REGISTERED = [stage for stage in STAGES.values() if stage.model]


def picture(seed: int = 0) -> str:
    """Base64 of a PNG of 24x32 pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).resize((32, 24)).save(content, "png")
    return base64.b64encode(content.getvalue()).decode()


INPUTS: dict[str, dict[str, Any]] = {
    "high-quality-finetuning": {"prompt": "a ball"},
    "image-to-video": {"image": picture()},
    "camera-lora": {"image": picture()},
    "multiview-finetuning": {"image": picture(), "elevation_degrees": 10.5},
    "frame-interpolation": {"first": picture(0), "last": picture(1)},
}


def small_preset() -> Preset:
    """The preset `tiny` with clips of 4 frames of 16x24 pixels and orbits of 3 views of 16x16."""
    values = load_preset("tiny").model_dump(mode="json")
    size, orbit = {"frames": 4, "height": 16, "width": 24}, {"frames": 3, "height": 16, "width": 16}
    values["latents"]["geometries"] = [size]
    values["orbits"] |= {"views": 3, "size": 16}
    for stage in (*TRAINED, "camera_lora", "frame_interpolation", "multiview_finetuning"):
        changes = orbit if stage == "multiview_finetuning" else size
        values[stage]["phases"] = [values[stage]["phases"][-1] | changes]
    for part in ("text_to_video", "image_to_video", "multiview", "interpolation"):
        values["generation"][part]["sampling"] |= {"steps": 2, "sigma_max": 80}
    return Preset.model_validate(values)


def write_outputs(preset: Preset) -> None:
    """What the stages publish that the registered models are made of."""
    save_autoencoder(toy_autoencoder(), Place(preset.name, "autoencoder").output)
    config = toy_config(16, 32)
    save_toy(build_clip(config, "test"), config, Place(preset.name, "encoders").output)
    for stage, changes in UNETS.items():
        save_unet(toy_unet(**changes), Place(preset.name, stage).output / "unet")
    for number, motion in enumerate(preset.camera_lora.motions):
        unet = toy_unet(**UNETS["image-to-video"])
        add_lora(unet, 2, 2.0, motion)
        torch.manual_seed(number)
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        save_lora(unet, Place(preset.name, "camera-lora").output / motion, motion)


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Preset]:
    """The preset whose models are registered, each by a run of its stage, in a project that is the working folder."""
    root, found = tmp_path_factory.mktemp("served"), small_preset()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
        write_outputs(found)
        for stage in REGISTERED:
            (Place(found.name, stage.name).output / "README.md").write_text(OWN_CARD)
            with tracked_run(RunInfo(stage.name, stage.name)) as tracker:
                output = Place(found.name, stage.name).output
                made = Lineage(stage.name, str(output), "1" * 32 + ".dir")
                runner._register(tracker, stage, found, output, [Lineage("latents", "x", "0" * 32 + ".dir"), made])
        yield found


@pytest.fixture(scope="module")
def load(preset: Preset) -> Iterator[Callable[[str], PyFuncModel]]:
    """Loads the candidate that a stage has trained, once."""
    made: dict[str, PyFuncModel] = {}
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(tracking_uri())

    def model(stage: str) -> PyFuncModel:
        if stage not in made:
            made[stage] = mlflow.pyfunc.load_model(f"models:/{STAGES[stage].model}@candidate")
        return made[stage]

    yield model
    mlflow.set_tracking_uri(before)


def decoded(film: str, folder: Path) -> tuple[Frames, float]:
    """Frames and rate of a base64 mp4."""
    (folder / "clip.mp4").write_bytes(base64.b64decode(film, validate=True))
    return read_frames(folder / "clip.mp4")


def predict(model: PyFuncModel, *rows: dict[str, Any], **params: Any) -> list[str]:
    return list(model.predict(pd.DataFrame(rows), params=params)["mp4"])


@pytest.mark.parametrize("stage", REGISTERED, ids=lambda stage: stage.name)
def test_a_registered_model_does_the_task_of_its_stage(
    load: Callable[[str], PyFuncModel], preset: Preset, stage: Stage, tmp_path: Path
) -> None:
    phase = getattr(preset, stage.name.replace("-", "_")).phases[-1]
    model = load(stage.name)
    assert (
        model.metadata.get_input_schema().input_names()
        == list(task_of_stage(stage.name).columns)
        == list(INPUTS[stage.name])
    )
    first, second = predict(model, INPUTS[stage.name], INPUTS[stage.name], seed=3, fps=12)
    frames, fps = decoded(first, tmp_path)
    count = 5 if stage.name == "frame-interpolation" else phase.frames
    assert frames.shape == (count, phase.height, phase.width, 3)
    assert fps == 12
    assert frames.std() > 10
    assert second != first
    assert predict(model, INPUTS[stage.name], seed=4, fps=12) == [second]
    if stage.name != "frame-interpolation":
        (short,) = predict(model, INPUTS[stage.name], frames=2)
        assert len(decoded(short, tmp_path)[0]) == 2


@pytest.mark.parametrize("stage", REGISTERED, ids=lambda stage: stage.name)
def test_every_column_counts(load: Callable[[str], PyFuncModel], stage: Stage) -> None:
    """And so does the motion bucket."""
    model, row = load(stage.name), INPUTS[stage.name]
    size = {} if stage.name == "frame-interpolation" else {"frames": 2}
    (plain,) = predict(model, row, **size)
    others = {"prompt": "a blue box", "elevation_degrees": -20.0}
    for column in task_of_stage(stage.name).columns:
        assert predict(model, row | {column: others.get(column, picture(7))}, **size) != [plain], column
    assert predict(model, row, motion_bucket=3, **size) != [plain]


def test_a_lora_works_on_the_image_to_video_model(load: Callable[[str], PyFuncModel], preset: Preset) -> None:
    model, row = load("camera-lora"), INPUTS["camera-lora"]
    motions = preset.camera_lora.motions
    clips = [predict(model, row, frames=3, camera=motion)[0] for motion in motions]
    assert len(set(clips)) == len(motions) == 3
    assert predict(model, row, frames=3) == [clips[0]]
    assert predict(model, row, frames=3, scale=0.5)[0] not in clips
    assert predict(model, row, frames=3, scale=0) == predict(load("image-to-video"), row, frames=3)


@pytest.mark.parametrize(
    ("stage", "row", "params", "message"),
    [
        ("image-to-video", {"prompt": "a ball"}, {}, r"missing inputs \['image'\].*extra inputs: \['prompt'\]"),
        ("high-quality-finetuning", {"image": picture()}, {}, r"missing inputs \['prompt'\]"),
        ("multiview-finetuning", {"image": picture()}, {}, r"missing inputs \['elevation_degrees'\]"),
        ("multiview-finetuning", INPUTS["multiview-finetuning"] | {"elevation_degrees": 95.5}, {}, "-90 and 90"),
        ("image-to-video", {"image": "cup.png"}, {}, r"^column 'image': no base64; give the base64 text of a PNG"),
        ("frame-interpolation", {"first": picture(), "last": "bm9uZQ=="}, {}, "^column 'last': not a readable picture"),
        ("camera-lora", {"image": picture()}, {"camera": "roll"}, "^no camera motion 'roll'; this version has hori"),
        ("image-to-video", {"image": picture()}, {"frames": 0}, "^a clip needs at least 1 frame, not 0"),
    ],
)
def test_mistakes_are_one_error(
    load: Callable[[str], PyFuncModel], stage: str, row: dict[str, Any], params: dict[str, Any], message: str
) -> None:
    with pytest.raises(MlflowException, match=message) as caught:
        predict(load(stage), row, **params)
    assert caught.value.get_http_status_code() == 400


def test_mlflows_server_serves_it(load: Callable[[str], PyFuncModel], tmp_path: Path) -> None:
    """As `mlflow models serve` does; a browser's data URL is a picture too."""
    row = {"image": f"data:image/png;base64,{picture()}", "elevation_degrees": 10}
    with TestClient(scoring_server.init(load("multiview-finetuning"))) as client:
        body = {"dataframe_records": [row], "params": {"frames": 4, "seed": 1}}
        answer = client.post("/invocations", json=body)
        assert answer.status_code == 200, answer.text
        refused = client.post("/invocations", json={"dataframe_records": [{"prompt": "a ball"}]})
    assert len(decoded(answer.json()["predictions"][0]["mp4"], tmp_path)[0]) == 4
    assert refused.status_code == 400


def test_a_version_says_what_it_is_and_the_run_has_no_params_of_it(preset: Preset) -> None:
    client = mlflow.MlflowClient(tracking_uri())
    for stage in REGISTERED:
        version = client.get_model_version_by_alias(stage.model, "candidate")
        assert set(version.tags) >= {"checkpoint", "task"} and version.tags["task"] == stage.name
        assert client.get_run(version.run_id).data.params == {}


def test_a_version_and_its_run_have_the_card_with_commit_and_hashes(preset: Preset, tmp_path: Path) -> None:
    client = mlflow.MlflowClient(tracking_uri())
    for stage in REGISTERED:
        version = client.get_model_version_by_alias(stage.model, "candidate")
        for part in (stage.description, git_commit(), "1" * 32, "licence mit"):
            assert part in version.description
        of_run = Path(client.download_artifacts(version.run_id, "README.md", str(tmp_path))).read_text()
        assert of_run.startswith(OWN_CARD)
        for part in ("0" * 32, "1" * 32, git_commit()):
            assert f"{part}" in of_run.removeprefix(OWN_CARD)
    uri = f"models:/{stage.model}@candidate"
    folder = Path(
        mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path / "model"), tracking_uri=tracking_uri())
    )
    assert of_run in [path.read_text() for path in folder.rglob("README.md")]


def test_what_people_wrote_of_a_version_stays(preset: Preset) -> None:
    client, (stage, *_) = mlflow.MlflowClient(tracking_uri()), REGISTERED
    version = client.get_model_version_by_alias(stage.model, "candidate").version
    before = client.get_model_version(stage.model, version).description
    client.update_model_version(stage.model, version, "the one for the talk")
    output = Place(preset.name, stage.name).output
    with tracked_run(RunInfo("again", stage.name)) as tracker:
        runner._register(tracker, stage, preset, output, [Lineage(stage.name, str(output), "2" * 32 + ".dir")])
    assert client.get_model_version(stage.model, version).description == "the one for the talk"
    client.update_model_version(stage.model, version, before)


def test_a_description_that_mlflow_cant_store_costs_no_alias(preset: Preset, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that holds ASCII alone answers with an error of the server's."""

    def refuse(*_: object) -> None:
        raise MlflowException("'ascii' codec can't encode character")

    client, (stage, *_) = mlflow.MlflowClient(tracking_uri()), REGISTERED
    version = client.get_model_version_by_alias(stage.model, "candidate")
    client.update_model_version(stage.model, version.version, "")
    client.delete_registered_model_alias(stage.model, "candidate")
    delivery = Delivery(tracking_uri(), EXPERIMENT)
    delivery._client = client
    settings = {"checkpoint": version.tags["checkpoint"], "description": version.description}
    with monkeypatch.context() as ascii_alone:
        ascii_alone.setattr(mlflow.MlflowClient, "update_model_version", refuse)
        with pytest.raises(MlflowException):
            delivery._model({"name": stage.model, "folders": {}, "settings": settings})
    assert client.get_model_version_by_alias(stage.model, "candidate").version == version.version
    client.update_model_version(stage.model, version.version, version.description)
