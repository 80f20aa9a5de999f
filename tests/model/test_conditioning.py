"""Encoders, micro-conditioning and noise augmentation."""

import json
import math

import open_clip
import pytest
import torch
from toy_models import toy_unet
from transformers import CLIPTextConfig, CLIPTextModel

from svd.config import EncodersConfig
from svd.core.errors import UserError
from svd.model.encoders import Encoders, ImageEncoder, TextEncoder, from_uint8
from svd.model.formats import clip as clips
from svd.model.formats.clip_names import to_transformers, transformers_config
from svd.model.formats.encoders import load_encoders, load_text_encoder
from svd.model.formats.sgm import SgmParts, read_sgm, stored_config, unet_to_sgm, write_sgm
from svd.model.safetensors import of_module, of_tensor, write_tensors
from svd.tasks.signals import micro_conditioning, noise_augment, polar_angle

TOY = EncodersConfig(kind="toy-clip", toy_width=32)
CONFIG = clips.toy_config(32, 48)


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    return clips.build_clip(CONFIG, "test").eval()


@pytest.fixture(scope="module")
def folder(clip, tmp_path_factory):
    path = tmp_path_factory.mktemp("encoders")
    clips.save_toy(clip, CONFIG, path)
    return path


@pytest.fixture(scope="module")
def encoders(folder) -> Encoders:
    return load_encoders(folder, TOY)


def test_text_context_is_open_clips_penultimate_layer(clip, encoders):
    captions = ["a red ball bouncing", "", "x " * 200]
    tokens = open_clip.get_tokenizer("ViT-H-14")(captions)
    reference = clip.forward_intermediates(text=tokens, normalize_intermediates=True, normalize=False)
    context = encoders.text(captions)
    assert context.shape == (3, 77, encoders.text.width) == (3, 77, 48)
    torch.testing.assert_close(context, reference["text_intermediates"][-2])
    assert not torch.allclose(context, reference["text_intermediates"][-1], atol=1e-2)


def test_text_features_are_open_clips(clip, encoders):
    captions = ["a red ball", "something much longer than the first caption, and with more words", ""]
    reference = clip.encode_text(open_clip.get_tokenizer("ViT-H-14")(captions), normalize=True)
    torch.testing.assert_close(encoders.text_features(captions), reference)


def test_image_embedding_is_open_clips_projection(clip, encoders):
    frames = torch.rand(2, 3, 40, 72) * 2 - 1
    reference = clip.encode_image(encoders.image.preprocess(frames))
    torch.testing.assert_close(encoders.image(frames), reference)
    assert encoders.image.width == reference.shape[1] == 48
    torch.testing.assert_close(
        encoders.image_features(frames), clip.encode_image(encoders.image.preprocess(frames), True)
    )


@pytest.mark.parametrize("size", [(300, 200), (64, 64), (40, 150)])
def test_shrunk_frames_have_the_embedding_of_the_frames(encoders, size):
    frames = torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8).permute(0, 3, 1, 2) / 127.5 - 1
    small = encoders.shrink(frames)
    assert small.shape == (2, 3, *encoders.image.visual.image_size)
    torch.testing.assert_close(encoders.image.preprocess(small), encoders.image.preprocess(frames))
    torch.testing.assert_close(encoders.image_features(small), encoders.image_features(frames))


def test_preprocess_normalises_a_constant_picture(encoders):
    frames = torch.full((1, 3, 100, 90), 0.5)
    expected = (0.75 - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]
    )
    picture = encoders.image.preprocess(frames)
    assert picture.shape == (1, 3, 64, 64)
    torch.testing.assert_close(picture, expected.reshape(1, 3, 1, 1).expand(1, 3, 64, 64), rtol=1e-5, atol=1e-5)


def test_resize_aligns_corners_and_antialiases(encoders):
    """Enlarging with aligned corners keeps the corner pixels; shrinking a fine checkerboard gives grey, not moiré."""
    small = torch.rand(1, 3, 16, 16) * 2 - 1
    restored = encoders.image.preprocess(small) * encoders.image.std + encoders.image.mean
    torch.testing.assert_close(restored[..., 0, 0] * 2 - 1, small[..., 0, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(restored[..., -1, -1] * 2 - 1, small[..., -1, -1], atol=1e-4, rtol=1e-4)
    y, x = torch.meshgrid(torch.arange(512), torch.arange(512), indexing="ij")
    checks = ((y + x) % 2 * 2 - 1).float().expand(1, 3, -1, -1)
    grey = encoders.image.preprocess(checks) * encoders.image.std + encoders.image.mean
    assert (grey - 0.5).abs().max() < 0.01


def test_stored_toy_clip_loads_in_open_clip(folder, encoders):
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    frames = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(model.eval().encode_image(frames), encoders.image.visual(frames))
    assert encoders.label == "toy-clip"


def test_loading_is_strict_about_kind_folder_and_weights(folder, tmp_path):
    with pytest.raises(UserError, match=r"reference\.json.*wants 'open_clip'"):
        load_encoders(folder, EncodersConfig())
    with pytest.raises(UserError, match="run the stage 'encoders' first"):
        load_encoders(tmp_path, TOY)
    clips.save_toy(clips.build_clip(CONFIG, "test"), clips.toy_config(32, 64), tmp_path)
    with pytest.raises(UserError, match="doesn't fit"):
        load_encoders(tmp_path, TOY)


def released(tmp_path, clip, monkeypatch, **options):
    """Settings for a released checkpoint of a small architecture that open_clip is told about."""
    from svd.model.safetensors import of_module, write_tensors

    write_tensors(tmp_path / "weights.safetensors", of_module(clip))
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: CONFIG if name == "small" else None)
    return EncodersConfig(**{"model": "small", "weights": str(tmp_path / "weights.safetensors"), **options})


def test_released_weights_by_path_and_hash(tmp_path, clip, encoders, monkeypatch):
    import hashlib

    digest = hashlib.sha256
    config = released(tmp_path, clip, monkeypatch)
    good = digest((tmp_path / "weights.safetensors").read_bytes()).hexdigest()
    clips.save_reference(config.model_copy(update={"sha256": good}), tmp_path)
    loaded = load_encoders(tmp_path, config.model_copy(update={"sha256": good}))
    torch.testing.assert_close(loaded.text(["a cat"]), encoders.text(["a cat"]))
    assert loaded.label.startswith("small/")
    assert not any(p.requires_grad for p in loaded.text.parameters())
    with pytest.raises(UserError, match="wrong sha256"):
        load_encoders(tmp_path, config.model_copy(update={"sha256": "0" * 64}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "no-such"}, "knows no model 'no-such'"),
        ({"weights": "no-such-tag"}, "'no-such-tag' is no .safetensors file"),
        ({"weights": "/nowhere/w.safetensors"}, r"/nowhere/w\.safetensors: no such file"),
    ],
)
def test_released_weights_that_cannot_be_had(tmp_path, clip, monkeypatch, options, message):
    with pytest.raises(UserError, match=message):
        clips.load_released(released(tmp_path, clip, monkeypatch, **options))


def test_pickled_weights_are_refused(tmp_path, clip, monkeypatch):
    torch.save(clip.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(UserError, match="pickled"):
        clips.load_released(released(tmp_path, clip, monkeypatch, weights=str(tmp_path / "weights.pt")))


def test_hub_failure_names_file_source_and_option(monkeypatch):
    import huggingface_hub

    def offline(*arguments, **keywords):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(UserError, match=r"open_clip_model\.safetensors of laion/CLIP-ViT-H-14.*encoders\.weights"):
        clips.load_released(EncodersConfig())


def test_architectures_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="own text transformer"):
        clips.build_clip({"embed_dim": 8, "vision_cfg": {}, "text_cfg": {"hf_model_name": "x"}}, "here")
    with pytest.raises(UserError, match="multiples of 16"):
        clips.toy_config(40, 64)


def test_released_towers_have_the_published_sizes():
    """ViT-H/14: 632,076,800 parameters in the image tower, tokens and embedding 1024 wide."""
    with torch.device("meta"):
        model = open_clip.create_model("ViT-H-14", pretrained=None, device="meta")
        text, image = TextEncoder(model), ImageEncoder(model.visual)
    assert sum(p.numel() for p in image.parameters()) == 632_076_800
    assert (text.width, text.context_length, image.width, len(text.transformer.resblocks)) == (1024, 77, 1024, 24)
    assert image.visual.image_size == (224, 224)


def test_micro_conditioning_order_and_conventions():
    ids = micro_conditioning(4, 2, fps=7, motion_bucket=127, cond_aug=0.02, elevation_degrees=10)
    assert ids.shape == (2, 4)
    assert ids[1].tolist() == pytest.approx([6, 127, 0.02, math.radians(80)])
    assert micro_conditioning(2, 1, fps=25, motion_bucket=40).tolist() == [[24, 40]]
    assert micro_conditioning(0, 1, fps=25, motion_bucket=40) is None
    with pytest.raises(UserError, match="5 conditioning ids"):
        micro_conditioning(5, 1, fps=25, motion_bucket=40)


def test_polar_angle():
    assert polar_angle(0) == pytest.approx(math.pi / 2)
    assert polar_angle(90) == 0
    with pytest.raises(UserError, match="between -90 and 90"):
        polar_angle(91)


def test_noise_augmentation_has_the_given_strength_and_is_per_sample():
    frames = torch.zeros(3, 3, 64, 64)
    sigma = torch.tensor([0.0, 0.02, 1.0])
    noisy = noise_augment(frames, sigma, torch.Generator().manual_seed(0))
    assert noisy[0].abs().max() == 0
    assert noisy[1].std().item() == pytest.approx(0.02, rel=0.05)
    assert noisy[2].std().item() == pytest.approx(1, rel=0.05)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    batch = noise_augment(frames, sigma, generators)
    alone = noise_augment(frames[2:], sigma[2:], [torch.Generator().manual_seed(7)])
    assert torch.equal(batch[2:], alone)
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        noise_augment(frames, sigma, generators[:2])


def test_from_uint8_covers_the_range():
    import numpy as np

    frames = from_uint8(np.array([0, 128, 255], np.uint8).reshape(1, 1, 1, 3))
    assert frames.shape == (1, 3, 1, 1)
    assert frames.flatten().tolist() == pytest.approx([-1, 1 / 255, 1], abs=1e-6)


@pytest.fixture(scope="module")
def sd_file(tmp_path_factory):
    """A single file as SD 2.1's: an image U-Net and open_clip's text tower, which is returned, too."""
    torch.manual_seed(1)
    vision = open_clip.CLIPVisionCfg(layers=1, width=64, image_size=16)
    clip = open_clip.CLIP(48, vision, open_clip.CLIPTextCfg(77, 49408, width=128, heads=2, layers=3)).eval()
    unet = toy_unet(temporal=False, in_channels=4, ids=0)
    text = {name: tensor for name, tensor in of_module(clip).items() if not name.startswith("visual.")}
    config = stored_config(unet.config)
    path = tmp_path_factory.mktemp("sd") / "sd.safetensors"
    write_sgm(path, SgmParts(unet=unet_to_sgm(of_module(unet), unet.config), text=text, config=config))
    return path, clip


def test_text_encoder_of_a_single_file(sd_file):
    path, clip = sd_file
    encoders, captions = load_encoders(path, TOY), ["a red ball", "x " * 200, ""]
    torch.testing.assert_close(encoders.text(captions), TextEncoder(clip)(captions))
    torch.testing.assert_close(encoders.text_features(captions), clip.encode_text(encoders.text.tokens(captions), True))
    assert encoders.widths == {128} and encoders.label == "text encoder of sd.safetensors"
    assert not any(parameter.requires_grad for parameter in encoders.text.parameters())
    with pytest.raises(UserError, match=r"text encoder of sd\.safetensors has no image encoder"):
        encoders.image_features(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("name", ["positional_embedding", "token_embedding.weight", "ln_final.bias", "text_projection"])
def test_a_damaged_text_encoder_is_one_line(sd_file, name):
    tensors = dict(read_sgm(sd_file[0]).text)
    del tensors[name]
    with pytest.raises(UserError, match=name) as error:
        load_text_encoder(tensors, "sd.safetensors")
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def text_model():
    """transformers' text tower as in SD 2.1's folder, small."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = CLIPTextModel(CLIPTextConfig(**sizes, hidden_act="gelu")).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.3)
    return model


def text_folder(model, folder, prefix="text_model.", **changes):
    """A pipeline's folder with this text encoder; published files name its tensors with a prefix."""
    tensors = {f"{prefix}{name}": of_tensor(value) for name, value in model.state_dict().items()}
    counter = {f"{prefix}embeddings.position_ids": of_tensor(torch.arange(77)[None])}
    write_tensors(folder / "text_encoder/model.safetensors", tensors | counter)
    (folder / "text_encoder/config.json").write_text(json.dumps(model.config.to_dict() | changes))
    return folder


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_text_encoder_of_a_folder_is_transformers(text_model, tmp_path, prefix):
    """SD 2.1's pipeline takes the folder's last layer, through the final norm, of zero-padded tokens."""
    encoders = load_encoders(text_folder(text_model, tmp_path, prefix), TOY)
    captions = ["a red ball", "x " * 200, ""]
    with torch.no_grad():
        expected = text_model(open_clip.get_tokenizer("ViT-H-14")(captions)).last_hidden_state
        torch.testing.assert_close(encoders.text(captions), expected, atol=1e-5, rtol=1e-5)
    assert encoders.widths == {32} and encoders.label == f"text encoder of {tmp_path.name}"
    assert not any(parameter.requires_grad for parameter in encoders.text.parameters())
    with pytest.raises(UserError, match="no last layer and no projection"):
        encoders.text_features(captions)
    with pytest.raises(UserError, match="has no image encoder"):
        encoders.image_features(torch.zeros(1, 3, 8, 8))


def test_a_folders_text_encoder_is_a_files_without_its_last_layer(sd_file, tmp_path):
    """SD 2.1 is published in both layouts: 24 layers, of which the last but one is read, and 23."""
    path, clip = sd_file
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = CLIPTextModel(CLIPTextConfig(**sizes, hidden_act="gelu"))
    state = {**clip.ln_final.state_dict(prefix="final_layer_norm.")}
    state["embeddings.token_embedding.weight"] = clip.token_embedding.weight
    state["embeddings.position_embedding.weight"] = clip.positional_embedding
    for number, block in enumerate(clip.transformer.resblocks[:2]):
        place = f"encoder.layers.{number}"
        for theirs, module in {
            "layer_norm1": block.ln_1, "layer_norm2": block.ln_2, "self_attn.out_proj": block.attn.out_proj,
            "mlp.fc1": block.mlp.c_fc, "mlp.fc2": block.mlp.c_proj,
        }.items():  # fmt: skip
            state |= module.state_dict(prefix=f"{place}.{theirs}.")
        for part, name in enumerate("qkv"):
            state[f"{place}.self_attn.{name}_proj.weight"] = block.attn.in_proj_weight.chunk(3)[part]
            state[f"{place}.self_attn.{name}_proj.bias"] = block.attn.in_proj_bias.chunk(3)[part]
    model.load_state_dict(state)
    folder, captions = text_folder(model, tmp_path), ["a red ball", ""]
    torch.testing.assert_close(load_encoders(folder, TOY).text(captions), load_encoders(path, TOY).text(captions))


def test_a_folder_may_hold_both_encoders(text_model, clip, tmp_path):
    tensors = of_module(clip.visual)
    write_tensors(tmp_path / "image_encoder/model.safetensors", to_transformers(tensors))
    (tmp_path / "image_encoder/config.json").write_text(json.dumps(transformers_config(tensors, 2)))
    both = load_encoders(text_folder(text_model, tmp_path), TOY)
    frames = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(both.image.visual(frames), clip.visual(frames))
    assert both.widths == {32, 48} and both.label == f"text encoder and image encoder of {tmp_path.name}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu'"),
        ({"num_hidden_layers": "three"}, "num_hidden_layers missing or no number"),
        ({"num_hidden_layers": 4}, r"doesn't fit its config.json: 12 missing \(transformer.resblocks.3"),
        ({"num_attention_heads": 5}, "hidden_size 32 isn't a multiple of num_attention_heads"),
        ({"vocab_size": 1000}, "a vocabulary of 1000, CLIP's has 49408"),
        ({"max_position_embeddings": 60}, "positional_embedding is 77x32 instead of 60x32"),
    ],
)
def test_text_folders_that_cannot_be_read_are_one_line(text_model, tmp_path, changes, message):
    text_folder(text_model, tmp_path, **changes)
    with pytest.raises(UserError, match=message) as error:
        load_encoders(tmp_path, TOY)
    assert "text_encoder" in str(error.value) and "\n" not in str(error.value)


def test_a_folder_with_neither_encoder_is_one_line(tmp_path):
    (tmp_path / "unet").mkdir()
    with pytest.raises(UserError, match=r"a released model's folder with image_encoder/ or text_encoder/") as error:
        load_encoders(tmp_path, TOY)
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)
