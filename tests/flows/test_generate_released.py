"""`svd generate` on models as they are published: single files, pipelines' folders and their parts."""

import functools
import hashlib
import http.server
import json
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from generate_fixtures import QUICK, SIZE
from PIL import Image
from toy_models import released_layout, toy_autoencoder, toy_unet
from transformers import CLIPTextConfig, CLIPTextModel

from flows.cli import generate_models, generate_options
from svd.config import Sampling
from svd.config.load import load_preset
from svd.core.errors import UserError
from svd.media.video import read_comment, read_frames
from svd.model.formats.convert import convert_model
from svd.model.formats.folders import save_autoencoder, save_unet
from svd.model.formats.sgm import write_sgm


def test_a_released_pipeline_brings_its_own_defaults(tmp_path):
    networks = generate_options.Networks(model=tmp_path)
    phase = load_preset("tiny").image_to_video.phases[-1]
    size = generate_options.Size()
    assert generate_models.clip_size(networks, size, phase) == (phase.frames, phase.height, phase.width)
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "unet/config.json").write_text(json.dumps({"num_frames": 25}))
    assert generate_models.clip_size(networks, size, phase) == (25, 576, 1024)
    assert generate_models.base_sampling(networks, Sampling(steps=3)).steps == 25


def test_a_single_file_is_a_whole_model(run, tmp_path, picture):
    """Its U-Net, autoencoder and image encoder; the same clip as from the folder that it is converted to."""
    write_sgm(tmp_path / "svd_xt.safetensors", released_layout())
    convert_model(tmp_path / "svd_xt.safetensors", tmp_path / "folder", "diffusers")
    clips = []
    for model in ("svd_xt.safetensors", "folder"):
        (path,) = run("image", picture, "-m", model, "--out", model.split(".")[0], *SIZE, *QUICK)
        clips.append(read_frames(tmp_path / path)[0])
    assert clips[0].shape == (3, 64, 96, 3) and clips[0].std() > 10
    assert np.abs(clips[0].astype(float) - clips[1]).mean() < 1
    phase = load_preset("tiny").image_to_video.phases[-1]
    networks = generate_options.Networks(model=tmp_path / "svd_xt.safetensors")
    assert generate_models.clip_size(networks, generate_options.Size(), phase) == (25, 576, 1024)


def published(folder):
    """The folder as diffusers would have written it: without our keys in the configurations."""
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text())
        config.pop("svd", None)
        path.write_text(json.dumps(config))
    return folder


@pytest.fixture
def folder(tmp_path):
    """A released pipeline's folder without its index."""
    write_sgm(tmp_path / "svd.safetensors", released_layout())
    convert_model(tmp_path / "svd.safetensors", tmp_path / "parts", "diffusers")
    (tmp_path / "parts/model_index.json").unlink()
    return published(tmp_path / "parts")


def test_a_pipelines_folder_without_its_index_is_a_whole_model(run, tmp_path, picture, folder):
    clips = []
    for model in ("svd.safetensors", "parts"):
        (path,) = run("image", picture, "-m", model, "--out", model.split(".")[0], *SIZE, *QUICK)
        clips.append(read_frames(tmp_path / path)[0])
    assert np.abs(clips[0].astype(float) - clips[1]).mean() < 1
    assert read_comment(tmp_path / path).items() >= {"autoencoder": "parts", "encoders": "parts"}.items()
    phase = load_preset("tiny").image_to_video.phases[-1]
    for model in (folder, folder / "unet"):
        networks = generate_options.Networks(model=model)
        assert generate_models.clip_size(networks, generate_options.Size(), phase) == (14, 576, 1024)
        assert generate_models.base_sampling(networks, Sampling(steps=3)).steps == 25


def test_a_released_models_missing_parts_are_asked_for(run, tmp_path, picture, folder, trained):
    """The preset's own networks don't stand in for them, but they do for a model that was trained here."""
    (folder / "vae").rename(tmp_path / "vae")
    (folder / "image_encoder").rename(tmp_path / "image_encoder")
    line = ["image", picture, "-m", "parts", *SIZE, *QUICK]
    with pytest.raises(UserError, match=r"^parts: no vae/ in this folder; give the autoencoder with --autoencoder$"):
        run(*line)
    with pytest.raises(UserError, match=r"^parts: no image_encoder/ or text_encoder/ in this folder; .* --encoders$"):
        run(*line, "--autoencoder", "vae")
    assert run(*line, "--autoencoder", "vae", "--encoders", ".") == ["generated/cup-0.mp4"]
    with pytest.raises(UserError, match=r"'AutoencoderKLTemporalDecoder' isn't a U-Net"):
        run("image", picture, "-m", "vae", *SIZE, *QUICK)
    (tmp_path / "only").mkdir()
    (tmp_path / "vae").rename(tmp_path / "only/vae")
    with pytest.raises(UserError, match=r"^only/config\.json: no such file, .* there is no U-Net in this folder$"):
        run("image", picture, "-m", "only", *SIZE, *QUICK)
    (orbit,) = run("image", picture, "-m", trained / "tiny/image-to-video", *SIZE, *QUICK)
    assert read_comment(tmp_path / orbit)["autoencoder"] == str(trained / "tiny/autoencoder")


@pytest.fixture
def sd(tmp_path):
    """SD 2.1's folder, small: an image U-Net, an image autoencoder and a text encoder."""
    folder = tmp_path / "sd"
    save_unet(toy_unet(temporal=False, in_channels=4, ids=0), folder / "unet")
    save_autoencoder(toy_autoencoder(temporal=False), folder / "vae")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPTextModel(CLIPTextConfig(**sizes, hidden_act="gelu")).save_pretrained(folder / "text_encoder")
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | {"sample_size": 16}))
    return published(folder)


def test_a_folder_of_stable_diffusion_makes_pictures(run, tmp_path, sd):
    line = ["text", "a ball", "-m", sd, "--objective", "discrete-v", "--format", "png", *QUICK]
    (path,) = run(*line)
    assert np.asarray(Image.open(tmp_path / path)).shape == (128, 128, 3)  # as trained: 8 pixels a latent
    with pytest.raises(UserError, match="this U-Net is an image model: it makes 1 frame, not 2"):
        run(*line, "--frames", 2)
    with pytest.raises(UserError, match="4 input channels"):
        run("image", path, "-m", sd, "--frames", 1)


COMMIT = "5" * 40


class Hub(http.server.SimpleHTTPRequestHandler):
    """Serves a folder as the hub serves the repository ann/svd."""

    def translate_path(self, path):
        return super().translate_path(re.sub(r"^/ann/svd/resolve/\w+", "", path))

    def end_headers(self):
        path = Path(self.translate_path(self.path))
        if path.is_file():
            self.send_header("ETag", f'"{hashlib.sha256(path.read_bytes()).hexdigest()}"')
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", COMMIT)
        super().end_headers()

    def log_message(self, *_):
        """Quiet."""


@pytest.fixture
def hub(folder, monkeypatch, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, directory=folder))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("SVD_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


def test_a_model_of_the_hub_is_fetched_once_and_named_in_the_file(run, tmp_path, picture, folder, hub, monkeypatch):
    (tmp_path / "parts/unet/other.safetensors").write_bytes(b"never asked for")
    line = ["image", picture, *SIZE, *QUICK, "--out"]
    (local,) = run(*line, "local", "-m", "parts")
    (path,) = run(*line, "first", "-m", "ann/svd")
    assert read_comment(tmp_path / path)["origin"] == f"ann/svd@{COMMIT}"
    assert "origin" not in read_comment(tmp_path / local)
    assert np.array_equal(read_frames(tmp_path / path)[0], read_frames(tmp_path / local)[0])
    names = sorted(p.name for p in (tmp_path / "cache/ann--svd").rglob("*.safetensors"))
    assert names == ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors", "model.safetensors"]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    (again,) = run(*line, "second", "-m", "ann/svd")
    assert np.array_equal(read_frames(tmp_path / again)[0], read_frames(tmp_path / path)[0])


def test_what_a_repository_lacks_is_one_line(run, tmp_path, hub):
    expected = r"^--model ann/svd: no such file or folder, and as a repository of the hub: ann/svd/text_encoder/config"
    with pytest.raises(UserError, match=expected + r"\.json: no such file in this repository") as error:
        run("text", "a ball", "-m", "ann/svd")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
