"""The conditioning image's resize against diffusers' re-implementation of the released code's."""

import pytest
import torch
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing
from transformers import CLIPImageProcessor

from svd.model.encoders import ImageEncoder
from svd.model.formats.clip import build_clip, toy_config


@pytest.fixture(scope="module")
def encoder():
    config = toy_config(16, 16)
    config["vision_cfg"] |= {"image_size": 224, "patch_size": 14}
    return ImageEncoder(build_clip(config, "test").visual)


@pytest.mark.parametrize("size", [(576, 1024), (320, 576), (224, 224), (300, 260)])
def test_resize_and_normalisation(encoder, size):
    frames = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    resized = (_resize_with_antialiasing(frames, (224, 224)) + 1) / 2
    processor = CLIPImageProcessor()
    expected = processor(
        images=resized,
        do_normalize=True,
        do_center_crop=False,
        do_resize=False,
        do_rescale=False,
        return_tensors="pt",
    ).pixel_values
    torch.testing.assert_close(encoder.preprocess(frames), expected, atol=2e-5, rtol=1e-5)
