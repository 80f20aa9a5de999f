"""`svd generate` on small random networks."""

import inspect
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from generate_fixtures import QUICK, SIZE, STAGES, small_unet
from typer.testing import CliRunner

from flows.cli import generate as generate_cli
from flows.cli.generate import generate_app
from flows.cli.generate_results import UNRECORDED
from svd.config.load import load_preset
from svd.core.errors import UserError
from svd.generation import models as loading
from svd.generation import safety
from svd.media import watermark
from svd.media.clips import load_video
from svd.media.video import read_comment, read_frames, write_mp4
from svd.model.lora import add_lora, save_lora
from svd.model.unet import UNet


def test_text_writes_one_file_a_prompt_with_metadata(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a blue box\n")
    paths = run("text", "A red ball!", "-f", "prompts.txt", "--seed", 5, "--guidance", 2, *SIZE, *QUICK)
    assert paths == ["generated/a-red-ball-5.mp4", "generated/a-blue-box-6.mp4"]
    frames, fps = read_frames(tmp_path / paths[0])
    assert frames.shape == (3, 64, 96, 3)
    assert fps == 7
    metadata = read_comment(tmp_path / paths[0])
    assert metadata["prompt"] == "A red ball!"
    assert (metadata["seed"], metadata["steps"], metadata["guidance"], metadata["motion"]) == ("5", "2", "2.0", "127")


# A value of every option that isn't its default's, for `test_a_file_says_how_to_make_it_again`.
CHOSEN = {
    "preset": "tiny",
    "lora": "zoom:3.0",
    "objective": "discrete-v",
    "dtype": "bfloat16",
    "decode_chunk": 2,
    "decode_overlap": 1,
    "steps": 2,
    "solver": "heun",
    "sigma_max": 12.0,
    "fps": 9.0,
    "motion": 90,
    "frames": 4,
    "height": 64,
    "width": 96,
    "watermark": True,
    "safety_heads": "heads.npz",
    "safety_model": "some-clip",
    "safety_weights": "some-weights",
    "motion_prompt": "panning",
    "guidance": 2.5,
    "guidance_min": 1.5,
    "guidance_max": 2.5,
    "ramp": "constant",
    "cond_aug": 0.5,
    "rounds": 2,
    "elevation": 12.0,
    "views": 4,
    "size": 64,
}
# Inputs, and the names under which files have them.
GIVEN = {"prompts": "prompt", "prompts_file": "prompt", "pictures": "picture", "video": "video"}
MADE_BY = {"text": 0, "image": 1, "multiview": 2, "interpolate": 3}  # place in STAGES


def arguments_of(command: str, values: dict) -> list[object]:
    """The command line that sets every option in `values`."""
    line: list[object] = [command]
    for name, value in values.items():
        option = f"--{name.replace('_', '-')}"
        for item in value if isinstance(value, list) else [value]:
            line += [option] if item is True else [option, item]
    return line


@pytest.mark.parametrize("command", MADE_BY)
def test_a_file_says_how_to_make_it_again(command, run, tmp_path, trained, picture, monkeypatch):
    """Every option of the command stands in the file, under its name; set to these values, the clip comes again."""
    stage, sizes = list(STAGES.items())[MADE_BY[command]]
    unet = small_unet(*sizes)
    add_lora(unet, 2, 2.0, "zoom", context_tokens=77)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_lora(unet, tmp_path / "zoom", "zoom")
    flags = SimpleNamespace(apply=lambda clip: (1 - clip, False))
    monkeypatch.setattr(safety, "load_safety_filter", lambda heads, clip: flags)
    networks = {"model": f"tiny/{stage}/unet", "autoencoder": "tiny/autoencoder", "encoders": "tiny/encoders"}
    chosen = CHOSEN | {name: trained / path for name, path in networks.items()}
    parameters = set(inspect.signature(getattr(generate_cli, f"generate_{command}")).parameters)
    recorded = sorted(parameters - UNRECORDED - GIVEN.keys())
    given = {"text": "a ball", "interpolate": "given.mp4"}.get(command, picture.name)
    write_mp4(tmp_path / "given.mp4", np.random.default_rng(0).integers(0, 255, (2, 40, 60, 3), np.uint8), 5)

    line = arguments_of(command, {name: chosen[name] for name in recorded})
    (first,) = run(*line, given, "--seed", 5, "--device", "cpu", "--out", "first")
    metadata = read_comment(tmp_path / first)
    read = {name: json.loads(metadata[name]) if name == "lora" else metadata[name] for name in recorded}
    assert read == {name: [chosen[name]] if name == "lora" else str(chosen[name]) for name in recorded}
    assert metadata["seed"] == "5" and given in (metadata.get("prompt"), metadata.get("picture"), metadata.get("video"))

    again = {name: True if value == "True" else value for name, value in read.items()}
    (second,) = run(*arguments_of(command, again), given, "--seed", metadata["seed"], "--device", "cpu", "-o", "second")
    assert read_comment(tmp_path / second) == metadata
    assert np.array_equal(read_frames(tmp_path / first)[0], read_frames(tmp_path / second)[0])


def test_what_was_left_to_defaults_is_written_out(run, tmp_path, trained):
    (path,) = run("text", "a ball", *SIZE, *QUICK)
    metadata = read_comment(tmp_path / path)
    expected = {"dtype": "float32", "objective": "edm", "solver": "dpmpp_2m", "fps": "7.0", "frames": "3", "rho": "7.0"}
    assert metadata.items() >= expected.items()
    assert metadata["model"] == str(trained / "tiny/high-quality-finetuning/unet")
    assert not any("safety" in name or name == "lora" for name in metadata)


def test_more_frames_or_pixels_than_trained_are_warned_of(run, caplog):
    loading._warn_once.cache_clear()
    learned = load_preset("tiny").high_quality_finetuning.phases[-1]
    size = ["--height", "128", "--width", "96"]
    for _ in range(2):
        run("text", "a ball", "--frames", 9, *size, *QUICK)
    (line,) = caplog.messages
    trained = f"9 frames (trained on {learned.frames}) and 128x96 (trained on {learned.height}x{learned.width})"
    assert line.startswith(f"{trained}: more than this model has learned")
    assert "\n" not in line
    caplog.clear()
    run("text", "a ball", "--frames", learned.frames, "--height", learned.height, "--width", learned.width, *QUICK)
    assert not caplog.messages


def test_interpolation_scales_the_video(run, tmp_path):
    write_mp4(tmp_path / "odd.mp4", np.full((2, 50, 70, 3), 99, np.uint8), 5)
    with pytest.raises(UserError, match=r"size 50x70: .* multiples of 4"):
        run("interpolate", "odd.mp4", *QUICK)
    for options, size in (
        (["--height", 32], (32, 44)),
        (["--width", 96], (68, 96)),
        (["--height", 8, "--width", 8], (8, 8)),
    ):
        (path,) = run("interpolate", "odd.mp4", *options, "--format", "png", *QUICK)
        clip = load_video(tmp_path / path)[0]
        assert clip.shape == (5, 3, *size)
        shutil.rmtree(tmp_path / path)


def test_batches_and_repeats_give_the_same_clips(run, tmp_path):
    together = run("text", "a ball", "--count", 2, "--batch", 2, "--format", "png", *SIZE, *QUICK)
    assert together == ["generated/a-ball-0", "generated/a-ball-1"]
    alone = run("text", "a ball", "--seed", 1, "--out", "again", "--format", "png", *SIZE, *QUICK)
    first, second = load_video(tmp_path / together[1])[0], load_video(tmp_path / alone[0])[0]
    assert (first - second).abs().max() <= 2 / 255


def test_image_starts_from_pictures(run, tmp_path, picture):
    paths = run("image", picture, "--out", "film.gif", "--fps", 10, *SIZE, *QUICK)
    assert paths == ["film.gif"]
    clip, fps = load_video(tmp_path / "film.gif")
    assert clip.shape == (3, 3, 64, 96)
    assert fps == 10


def test_multiview_and_interpolation(run, tmp_path, picture):
    (orbit,) = run("multiview", picture, "--views", 4, "--size", 64, "--elevation", 10, *QUICK)
    assert read_frames(tmp_path / orbit)[0].shape == (4, 64, 64, 3)
    (longer,) = run("interpolate", orbit, "--out", "smooth.mp4", *QUICK)
    frames, fps = read_frames(tmp_path / longer)
    assert len(frames) == 13
    assert fps == 28


def test_watermark_lora_and_offloading(run, tmp_path, trained):
    plain, marked, lora = (["text", "a ball", *SIZE, *QUICK, "--format", "png", "--out", n] for n in "abc")
    (before,) = run(*plain)
    (after,) = run(*marked, "--watermark", "--offload", "--sequential", "--decode-chunk", 2)
    frames = (load_video(tmp_path / after)[0].permute(0, 2, 3, 1) * 255).round().byte().numpy()
    assert watermark.read(frames) == watermark.MESSAGE
    unet = small_unet(4, 2)
    add_lora(unet, 2, 2.0, "zoom", context_tokens=77)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    save_lora(unet, tmp_path / "zoom", "zoom")
    (changed,) = run(*lora, "--lora", "zoom:3")
    assert not torch.equal(load_video(tmp_path / changed)[0], load_video(tmp_path / before)[0])
    with pytest.raises(UserError, match="'much' is no number"):
        run(*lora, "--lora", "zoom:much")
    with pytest.raises(UserError, match="zoom is given twice"):
        run(*lora, "--lora", "zoom", "--lora", "zoom:0.5")


def test_compiled_networks_make_the_same_clip(run, tmp_path, monkeypatch):
    """By graph capture alone: generating code for a CPU takes minutes."""
    compiled = []
    original = UNet.compile_blocks

    def capture(unet):
        compiled.append(unet)
        original(unet, backend="eager", fullgraph=True)

    monkeypatch.setattr(UNet, "compile_blocks", capture)
    line = ["text", "a ball", *SIZE, *QUICK, "--format", "png", "--out"]
    (plain,), (fast,) = run(*line, "a"), run(*line, "b", "--compile", "--offload")
    assert len(compiled) == 1 and all(block._compiled_call_impl is not None for block in compiled[0].blocks())
    assert (load_video(tmp_path / plain)[0] - load_video(tmp_path / fast)[0]).abs().max() <= 1 / 255


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["text"], "no prompt"),
        (["text", "a", "b", "-o", "x.mp4"], "a file holds one clip, not 2"),
        (["text", "a", "-o", "x.avi"], r"unknown format '\.avi'"),
        (["text", "a", "-m", "nowhere"], r"nowhere: no such model; run `svd stage high-quality-finetuning -p tiny`"),
        (["text", "a", "--device", "cuda:77"], "device 'cuda:77' can't be used"),
        (["text", "a", "--height", "63", *QUICK], "multiples of 4"),
        (["image", "absent.png"], r"absent\.png: no such file"),
        (["interpolate", "absent.mp4"], r"absent\.mp4: not a readable video"),
    ],
)
def test_mistakes_are_one_line(run, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        run(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("command", ["text", "image", "interpolate", "multiview"])
def test_help_explains_every_option(command):
    result = CliRunner().invoke(generate_app, [command, "--help"], env={"COLUMNS": "140"})
    assert result.exit_code == 0
    for option in (
        "--model",
        "--device",
        "--dtype",
        "--offload",
        "--seed",
        "--steps",
        "--watermark",
        "--lora",
        "--compile",
    ):
        assert option in result.output


def test_the_sampling_is_the_tasks_own_and_no_evaluations(run, picture, tmp_path, monkeypatch):
    """`--preset` may be a file; the networks are those of the preset that it names."""
    import svd.generation

    def made(models, images, *, frames, height, width, sampling, **options):
        used.append(sampling)
        return torch.zeros(len(images), frames, 3, height, width)

    used = []
    monkeypatch.setattr(svd.generation, "image_to_video", made)
    own = {"generation.image_to_video.sampling": {"steps": 4}}
    evaluations = {f"evaluation.{part}.sampling.steps": 3 for part in ("ucf101", "multiview")}
    for number, changes in enumerate(({}, evaluations, own)):
        preset = tmp_path / f"{number}.yaml"
        preset.write_text(load_preset("tiny", changes).model_dump_json())
        run("image", picture, "-p", preset, *SIZE, "--device", "cpu")
    usual = load_preset("tiny").generation.image_to_video.sampling.steps
    assert [sampling.steps for sampling in used] == [usual, usual, 4] and usual != 4
    assert used[0] == used[1]
