"""Video captioners loaded from folders as users have them: what the networks are shown, and errors of one line."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch
import video_models
from media_files import shots, write
from safetensors.torch import load_file, save_file

from svd.core.errors import UserError
from svd.curation.captions.base import CaptionRequest
from svd.curation.captions.video import (
    INSTRUCTION,
    MAX_NEW_TOKENS,
    PROMPT,
    ChatVideoCaptioner,
    VideoBlipCaptioner,
    load_video_captioner,
    sample_frames,
)

CHATS = {
    "llava-next-video": video_models.save_llava_next_video,
    "qwen2-vl": video_models.save_qwen2_vl,
    "qwen3-vl": video_models.save_qwen3_vl,
}
NUMBERS = [1, 5, 9, 13, 16, 20, 24, 28]  # of eight frames in the middles of eight equal parts of thirty


class Recorder:
    """Stands in for a processor or one of its parts; keeps what it is called with and what it answers."""

    def __init__(self, inner):
        self.inner, self.asked, self.answered = inner, [], []

    def __call__(self, *args, **options):
        self.asked.append((args, options))
        self.answered.append(self.inner(*args, **options))
        return self.answered[-1]

    def __getattr__(self, name):
        return getattr(self.inner, name)


@pytest.fixture(scope="module")
def requests_of_clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    videos = [write(folder / f"{seed}", list(shots([30], 64, 96, seed=seed))) for seed in (1, 2)]
    return [CaptionRequest(video.stem, np.zeros((3, 64, 96, 3), np.uint8), video, {}) for video in videos]


def test_sampled_frames_know_their_times(requests_of_clips):
    sampled = sample_frames(requests_of_clips[0].video, 8)
    assert sampled.numbers == NUMBERS
    expected = {"total_num_frames": 30, "fps": 24.0, "duration": 1.25, "frames_indices": NUMBERS}
    assert sampled.metadata() == expected
    assert sample_frames(requests_of_clips[0].video, 50).numbers == list(range(30))


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_model_sees_eight_frames_of_each_clip(name, requests_of_clips, tmp_path):
    captioner = load_video_captioner(str(CHATS[name](tmp_path)), "cpu")
    assert isinstance(captioner, ChatVideoCaptioner)
    processor = captioner.processor = Recorder(captioner.processor)
    both = captioner.describe(requests_of_clips)
    alone = captioner.describe(requests_of_clips[:1])
    assert len(both) == 2 and alone == both[:1]
    assert any(both) and all(caption is None or len(caption.split()) <= MAX_NEW_TOKENS for caption in both)
    for (_, asked), request in zip(processor.asked, requests_of_clips, strict=False):
        (video,) = asked["videos"]
        assert video.shape == (8, 64, 96, 3) and video.dtype == np.uint8
        assert np.array_equal(video, np.stack(sample_frames(request.video, 8).images))
        assert INSTRUCTION in asked["text"] and asked["text"].endswith("assistant:")
    first, second, again = (answer["pixel_values_videos"] for answer in processor.answered)
    assert torch.equal(first, again) and first.shape == second.shape
    assert (first - second).abs().mean() > 0.1
    if "video_grid_thw" in processor.answered[0]:
        assert processor.answered[0]["video_grid_thw"][0, 0] == 4, "pairs of the eight frames, none left out"
    else:
        assert first.shape == (1, 8, 3, 32, 32)


def test_only_what_the_model_adds_is_the_caption(requests_of_clips, tmp_path, monkeypatch):
    captioner = load_video_captioner(str(CHATS["qwen2-vl"](tmp_path)), "cpu")
    said = captioner.processor.tokenizer("a dog runs [EOS]", return_tensors="pt")["input_ids"]
    monkeypatch.setattr(captioner.model, "generate", lambda **inputs: torch.cat([inputs["input_ids"], said], 1))
    assert captioner.describe(requests_of_clips) == ["a dog runs"] * 2


def test_a_model_that_tells_time_is_told_that_of_the_clip(requests_of_clips, tmp_path, monkeypatch):
    captioner = load_video_captioner(str(CHATS["qwen3-vl"](tmp_path)), "cpu")
    seen = []
    tokenizer = type(captioner.processor.tokenizer)
    inner = tokenizer.__call__
    monkeypatch.setattr(tokenizer, "__call__", lambda self, text, **o: seen.append(text) or inner(self, text, **o))
    captioner.describe(requests_of_clips[:1])
    (text,) = seen[-1]
    times = [(one + other) / 2 / 24 for one, other in zip(NUMBERS[::2], NUMBERS[1::2], strict=True)]
    assert [text.count(f"<{time:.1f} seconds>") for time in times] == [1] * 4


@pytest.mark.parametrize("name", [*CHATS, "opt", "t5"])
def test_half_precision_networks_take_the_pixels(name, requests_of_clips, tmp_path):
    """On a GPU networks are loaded in half precision, while processors give single."""
    make = CHATS.get(name, functools.partial(video_models.save_video_blip, language=name))
    captioner = load_video_captioner(str(make(tmp_path)), "cpu")
    half = type(captioner)(captioner.model.bfloat16(), captioner.processor, "cpu")
    assert len(half.describe(requests_of_clips)) == 2


@pytest.mark.parametrize("language", ["opt", "t5"])
@pytest.mark.parametrize(
    "published",
    [
        {"model_type": "blip-2", "architectures": ["VideoBlipForConditionalGeneration"]},
        {"model_type": "video_blip", "architectures": ["VideoBlipForConditionalGeneration"]},
        {"model_type": "blip-2", "architectures": ["Blip2ForConditionalGeneration"]},
    ],
)
def test_video_blip_is_loaded_whatever_its_configuration_calls_it(language, published, requests_of_clips, tmp_path):
    folder = video_models.save_video_blip(tmp_path, language)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | published))
    captioner = load_video_captioner(str(folder), "cpu")
    assert isinstance(captioner, VideoBlipCaptioner)
    saved = load_file(folder / "model.safetensors")
    assert torch.equal(captioner.model.query_tokens, saved["query_tokens"])
    pictures = captioner.processor.image_processor = Recorder(captioner.processor.image_processor)
    words = captioner.processor.tokenizer = Recorder(captioner.processor.tokenizer)
    both = captioner.describe(requests_of_clips)
    assert captioner.describe(requests_of_clips[1:]) == both[1:] and len(both) == 2
    assert [[p.size for p in asked["images"]] for _, asked in pictures.asked] == [[(96, 64)] * 8] * 3
    assert [args for args, _ in words.asked] == [(PROMPT,)] * 3
    first, second, again = (answer["pixel_values"] for answer in pictures.answered)
    assert first.shape == (8, 3, 32, 32) and torch.equal(second, again)
    with torch.inference_mode():
        queries = [captioner.video_queries(pixels[None]) for pixels in (first, second)]
    assert queries[0].shape == (1, 4, 16) and not torch.allclose(*queries, atol=1e-4)


def _without_weights(folder):
    (folder / "model.safetensors").unlink()


def _cut_weights(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _one_weight_less(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["query_tokens"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _without_template(folder):
    (folder / "chat_template.jinja").unlink()


def _text_only(folder):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=24, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    video_models.save(folder, GPT2LMHeadModel, config, video_models.word_tokenizer())


BROKEN = {
    "no configuration": (lambda folder: None, "can't be loaded"),
    "no weights": (lambda f: _without_weights(video_models.save_qwen2_vl(f)), "can't be loaded"),
    "half of the weights' file": (lambda f: _cut_weights(video_models.save_video_blip(f, "opt")), "can't be loaded"),
    "a weight is missing": (
        lambda f: _one_weight_less(video_models.save_video_blip(f, "opt")),
        "lacks 1 weights of its network, such as query_tokens",
    ),
    "no chat template": (lambda f: _without_template(video_models.save_qwen2_vl(f)), "has no chat template"),
    "pictures only": (video_models.save_llava, "takes no video"),
    "text only": (_text_only, "can't be loaded"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_caption_videos_is_one_clear_line(name, tmp_path):
    make, words = BROKEN[name]
    make(tmp_path)
    with pytest.raises(UserError, match=words) as refused:
        load_video_captioner(str(tmp_path), "cpu")
    message = str(refused.value)
    assert message.startswith(f"curation.captions.video_model: '{tmp_path}' ") and "\n" not in message
