"""Generation with small random networks."""

import dataclasses
import functools
import math

import pytest
import torch

from svd.config import EncodersConfig, Sampling
from svd.core.errors import UserError
from svd.diffusion import denoising
from svd.diffusion.sampler import noise_levels
from svd.generation import Models, image_to_video, interpolate, load_models, multiview, text_to_video
from svd.generation import models as loading
from svd.media.resize import cover
from svd.model.autoencoder import Autoencoder, AutoencoderConfig, posterior_mean
from svd.model.formats.clip import build_clip, save_toy, toy_config
from svd.model.formats.folders import save_autoencoder, save_unet
from svd.model.unet import UNet, UNetConfig
from svd.tasks.prompts import read_prompts

QUICK = Sampling(steps=3, guidance=2.0, sigma_max=80)
TOY = EncodersConfig(kind="toy-clip")
TEXT = {"frames": 3, "height": 16, "width": 32, "fps": 8, "motion_bucket": 100, "sampling": QUICK, "progress": False}


def random_unet(in_channels: int, ids: int, **options) -> UNet:
    """Fresh networks end in zeros; every weight is random here so that the output depends on every input."""
    config = UNetConfig(
        in_channels=in_channels,
        ids=ids,
        block_out_channels=(32, 64),
        attention_levels=(True, True),
        layers_per_block=1,
        head_channels=16,
        cross_attention_dim=32,
        id_embedding_dim=16,
        **options,
    )
    unet = UNet(config)
    for name, parameter in unet.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5 / math.sqrt(parameter[0].numel()))
        elif "mask" in name:
            torch.nn.init.normal_(parameter)
    return unet.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    autoencoder = Autoencoder(AutoencoderConfig(block_out_channels=(32, 32), layers_per_block=1, scaling_factor=0.5))
    for name, parameter in autoencoder.named_parameters():
        if "temporal" in name and parameter.ndim > 1:  # fresh temporal branches are zero
            torch.nn.init.normal_(parameter, std=0.05)
    save_autoencoder(autoencoder, root / "autoencoder")
    config = toy_config(16, 32)
    save_toy(build_clip(config, "test"), config, root / "encoders")
    kinds = {"text": (4, 2), "image": (8, 3), "views": (8, 4), "released": (8, 3)}
    for name, (channels, ids) in kinds.items():
        save_unet(random_unet(channels, ids), root / name)
    save_unet(random_unet(9, 3, learned_mask=True, mask_size=(4, 8)), root / "interpolation")
    save_unet(random_unet(4, 0, temporal=False), root / "still")
    return root


@pytest.fixture(scope="module")
def models(folders):
    @functools.cache
    def load(name):
        return load_models(folders / name, folders / "autoencoder", folders / "encoders", TOY)

    return load


class Spy:
    """Records what the U-Net is called with."""

    def __init__(self, models, monkeypatch):
        self.calls = []
        forward = models.unet.forward

        def spy(x, c_noise, context, ids=None, **keywords):
            self.calls.append({"x": x, "c_noise": c_noise, "context": context, "ids": ids, **keywords})
            return forward(x, c_noise, context, ids, **keywords)

        monkeypatch.setattr(models.unet, "forward", spy)


def pictures(count=2, height=16, width=32, seed=1):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def test_text_to_video_shape_range_and_seeds(models):
    loaded = models("text")
    clips = text_to_video(loaded, ["a ball", "a box"], seed=5, **TEXT)
    assert clips.shape == (2, 3, 3, 16, 32)
    assert clips.dtype == torch.float32
    assert clips.min() >= 0
    assert clips.max() <= 1
    assert clips.std() > 0.01
    torch.testing.assert_close(text_to_video(loaded, ["a ball", "a box"], seed=[5, 6], **TEXT), clips)
    other = text_to_video(loaded, ["a ball", "a box"], seed=[5, 7], **TEXT)
    assert not torch.allclose(other[1], clips[1], atol=1e-3)


def test_a_batch_gives_the_same_clips_as_single_runs(models):
    loaded = models("text")
    prompts = ["a ball", "a box", "nothing at all"]
    together = text_to_video(loaded, prompts, seed=[3, 1, 2], **TEXT)
    for number, (prompt, seed) in enumerate(zip(prompts, [3, 1, 2], strict=True)):
        torch.testing.assert_close(
            text_to_video(loaded, [prompt], seed=seed, **TEXT)[0], together[number], atol=2e-5, rtol=1e-4
        )
    from_pictures = models("image")
    options = TEXT | {"cond_aug": 0.5}
    together = image_to_video(from_pictures, pictures(), seed=[8, 9], **options)
    alone = image_to_video(from_pictures, pictures()[1:], seed=9, **options)
    torch.testing.assert_close(alone[0], together[1], atol=2e-5, rtol=1e-4)


def test_prompt_motion_and_rate_reach_the_network(models, monkeypatch):
    loaded = models("text")
    spy = Spy(loaded, monkeypatch)
    text_to_video(loaded, ["a ball"], seed=0, **TEXT)
    call = spy.calls[0]
    assert call["x"].shape == (2, 3, 4, 8, 16)  # both passes in one batch, unconditional first
    assert call["ids"].tolist() == [[7, 100], [7, 100]]
    torch.testing.assert_close(call["context"], loaded.encoders.text(["", "a ball"]))
    assert call["time_context_BLD"] is None
    assert call["c_noise"].tolist() == pytest.approx([math.log(80) / 4] * 2)
    assert len(spy.calls) == 3


def test_guidance_one_runs_the_network_once(models, monkeypatch):
    loaded = models("text")
    spy = Spy(loaded, monkeypatch)
    text_to_video(loaded, ["a ball"], seed=0, **TEXT | {"sampling": QUICK.model_copy(update={"guidance": 1.0})})
    assert [len(call["x"]) for call in spy.calls] == [1, 1, 1]


def test_sequential_passes_give_the_batched_result(models):
    loaded = models("text")
    batched = text_to_video(loaded, ["a ball"], seed=0, **TEXT)
    one_by_one = dataclasses.replace(loaded, passes="sequential")
    torch.testing.assert_close(text_to_video(one_by_one, ["a ball"], seed=0, **TEXT), batched, atol=2e-5, rtol=1e-4)


def test_temporal_prompting(models, monkeypatch):
    loaded = models("text")
    plain = text_to_video(loaded, ["a ball"], seed=0, **TEXT)
    same = text_to_video(loaded, ["a ball"], seed=0, motion_prompt="a ball", **TEXT)
    torch.testing.assert_close(same, plain, atol=1e-5, rtol=1e-4)
    spy = Spy(loaded, monkeypatch)
    panning = text_to_video(loaded, ["a ball"], seed=0, motion_prompt="panning", **TEXT)
    assert not torch.allclose(panning, plain, atol=1e-4)
    torch.testing.assert_close(spy.calls[0]["time_context_BLD"], loaded.encoders.text(["", "panning"]))
    torch.testing.assert_close(spy.calls[0]["context"], loaded.encoders.text(["", "a ball"]))


def test_image_model_makes_pictures(models):
    clips = text_to_video(models("still"), ["a ball"], seed=0, **TEXT | {"frames": 1})
    assert clips.shape == (1, 1, 3, 16, 32)
    with pytest.raises(UserError, match="image model: it makes 1 frame, not 3"):
        text_to_video(models("still"), ["a ball"], seed=0, **TEXT)


def test_image_conditioning_follows_the_released_code(models, monkeypatch):
    """Clean picture to CLIP, noisy picture's unscaled latent mean to every frame, zeros without condition, fps - 1."""
    loaded = models("image")
    spy = Spy(loaded, monkeypatch)
    image_to_video(loaded, pictures(1), seed=4, cond_aug=0.3, **TEXT)
    call = spy.calls[0]
    assert call["ids"].tolist() == [pytest.approx([7, 100, 0.3])] * 2
    frame = pictures(1) * 2 - 1
    torch.testing.assert_close(call["context"][1:], loaded.encoders.image(frame)[:, None])
    assert call["context"][0].abs().max() == 0
    noise = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(4))
    latent = posterior_mean(loaded.autoencoder.encode((frame + 0.3 * noise)[:, None]))[0, 0]
    assert call["x"].shape == (2, 3, 8, 8, 16)
    for t in range(3):
        torch.testing.assert_close(call["x"][1, t, 4:], latent, atol=1e-5, rtol=1e-4)
    assert call["x"][0, :, 4:].abs().max() == 0


def test_guidance_ramps_over_the_frames(models, monkeypatch):
    loaded = models("image")
    seen = []
    real = denoising.guided
    monkeypatch.setattr(denoising, "guided", lambda *a: seen.append(a[3]) or real(*a))
    image_to_video(loaded, pictures(1), seed=0, **TEXT)
    image_to_video(loaded, pictures(1), seed=0, guidance_range=(1.5, 2.5), ramp="triangle", **TEXT)
    image_to_video(loaded, pictures(1), seed=0, guidance_range=(1.5, 2.5), ramp="constant", **TEXT)
    assert [scale.tolist() for scale in seen] == [[1, 2, 3], [1.5, 2.5, 1.5], [2.5, 2.5, 2.5]]


def test_pictures_of_another_size_are_cropped_to_cover(models):
    wide = image_to_video(models("image"), pictures(1, 40, 200), seed=0, **TEXT)
    assert wide.shape == (1, 3, 3, 16, 32)
    picture = torch.zeros(1, 3, 10, 40)
    picture[..., 15:25] = 1
    assert cover(picture, 20, 20).shape == (1, 3, 20, 20)
    assert cover(picture, 20, 20).mean() > 0.95
    assert cover(pictures(1, 7, 9), 7, 9).equal(pictures(1, 7, 9))
    with pytest.raises(ValueError, match="pictures must be"):
        cover(torch.zeros(3, 4, 4), 4, 4)


def test_multiview_takes_an_elevation_each(models, monkeypatch):
    loaded = models("views")
    spy = Spy(loaded, monkeypatch)
    views = multiview(loaded, pictures(2, 16, 16), [0.0, 30.0], 4, sampling=QUICK, seed=0, progress=False)
    assert views.shape == (2, 4, 3, 16, 16)
    expected = [[6, 127, 0.02, math.radians(90)], [6, 127, 0.02, math.radians(60)]]
    assert spy.calls[0]["ids"].tolist() == [pytest.approx(row) for row in expected * 2]
    with pytest.raises(UserError, match="no elevation input"):
        multiview(models("image"), pictures(1, 16, 16), 0.0, 4, sampling=QUICK, seed=0)
    with pytest.raises(UserError, match="3 elevations for 1 clips"):
        multiview(loaded, pictures(1, 16, 16), [0.0, 1.0, 2.0], 4, sampling=QUICK, seed=0)


def interpolated(loaded, video, **options):
    settings = {"fps": 7, "motion_bucket": 127, "sampling": QUICK, "seed": 0, "progress": False} | options
    return interpolate(loaded, video, **settings)


def test_interpolation_counts_and_groups(models):
    loaded = models("interpolation")
    video = pictures(4)
    result = interpolated(loaded, video)
    assert result.shape == (13, 3, 16, 32)
    torch.testing.assert_close(interpolated(loaded, video, windows_at_once=1), result, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(interpolated(loaded, video, seed=1), result, atol=1e-3)
    assert interpolated(loaded, video[:2], rounds=2).shape == (17, 3, 16, 32)


def test_twenty_eight_frames_become_109(models):
    quick = Sampling(steps=1, guidance=1.0)
    assert interpolated(models("interpolation"), pictures(28), sampling=quick).shape[0] == 109


def test_interpolation_conditioning(models, monkeypatch):
    """Nine channels: noisy latents, ends with the learned mask between them, and the mask; two CLIP tokens."""
    loaded = models("interpolation")
    spy = Spy(loaded, monkeypatch)
    video = pictures(3)
    decoded = []
    real = Models.decode
    monkeypatch.setattr(Models, "decode", lambda m, z, p: decoded.append(z) or real(m, z, p))
    interpolated(loaded, video, cond_aug=0.0)
    call = spy.calls[0]
    assert call["x"].shape == (4, 5, 9, 8, 16)
    keys = posterior_mean(loaded.autoencoder.encode((video * 2 - 1)[None]))[0]
    torch.testing.assert_close(call["x"][2, 0, 4:8], keys[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(call["x"][3, 4, 4:8], keys[2], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(call["x"][2, 1, 4:8], loaded.unet.masked_latent(8, 16))
    assert call["x"][:, :, 8].amax((2, 3)).tolist() == [[1, 0, 0, 0, 1]] * 4
    assert call["x"][:2, [0, 4], 4:8].abs().max() == 0
    tokens = loaded.encoders.image(video * 2 - 1)
    torch.testing.assert_close(call["context"][2:], torch.stack([tokens[:2], tokens[1:]], 1))
    assert call["ids"][0].tolist() == [27, 127, 0]
    torch.testing.assert_close(decoded[0][0, ::4], keys * 0.5, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 18}, r"multiples of 4 .* nearest size is 16x32"),
        ({"width": 0}, "multiples of 4"),
        ({"frames": 0}, "at least 1 frame"),
        ({"seed": [1, 2]}, "2 seeds for 1 clips"),
        ({"seed": -1}, "between 0 and"),
        ({"prompts": []}, "no prompts"),
    ],
)
def test_requests_that_do_not_fit_are_refused(models, options, message):
    with pytest.raises(UserError, match=message):
        text_to_video(models("text"), **{"prompts": ["a"], "seed": 0} | TEXT | options)


def test_more_frames_than_trained_are_warned_of_once(models, caplog):
    """The number stands in the U-Net's config.json; nothing is refused."""
    loading._warn_once.cache_clear()
    loaded = models("text")
    assert loaded.trained_frames == 14
    still = TEXT | {"height": 8, "width": 8, "sampling": Sampling(steps=1, guidance=1.0)}
    for frames in (14, 15, 15):
        assert text_to_video(loaded, ["a"], seed=0, **still | {"frames": frames}).shape[1] == frames
    assert [line.split(":")[0] for line in caplog.messages] == ["15 frames (trained on 14)"]


def test_models_of_another_task_are_refused(models):
    with pytest.raises(UserError, match=r"8 input channels \(image-to-video or multi-view\), the task needs 4"):
        text_to_video(models("image"), ["a"], seed=0, **TEXT)
    with pytest.raises(UserError, match="needs 8"):
        image_to_video(models("text"), pictures(1), seed=0, **TEXT)
    with pytest.raises(UserError, match="needs 9"):
        interpolated(models("text"), pictures(2))
    with pytest.raises(UserError, match="at least 2 frames"):
        interpolated(models("interpolation"), pictures(1))


def test_loading_refuses_what_does_not_fit(folders, tmp_path):
    with pytest.raises(UserError, match="device 'no-such'"):
        load_models(folders / "text", folders / "autoencoder", folders / "encoders", TOY, "no-such")
    config = toy_config(16, 48)
    save_toy(build_clip(config, "test"), config, tmp_path)
    with pytest.raises(UserError, match=r"cross-attention width 32, the encoders .* give 48"):
        load_models(folders / "text", folders / "autoencoder", tmp_path, TOY)
    with pytest.raises(UserError, match="nowhere"):
        load_models(tmp_path / "nowhere", folders / "autoencoder", folders / "encoders", TOY)


def test_bfloat16_stays_close_to_float32(models, folders):
    exact = text_to_video(models("text"), ["a ball"], seed=0, **TEXT)
    half = load_models(folders / "text", folders / "autoencoder", folders / "encoders", TOY, dtype=torch.bfloat16)
    assert next(half.unet.parameters()).dtype == torch.bfloat16
    assert (text_to_video(half, ["a ball"], seed=0, **TEXT) - exact).abs().mean() < 0.02


def moved(loaded, monkeypatch):
    """The moves of networks to the device and back, as they happen."""
    moves = []
    for name, module in (("image", loaded.encoders.image), ("vae", loaded.autoencoder), ("unet", loaded.unet)):
        real = module.to
        monkeypatch.setattr(module, "to", lambda where, n=name, r=real: moves.append((n, str(where))) or r(where))
    return moves


def test_interpolation_moves_the_unet_once_for_a_group_of_windows(models, monkeypatch):
    loaded = dataclasses.replace(models("interpolation"), offload=True)
    moves = moved(loaded, monkeypatch)
    longer = interpolated(loaded, pictures(4), windows_at_once=2)
    torch.testing.assert_close(longer, interpolated(models("interpolation"), pictures(4), windows_at_once=2))
    there_and_back = [name for name, _ in moves][::2]
    assert there_and_back == ["image", "vae", "unet", "unet", "vae"]


def test_offloading_moves_each_network_to_the_device_and_back(models, monkeypatch):
    loaded = dataclasses.replace(models("image"), offload=True)
    moves = moved(loaded, monkeypatch)
    clips = image_to_video(loaded, pictures(1), seed=0, **TEXT)
    torch.testing.assert_close(clips, image_to_video(models("image"), pictures(1), seed=0, **TEXT))
    assert [name for name, _ in moves] == ["image", "image", "vae", "vae", "unet", "unet", "vae", "vae"]


def test_chunked_decoding(models):
    loaded = models("text")
    options = TEXT | {"frames": 6}
    whole = text_to_video(loaded, ["a ball"], seed=0, **options)
    chunked = text_to_video(
        dataclasses.replace(loaded, decode_chunk=3, decode_overlap=0), ["a ball"], seed=0, **options
    )
    faded = text_to_video(dataclasses.replace(loaded, decode_chunk=4, decode_overlap=2), ["a ball"], seed=0, **options)
    assert whole.shape == chunked.shape == faded.shape
    assert not torch.equal(whole, chunked)
    assert (whole - chunked).abs().mean() < 0.05


def test_discrete_models_use_their_own_levels():
    levels = noise_levels(Sampling(steps=10, solver="ddim"), "v")
    assert levels[0] < 14.62
    assert levels[-1] == 0
    cut = noise_levels(Sampling(steps=10, solver="heun"), "eps")
    assert cut[0].item() == pytest.approx(14.6146, rel=1e-4)
    assert cut[-2].item() == pytest.approx(0.02917, rel=1e-3)
    assert noise_levels(Sampling(steps=10, solver="ddim"), "edm-v")[0] == 700


def test_prompts_from_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# a comment\n a red ball \n\nein grüner Würfel\n")
    assert read_prompts(path) == ["a red ball", "ein grüner Würfel"]
    path.write_text("\n# only comments\n")
    with pytest.raises(UserError, match=r"prompts\.txt: holds no prompt"):
        read_prompts(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a readable text file"):
        read_prompts(path)
    with pytest.raises(UserError, match="no such file"):
        read_prompts(tmp_path / "absent.txt")


@pytest.mark.gpu
def test_a_gpu_gives_the_clips_of_the_cpu(models, folders):
    exact = text_to_video(models("text"), ["a ball"], seed=0, **TEXT)
    for dtype, tolerance in ((torch.float32, 2e-3), (torch.bfloat16, 3e-2)):
        on_gpu = load_models(
            folders / "text", folders / "autoencoder", folders / "encoders", TOY, "cuda", dtype=dtype, offload=True
        )
        assert (text_to_video(on_gpu, ["a ball"], seed=0, **TEXT) - exact).abs().mean() < tolerance
