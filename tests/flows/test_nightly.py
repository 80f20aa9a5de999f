"""The flow `nightly-evaluation` as a whole, in a Prefect server of its own, on micro models and a real MLflow registry:
`champion` moves to a candidate that is not worse, and stays when the candidate is worse.

What the first model makes counts as the real clips, so that model is good by construction; the worse one is the same
network with a bias on its output.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import mlflow
import numpy as np
import pytest
import torch
import yaml
from prefect.testing.utilities import prefect_test_harness
from toy_models import randomised

from flows.prefect_flows.nightly import EVALUATED, EVALUATION, nightly_evaluation
from flows.running.runner import checkpoint_digest
from flows.stages import NIGHTLY, STAGES
from flows.tracking.runs import MlflowTracker, RunInfo, tracked_run, tracking_uri
from svd.config.load import load_preset
from svd.core.files import write_json
from svd.generation import load_models, text_to_video
from svd.model.autoencoder import Autoencoder, AutoencoderConfig
from svd.model.formats import clip as clips
from svd.model.formats.folders import save_autoencoder, save_unet
from svd.model.unet import UNet, UNetConfig

pytestmark = pytest.mark.slow  # four flow runs in a Prefect server
ROOT = Path(__file__).parent.parent.parent
MODEL = str(STAGES[EVALUATED].model)
WIDTH = 32
CLASSES = ("BlueRingGrowing", "GreenDiscBouncing", "RedStarSpinning", "TealCubeSwinging")
CLIPS = 12
SIZE = {"frames": 4, "height": 16, "width": 24}
OVERRIDES: dict[str, Any] = {
    "name": "nightly",
    "encoders.toy_width": WIDTH,
    **{f"evaluation.ucf101.{name}": value for name, value in SIZE.items()},
    "evaluation.ucf101.resized": [16, 24],
    "evaluation.ucf101.cropped": [16, 24],
    "evaluation.ucf101.samples": CLIPS,
    "evaluation.ucf101.fps": 25,
    "evaluation.ucf101.shown": 2,
    "evaluation.ucf101.controls": ["noise", "mean-frame"],
    "evaluation.ucf101.sampling.steps": 2,
    "evaluation.multiview.objects": 1,
    "evaluation.multiview.views": 3,
    "evaluation.multiview.size": 32,
    "evaluation.multiview.sampling.steps": 1,
}


def micro_unet(channels: int, ids: int) -> UNet:
    config = UNetConfig(
        in_channels=channels, ids=ids, block_out_channels=(32, 32), attention_levels=(True, False), layers_per_block=1,
        head_channels=16, cross_attention_dim=WIDTH, id_embedding_dim=8,
    )  # fmt: skip
    return randomised(UNet(config))


def write_models(outputs: Path) -> None:
    save_unet(micro_unet(4, 2), outputs / EVALUATED / "unet")
    save_unet(micro_unet(8, 4), outputs / "multiview-finetuning" / "unet")
    config = AutoencoderConfig(block_out_channels=(8, 8), layers_per_block=1, norm_groups=4, scaling_factor=1.0)
    torch.manual_seed(0)
    autoencoder = Autoencoder(config)
    with torch.no_grad():
        autoencoder.decoder.conv_out.weight *= 4  # contrast
    save_autoencoder(autoencoder, outputs / "autoencoder")
    toy = clips.toy_config(WIDTH, WIDTH)
    clips.save_toy(clips.build_clip(toy, "test"), toy, outputs / "encoders")


def write_lossless(path: Path, frames: np.ndarray) -> None:
    """Frames (T, H, W, 3) uint8 as FFV1: what a lossy codec does to clips this small would outweigh the models."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25, width=frames.shape[2], height=frames.shape[1], pix_fmt="bgr0")
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_real_clips(outputs: Path, preset: Any) -> None:
    """The data set in UCF-101's layout: what the first model makes with seeds that the evaluation doesn't use."""
    folder = outputs / "sources" / "ucf101_fixture"
    models = load_models(
        outputs / EVALUATED / "unet", outputs / "autoencoder", outputs / "encoders", preset.encoders, "cpu"
    )
    prompts = {name: f"a {name.lower()}" for name in CLASSES}
    names = [name for name in CLASSES for _ in range(CLIPS // len(CLASSES))]
    sampling = preset.evaluation.ucf101.sampling
    made = text_to_video(
        models, [prompts[name] for name in names], **SIZE, fps=25, motion_bucket=127, sampling=sampling,
        seed=list(range(CLIPS)), progress=False,
    )  # fmt: skip
    for number, (name, clip) in enumerate(zip(names, made, strict=True)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        frames = (clip * 255).round().byte().permute(0, 2, 3, 1).numpy()
        write_lossless(folder / name / f"v_{name}_g{number + 1:02d}_c01.avi", frames)
    lists = folder / "ucfTrainTestlist"
    lists.mkdir()
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.avi"))
    (lists / "trainlist01.txt").write_text("".join(f"{file} 1\n" for file in files[1::2]))
    (lists / "testlist01.txt").write_text("".join(f"{file}\n" for file in files[::2]))
    write_json(folder / "prompts.json", {"prompts": prompts})


def write_project(root: Path) -> None:
    """What the flow needs around the outputs: the preset, the stages as DVC sees them without their code, no git."""
    values = load_preset(str(ROOT / "presets" / "tiny.yaml"), OVERRIDES).model_dump(mode="json")
    (root / "presets").mkdir()
    (root / "presets" / "nightly.yaml").write_text(yaml.safe_dump(values))
    (root / "params.yaml").write_text("preset: nightly\n")
    pipeline = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    pipeline.pop("plots", None)
    for stage in pipeline["stages"].values():
        stage["deps"] = [dep for dep in stage.get("deps", []) if str(dep).startswith("outputs/")]
    (root / "dvc.yaml").write_text(yaml.safe_dump(pipeline))
    dvc = [str(Path(sys.executable).parent / "dvc"), "init", "--no-scm", "-q"]
    subprocess.run(dvc, cwd=root, check=True)


def train(outputs: Path, bias: float) -> None:
    """A new checkpoint, registered by the tracker as its training stage does it."""
    unet = micro_unet(4, 2)
    with torch.no_grad():
        unet.conv_out.bias += bias * torch.tensor([1.0, -1.0, 0.0, 0.0])
    shutil.rmtree(outputs / EVALUATED)
    save_unet(unet, outputs / EVALUATED / "unet")
    settings = {"checkpoint": checkpoint_digest(outputs / EVALUATED), "task": EVALUATED}
    with tracked_run(RunInfo(f"{EVALUATED}-{bias}", EVALUATED)) as tracker:
        assert isinstance(tracker, MlflowTracker)
        tracker.register_model(MODEL, {"model": outputs / EVALUATED}, settings)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The outputs of all stages before the nightly ones, in a project of their own that is the working folder."""
    root = tmp_path_factory.mktemp("nightly")
    folder = root / "outputs" / "nightly"
    with pytest.MonkeyPatch.context() as patch, prefect_test_harness(server_startup_timeout=120):
        patch.chdir(root)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
        write_project(root)
        patch.setattr("svd.config.load.preset_path", lambda name: root / "presets" / "nightly.yaml")
        write_models(folder)
        write_real_clips(folder, load_preset("nightly"))
        for name in STAGES["report"].inputs:
            if name not in NIGHTLY:
                (folder / name).mkdir(exist_ok=True)
        yield folder


def aliases() -> dict[str, str]:
    return {k: str(v) for k, v in mlflow.MlflowClient(tracking_uri()).get_registered_model(MODEL).aliases.items()}


def test_champion_follows_candidates_that_are_not_worse(outputs: Path) -> None:
    train(outputs, bias=1e-6)
    first = nightly_evaluation()
    assert set(first["ran"]) == set(NIGHTLY) and Path(first["report"]).is_file()
    assert first["promotion"]["promoted"] and "no champion yet" in first["promotion"]["reason"], first
    assert aliases() == {"candidate": "1", "champion": "1", "best": "1"}

    train(outputs, bias=2.0)
    worse = nightly_evaluation()["promotion"]
    assert not worse["promoted"] and "allowed" in worse["reason"], worse
    assert aliases() == {"candidate": "2", "champion": "1", "best": "1"}

    train(outputs, bias=2e-6)
    again = nightly_evaluation()["promotion"]
    assert again["promoted"] and "allowed" in again["reason"], again
    moved = aliases()  # `best` moves too when the candidate is better, and not only not worse
    assert moved.pop("best") in ("1", "3") and moved == {"candidate": "3", "champion": "3"}
    result = json.loads((outputs / EVALUATION / "result.json").read_text())
    champion = mlflow.MlflowClient(tracking_uri()).get_model_version_by_alias(MODEL, "champion")
    kept = mlflow.artifacts.download_artifacts(run_id=champion.run_id, artifact_path="evaluation/result.json")
    assert json.loads(Path(kept).read_text()) == result


def test_a_candidate_that_was_not_evaluated_is_no_champion(outputs: Path) -> None:
    """The registry names another checkpoint than the one on disk: nothing moves, and the flow still succeeds."""
    before = aliases()
    save_unet(micro_unet(4, 2), outputs / EVALUATED / "unet")
    outcome = nightly_evaluation()["promotion"]
    assert not outcome["promoted"] and "evaluate it first" in outcome["reason"]
    assert aliases() == before
