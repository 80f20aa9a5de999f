"""Image-to-video is judged by what it keeps and how it moves: planted faults are found, a good model is not refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import TINY, WIDTH
from torch import Tensor
from toy_models import randomised

from evaluation.claims import read_claims
from evaluation.recognition import branches
from evaluation.recognition import image_to_video as stage
from evaluation.recognition.branches import BASE, blended, cameras_of, lora_claim
from evaluation.recognition.cached import CachedClips, psnr
from evaluation.recognition.kept import as_frames
from svd.config.load import load_preset
from svd.core.errors import UserError
from svd.latents.cache import write_index, write_shard
from svd.model.autoencoder import Autoencoder, AutoencoderConfig
from svd.model.formats import clip as encoders
from svd.model.formats.folders import checkpoint_hash, load_unet, save_autoencoder, save_unet
from svd.model.lora import add_lora, save_lora
from svd.model.unet import UNet, UNetConfig
from svd.stage import StageContext
from svd.synthetic.scenes import World, render_clip

N, T, H, W = 10, 6, 32, 48


def films() -> Tensor:
    """Clips (N, T, 3, H, W) in [0, 1] of the test world, in which something moves."""
    clips = [render_clip(World(0, "test"), index, T, H, W, 6).frames for index in range(N)]
    return torch.from_numpy(np.stack(clips)).permute(0, 1, 4, 2, 3).float() / 255


def moved(picture: Tensor, step: float) -> Tensor:
    """A clip (T, 3, H, W) in which the picture slides to the right by `step` pixels a frame."""
    return torch.stack([picture.roll(round(step * t), -1) for t in range(T)])


def animation(folder: Path) -> stage.Animation:
    truth = films()
    clips = CachedClips(
        tuple(f"clip-{k}" for k in range(N)), truth[:, 0], truth, (6.0,) * N, (127.0,) * N, ("static",) * N
    )
    config = load_preset(TINY).evaluation.image_to_video
    return stage.Animation(config, 0, None, clips, "protocol", folder)  # type: ignore[arg-type]


def verdicts(
    monkeypatch: pytest.MonkeyPatch, folder: Path, model: Callable[[Tensor, Tensor, float], Tensor]
) -> dict[str, bool]:
    """The verdicts on a model: (picture, film, bucket) to a clip."""
    subject = animation(folder)

    def animate(models: Any, images: Tensor, *, motion_bucket: Sequence[float], **options: Any) -> Tensor:
        pictures = subject.clips.pictures
        numbers = [int((pictures - image).abs().flatten(1).sum(1).argmin()) for image in images]
        pairs = zip(images, numbers, motion_bucket, strict=True)
        return torch.stack([model(image, subject.clips.truth[k], bucket) for image, k, bucket in pairs])

    monkeypatch.setattr(stage, "image_to_video", animate)
    own = [127.0] * N
    made = torch.from_numpy(np.stack(subject.animate("made", N, subject.config.sampling, own))).permute(0, 1, 4, 2, 3)
    flows = stage.measured_flows(subject)
    clips = made.float() / 255
    return {claim.text: claim.shown for claim in stage.claims_of(subject, clips, clips, flows)}


START, LATER = "the first frame is the picture", "later frames follow the film"
GOOD = f"{START}, at 22 dB and more"
MOTION = "a higher motion bucket gives more optical flow (5 buckets, all else equal)"


def follow(picture: Tensor, film: Tensor, bucket: float) -> Tensor:
    """Nearly the film at the bucket that it has, else a slide that is faster the higher the bucket."""
    return (0.9 * film + 0.1 * film.mean()) if bucket == 127 else moved(picture, bucket / 127)


def test_a_model_that_does_what_it_is_asked_is_seen_to_do_so(monkeypatch: Any, tmp_path: Path) -> None:
    found = verdicts(monkeypatch, tmp_path / "a", follow)
    assert found[START] and found[GOOD] and found[LATER]
    sliding = verdicts(monkeypatch, tmp_path / "b", lambda picture, film, bucket: moved(picture, bucket / 127))
    assert sliding[START] and sliding[MOTION]


@pytest.mark.parametrize(
    "fault, model, lost",
    [
        ("the picture is cut", lambda picture, film, bucket: films()[3], START),
        ("the picture is blurred", lambda picture, film, bucket: film.mean((0, 2, 3), True).expand_as(film), GOOD),
        ("it repeats the picture", lambda picture, film, bucket: picture.expand(T, -1, -1, -1), LATER),
        ("time is reversed", lambda picture, film, bucket: film.flip(0), LATER),
        ("the bucket is cut", lambda picture, film, bucket: film, MOTION),
        ("the bucket is turned round", lambda p, film, bucket: moved(p, (255 - bucket) / 127), MOTION),
    ],
)
def test_planted_faults_are_found(fault: str, model: Any, lost: str, monkeypatch: Any, tmp_path: Path) -> None:
    assert not verdicts(monkeypatch, tmp_path, model)[lost], fault


def test_ranks_and_the_claim_about_them() -> None:
    assert stage.rank_correlation([1, 2, 3, 4, 5]) == pytest.approx(1)
    assert stage.rank_correlation([5, 4, 3, 2, 1]) == pytest.approx(-1)
    assert stage.rank_correlation([2, 1, 3]) == pytest.approx(0.5) and stage.rank_correlation([7, 7, 7]) == 0
    assert stage.rank_correlation([1, 1, 2, 2]) == pytest.approx(4 / math.sqrt(20))  # scipy.stats.spearmanr
    draw = np.random.default_rng(0)
    margins = [stage.motion_claim(draw.normal(size=(8, 5)), "").margin or 0.0 for _ in range(2000)]
    assert np.std(margins) == pytest.approx(1, abs=0.05), "without a relation it is a standard score"
    assert stage.motion_claim(np.tile(np.arange(5.0), (8, 1)), "").margin == pytest.approx(math.sqrt(32))


def random_unet(folder: Path, channels: int, **options: Any) -> None:
    unet = UNet(
        UNetConfig(
            in_channels=channels, block_out_channels=(32, 32), attention_levels=(True, False), layers_per_block=1,
            head_channels=16, cross_attention_dim=WIDTH, id_embedding_dim=8, ids=3, **options,
        )
    )  # fmt: skip
    save_unet(randomised(unet), folder / "unet")


def write_inputs(folder: Path) -> dict[str, Path]:
    """A latent cache of random clips, random networks, a LoRA that changes nothing and one that does."""
    random_unet(folder / "image-to-video", 8)
    random_unet(folder / "frame-interpolation", 9, learned_mask=True, mask_size=(16, 24))
    for motion, size in (("horizontal", 0.0), ("zoom", 1.0)):
        unet = load_unet(folder / "image-to-video" / "unet")
        add_lora(unet, 2, 2.0, motion)
        for name, weight in unet.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=size)
        save_lora(unet, folder / "camera-lora" / motion, motion)
    config = AutoencoderConfig(block_out_channels=(8, 8), layers_per_block=1, norm_groups=4, scaling_factor=1.0)
    save_autoencoder(Autoencoder(config), folder / "autoencoder")
    toy = encoders.toy_config(WIDTH, WIDTH)
    encoders.save_toy(encoders.build_clip(toy, "test"), toy, folder / "encoders")
    tensors = {
        "moments": torch.randn(4, 5, 8, 16, 24).bfloat16(),
        "image": torch.randn(4, 5, WIDTH).half(),
        "frame": torch.randint(0, 256, (4, 3, 32, 48), dtype=torch.uint8),
    }
    write_shard(folder / "latents" / "shards" / "toy.safetensors", tensors)
    about = {"geometry": "5x32x48", "split": "test", "fps": 8.0, "motion_bucket": 90, "camera": "pan-left"}
    about |= {"shard": "toy.safetensors", "captions": [], "elevation": 0.0}
    rows = [{"sample_id": f"s{k}", "clip_id": f"c{k}", "row": k, **about} for k in range(4)]
    facts = {"scaling_factor": 1.0, "autoencoder": checkpoint_hash(folder / "autoencoder")}
    write_index(folder / "latents", rows, facts, torch.zeros(3, WIDTH))
    names = ("image-to-video", "frame-interpolation", "camera-lora", "autoencoder", "encoders", "latents")
    return {name: folder / name for name in names}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def small_context(folder: Path, inputs: dict[str, Path]) -> StageContext:
    phase = {**load_preset(TINY).image_to_video.phases[0].model_dump(), "frames": 5, "height": 32, "width": 48}
    sections = ("image_pretraining", "video_pretraining", "high_quality_finetuning", "camera_lora")
    sections = (*sections, "frame_interpolation", "image_to_video")
    overrides: dict[str, Any] = {f"{section}.phases": [phase] for section in sections}
    overrides |= {"latents.geometries": [{"frames": 5, "height": 32, "width": 48}], "encoders.toy_width": WIDTH}
    small = {"image_to_video.clips": 3, "image_to_video.motion_clips": 2, "image_to_video.buckets": [0, 200]}
    small |= {"image_to_video.sampling.steps": 1, "branches.lora_clips": 2, "branches.lora_sampling.steps": 1}
    small |= {"branches.interpolation_clips": 2, "branches.interpolation_sampling.steps": 1}
    overrides |= {f"evaluation.{name}": value for name, value in small.items()}
    overrides["camera_lora.motions"] = ["horizontal", "zoom"]
    folder.joinpath("work").mkdir()
    return StageContext(load_preset(TINY, overrides), inputs, folder / "out", folder / "work")


def test_the_stage_end_to_end(inputs: dict[str, Path], tmp_path: Path) -> None:
    report = stage.run(small_context(tmp_path, inputs))
    assert len(read_claims(tmp_path / "out")) == 5 and report.metrics["clips"] == 3
    assert {"flow_bucket_0", "flow_bucket_200", "psnr_first", "psnr_repeated"} <= report.metrics.keys()
    assert json.loads((tmp_path / "out/protocol.json").read_text())["digest"] == report.metrics["protocol"]
    assert (tmp_path / "out/samples/sheet.png").stat().st_size > 0


def test_the_branches_end_to_end(inputs: dict[str, Path], tmp_path: Path) -> None:
    report = branches.run(small_context(tmp_path, inputs))
    claims = read_claims(tmp_path / "out")
    assert [claim.n for claim in claims] == [2] * 4 and "zoom" in report.summary
    assert claims[0].value == claims[0].control_value and claims[0].margin == 0, "a LoRA that changes nothing"
    clips = {path.parent.name: np.load(path) for path in (tmp_path / "work").rglob("00000.npy")}
    assert np.array_equal(clips["horizontal"], clips["without"]) and not np.array_equal(clips["zoom"], clips["without"])
    assert clips["interpolated"].shape == (5, 32, 48, 3)
    assert {"interpolation_psnr", "interpolation_psnr_blend", "camera_zoom"} <= report.metrics.keys()
    assert {path.name for path in (tmp_path / "out/samples").iterdir()} == {"loras.png", "interpolation.png"}


def test_a_lora_is_judged_by_its_own_motion() -> None:
    frames = [render_clip(World(0, "test"), k, 8, 64, 96, 8) for k in range(60)]
    pans = [clip.frames for clip in frames if clip.scene.camera.startswith("pan")]
    others = [clip.frames for clip in frames if not clip.scene.camera.startswith("pan")][: len(pans)]
    seen = {name: cameras_of(found, [8.0] * len(found)) for name, found in (("horizontal", pans), (BASE, others))}
    assert lora_claim("horizontal", seen["horizontal"], seen[BASE], "").shown
    assert not lora_claim("horizontal", seen[BASE], seen[BASE], "").shown, "a LoRA that was skipped changes nothing"
    assert not lora_claim("zoom", seen["horizontal"], seen[BASE], "").shown


def test_a_blend_is_linear_and_keeps_the_ends() -> None:
    clips = films()[:, :5]
    made = blended(clips)
    assert torch.equal(made[:, 0], clips[:, 0]) and torch.allclose(made[:, -1], clips[:, -1])
    assert torch.allclose(made[:, 2], (clips[:, 0] + clips[:, 4]) / 2)
    assert psnr(clips, clips) == [100.0] * N and len(as_frames(made)) == N


def test_latents_of_another_autoencoder_are_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = AutoencoderConfig(block_out_channels=(8, 8), layers_per_block=1, norm_groups=4, scaling_factor=1.0)
    save_autoencoder(Autoencoder(config), tmp_path / "other")
    with pytest.raises(UserError, match=r"these latents are of the autoencoder \w{12}, not of \w{12}"):
        stage.run(small_context(tmp_path, {**inputs, "autoencoder": tmp_path / "other"}))
