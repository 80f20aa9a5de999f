"""The captioner `video`: VideoBLIP as in the paper (§3.1), or any video-text-to-text model of transformers.

VideoBLIP is BLIP-2 with several frames: the tokens of all frames are concatenated before the Q-Former. So its weights
are those of `Blip2ForConditionalGeneration`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from svd.config import CaptionsConfig
from svd.core.errors import UserError
from svd.curation.captions.base import Captioner, CaptionRequest, first_line, import_transformers
from svd.media.shown import shown_rgb

FRAMES = 8
PROMPT = "Question: What happens in this video? Answer:"
INSTRUCTION = "Describe in one sentence what happens in this video."
MAX_NEW_TOKENS = 40
OPTION = "curation.captions.video_model"
BLIP2_TYPES = ("blip-2", "video_blip", "video-blip")


@dataclass(frozen=True)
class Sampled:
    """Frames of a clip.

    images: (H, W, 3) uint8 RGB each. numbers: their frame numbers. total: frames of the clip. fps: frames per second.
    """

    images: list[np.ndarray]
    numbers: list[int]
    total: int
    fps: float

    def metadata(self) -> dict[str, Any]:
        """Return the metadata that video processors of transformers take: some models are given the times of frames."""
        seconds = self.total / self.fps
        return {"total_num_frames": self.total, "fps": self.fps, "duration": seconds, "frames_indices": self.numbers}


def sample_frames(video: Path, count: int = FRAMES) -> Sampled:
    """Read `count` frames, evenly spaced over a clip; fewer when the clip is shorter."""
    with av.open(str(video), "r") as container:
        stream = container.streams.video[0]
        total = stream.frames or sum(1 for _ in container.decode(stream))
        wanted = {round((i + 0.5) * total / count - 0.5) for i in range(count)}
        container.seek(0)
        found = dict(shown_rgb(container, wanted))
        return Sampled(list(found.values()), list(found), total, float(stream.average_rate or 25))


class VideoBlipCaptioner:
    """VideoBLIP: frames through BLIP-2's image encoder, joined over time, described by its language model."""

    name = "video"

    def __init__(self, model: Any, processor: Any, device: str, frames: int = FRAMES) -> None:
        self.model, self.processor = model.to(device).eval(), processor
        self.device, self.frames = device, frames

    @torch.inference_mode()
    def describe(self, requests: Sequence[CaptionRequest]) -> list[str | None]:
        """Return one caption per clip."""
        return [self._describe(sample_frames(request.video, self.frames)) for request in requests]

    def _describe(self, sampled: Sampled) -> str | None:
        images = [Image.fromarray(image) for image in sampled.images]
        pixels = self.processor.image_processor(images=images, return_tensors="pt")["pixel_values"].to(self.device)
        queries = self.video_queries(pixels[None])
        tokens = self.processor.tokenizer(PROMPT, return_tensors="pt")["input_ids"].to(self.device)
        words = self.model.get_input_embeddings()(tokens)
        embeddings = torch.cat([queries.to(words.dtype), words], 1)
        attended = torch.ones(embeddings.shape[:2], dtype=torch.long, device=self.device)
        out = self.model.language_model.generate(
            inputs_embeds=embeddings, attention_mask=attended, max_new_tokens=MAX_NEW_TOKENS, do_sample=False
        )
        return self.processor.tokenizer.decode(out[0], skip_special_tokens=True).strip() or None

    def video_queries(self, pixels: Tensor) -> Tensor:
        """Map frames (B, T, 3, H, W) to the Q-Former's outputs over all of them, in the LLM's width: (B, Q, D)."""
        batch, time = pixels.shape[:2]
        tokens = self.model.vision_model(pixel_values=pixels.flatten(0, 1)).last_hidden_state
        tokens = tokens.unflatten(0, (batch, time)).flatten(1, 2)
        attended = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        asked = self.model.query_tokens.expand(batch, -1, -1)
        answers = self.model.qformer(
            query_embeds=asked, encoder_hidden_states=tokens, encoder_attention_mask=attended
        ).last_hidden_state
        return self.model.language_projection(answers)


class ChatVideoCaptioner:
    """Any video chat model of transformers (LLaVA-NeXT-Video, Qwen2-VL, …) through its chat template."""

    name = "video"

    def __init__(self, model: Any, processor: Any, device: str, frames: int = FRAMES) -> None:
        self.model, self.processor = model.to(device).eval(), processor
        self.device, self.frames = device, frames

    @torch.inference_mode()
    def describe(self, requests: Sequence[CaptionRequest]) -> list[str | None]:
        """Return one caption per clip."""
        return [self._describe(sample_frames(request.video, self.frames)) for request in requests]

    def _describe(self, sampled: Sampled) -> str | None:
        content = [{"type": "video"}, {"type": "text", "text": INSTRUCTION}]
        prompt = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = self.processor(
            text=prompt,
            videos=[np.stack(sampled.images)],
            video_metadata=[sampled.metadata()],
            do_sample_frames=False,
            return_tensors="pt",
        ).to(self.device, self.model.dtype)
        out = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        said = out[0, inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.decode(said, skip_special_tokens=True).strip() or None


def load_video_captioner(name: str, device: str) -> Captioner:
    """Load a captioner by hub id or folder; its class follows from the model's configuration.

    Raises UserError when that fails, when weights are missing, and for models that take no video.
    """
    transformers = import_transformers(OPTION)
    try:
        values, _ = transformers.PretrainedConfig.get_config_dict(name)
        processor = transformers.AutoProcessor.from_pretrained(name)
        blip2 = values.get("model_type") in BLIP2_TYPES or "Blip" in "".join(values.get("architectures") or ())
        kind = transformers.Blip2ForConditionalGeneration if blip2 else transformers.AutoModelForImageTextToText
        config = {"config": transformers.Blip2Config.from_dict(values | {"model_type": "blip-2"})} if blip2 else {}
        dtype = torch.float16 if device == "cuda" else torch.float32
        model, loading = kind.from_pretrained(name, dtype=dtype, output_loading_info=True, **config)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{OPTION}: '{name}' can't be loaded: {first_line(error)}") from None
    if missing := sorted(loading["missing_keys"]):
        raise UserError(f"{OPTION}: '{name}' lacks {len(missing)} weights of its network, such as {missing[0]}")
    if blip2:
        return VideoBlipCaptioner(model, processor, device)
    for part, what in (("video_processor", "takes no video"), ("chat_template", "has no chat template")):
        if getattr(processor, part, None) is None:
            raise UserError(f"{OPTION}: '{name}' {what}; give a video chat model such as Qwen2-VL, or a VideoBLIP")
    return ChatVideoCaptioner(model, processor, device)


def make_video(config: CaptionsConfig, device: str) -> Captioner:
    """Load the configured video captioner; raises UserError for a missing option or model."""
    if config.video_model is None:
        raise UserError(
            "curation.captions: captioner 'video' needs video_model, such as kpyu/video-blip-opt-2.7b-ego4d"
        )
    return load_video_captioner(config.video_model, device)
