"""The captioners of the paper (§3.1): CoCa on the middle frame, a video captioner on the clip, an LLM that merges both.

All run behind `svd.curation.captions.Captioner`. Weights come by hub id or path; transformers is the extra `captions`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import httpx
import torch
from PIL import Image

from svd.config import CaptionsConfig
from svd.curation.beam import beam_search
from svd.curation.captions import Captioner, CaptionRequest
from svd.stage import UserError

COCA = "coca"
VIDEO = "video"
LLM = "llm"
START, END = 49406, 49407  # of CLIP's tokenizer
MERGE_INSTRUCTION = (
    "Two captions describe the same short video: one what a single frame shows, one what happens over time. "
    "Write one plain sentence that says both. Do not mention captions, frames or videos; add nothing."
)
MERGE_EXAMPLE = (
    "a man in a red jacket stands on a snowy slope",
    "a person skis down a mountain",
    "A man in a red jacket skis down a snowy mountain slope.",
)
MISSING = "needs transformers: pip install 'svd-platform[captions]'"


class CocaCaptioner:
    """CoCa through open_clip: beam search on the middle frame."""

    name = COCA

    def __init__(self, model: torch.nn.Module, preprocess: Any, device: str, batch: int = 16) -> None:
        self.model = model.to(device).eval()
        self.preprocess = preprocess
        self.device, self.batch = device, batch

    @classmethod
    def load(cls, model: str, weights: str, device: str) -> CocaCaptioner:
        """Load an open_clip CoCa by name and pretrained tag or path; raises UserError when that fails."""
        import open_clip

        try:
            network, _, preprocess = open_clip.create_model_and_transforms(model, pretrained=weights)
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(
                f"curation.captions: CoCa '{model}' with weights '{weights}' can't be loaded: {first_line(error)}; "
                "set coca_weights to a tag of open_clip or a file, or leave 'coca' out of captioners"
            ) from None
        return cls(network, preprocess, device)

    @torch.inference_mode()
    def describe(self, requests: Sequence[CaptionRequest]) -> list[str | None]:
        """One caption a clip."""
        captions: list[str | None] = []
        for start in range(0, len(requests), self.batch):
            pictures = [Image.fromarray(r.frames[1]) for r in requests[start : start + self.batch]]
            pixels = torch.stack([self.preprocess(picture) for picture in pictures]).to(self.device)
            seen = self.model(pixels)
            captions += [
                self._decode(latent[None], embeddings[None])
                for latent, embeddings in zip(seen["image_features"], seen["image_embs"], strict=True)
            ]
        return captions

    def _decode(self, latent: torch.Tensor, embeddings: torch.Tensor) -> str | None:
        """The best caption of one picture: latent (1, E), embeddings (1, N, E)."""
        import open_clip

        def step(tokens: torch.Tensor) -> torch.Tensor:
            count = len(tokens)
            seen = {"image_latent": latent.expand(count, -1), "image_embs": embeddings.expand(count, -1, -1)}
            return self.model(None, tokens.to(self.device), **seen, output_labels=False)["logits"][:, -1]

        tokens = beam_search(step, START, END)
        return open_clip.decode(torch.tensor(tokens)).strip(" .") or None


class EndpointLlm:
    """Merges captions through an OpenAI-compatible server (vLLM, llama.cpp, …): POST <endpoint>/chat/completions."""

    name = LLM

    def __init__(
        self, endpoint: str, model: str, *, attempts: int = 5, timeout: float = 60.0, wait: float = 1.0, key: str = ""
    ) -> None:
        self.url = endpoint.rstrip("/") + "/chat/completions"
        self.model, self.attempts, self.wait = model, attempts, wait
        self.client = httpx.Client(timeout=timeout, headers={"Authorization": f"Bearer {key}"} if key else {})

    def describe(self, requests: Sequence[CaptionRequest]) -> list[str | None]:
        """One merged caption a clip; None where there is nothing to merge."""
        return [self._merge(texts) if (texts := merge_inputs(request)) else None for request in requests]

    def _merge(self, texts: tuple[str, str]) -> str:
        body = {"model": self.model, "messages": merge_messages(*texts), "temperature": 0, "max_tokens": 64}
        for attempt in range(self.attempts):
            try:
                response = self.client.post(self.url, json=body)
                if response.status_code < 500 and response.status_code != 429:
                    return self._text(response)
                problem = f"HTTP {response.status_code}"
            except httpx.TransportError as error:
                problem = first_line(error) or type(error).__name__
            if attempt + 1 < self.attempts:
                time.sleep(self.wait * 2**attempt)
        raise UserError(f"curation.captions.llm_endpoint: {self.url} does not answer ({problem}); is the server up?")

    def _text(self, response: httpx.Response) -> str:
        try:
            response.raise_for_status()
            return str(response.json()["choices"][0]["message"]["content"]).strip()
        except (httpx.HTTPStatusError, ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(
                f"curation.captions.llm_endpoint: {self.url} answered what is no chat completion: {first_line(error)}"
            ) from None


class TransformersLlm:
    """Merges captions with a local chat model of transformers."""

    name = LLM

    def __init__(self, model: Any, tokenizer: Any, device: str) -> None:
        self.model, self.tokenizer, self.device = model.to(device).eval(), tokenizer, device

    @classmethod
    def load(cls, name: str, device: str) -> TransformersLlm:
        """Load by hub id or folder; raises UserError when that fails."""
        transformers = import_transformers("curation.captions.llm_model")
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            model = transformers.AutoModelForCausalLM.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise UserError(f"curation.captions.llm_model: '{name}' can't be loaded: {first_line(error)}") from None
        return cls(model, tokenizer, device)

    @torch.inference_mode()
    def describe(self, requests: Sequence[CaptionRequest]) -> list[str | None]:
        """One merged caption a clip; None where there is nothing to merge."""
        return [self._merge(texts) if (texts := merge_inputs(request)) else None for request in requests]

    def _merge(self, texts: tuple[str, str]) -> str:
        messages = merge_messages(*texts)
        if self.tokenizer.chat_template:
            prompt = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        else:
            prompt = "\n".join(message["content"] for message in messages) + "\nSentence:"
        tokens = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(self.device)
        out = self.model.generate(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], max_new_tokens=64, do_sample=False
        )
        return self.tokenizer.decode(out[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def merge_inputs(request: CaptionRequest) -> tuple[str, str] | None:
    """What the LLM merges: the spatial and the temporal caption of a clip, or None when one of them is missing."""
    spatial = request.captions.get(COCA) or request.captions.get("sidecar")
    temporal = request.captions.get(VIDEO) or request.captions.get("motion")
    return (spatial, temporal) if spatial and temporal else None


def merge_messages(spatial: str, temporal: str) -> list[dict[str, str]]:
    """The chat that asks for one merged caption, with one worked example."""
    ask = "Frame: {}\nTime: {}".format
    return [
        {"role": "system", "content": MERGE_INSTRUCTION},
        {"role": "user", "content": ask(*MERGE_EXAMPLE[:2])},
        {"role": "assistant", "content": MERGE_EXAMPLE[2]},
        {"role": "user", "content": ask(spatial, temporal)},
    ]


def make_captioners(config: CaptionsConfig, device: str) -> list[Captioner]:
    """The configured captioners that need a network, in the order they must run (the LLM last).

    Raises UserError that names the option which is missing. `sidecar` and `motion` are known from measuring already.
    """
    wanted = set(config.captioners)
    captioners: list[Captioner] = []
    if COCA in wanted:
        captioners.append(CocaCaptioner.load(config.coca_model, config.coca_weights, device))
    if VIDEO in wanted:
        from svd.curation.video_captioner import load_video_captioner

        if config.video_model is None:
            raise UserError(
                "curation.captions: captioner 'video' needs video_model, such as kpyu/video-blip-opt-2.7b-ego4d"
            )
        captioners.append(load_video_captioner(config.video_model, device))
    if LLM in wanted:
        captioners.append(_make_llm(config, device))
    return captioners


def _make_llm(config: CaptionsConfig, device: str) -> Captioner:
    if config.llm_model is None:
        raise UserError("curation.captions: captioner 'llm' needs llm_model, and llm_endpoint when a server runs it")
    if config.llm_endpoint:
        import os

        return EndpointLlm(config.llm_endpoint, config.llm_model, key=os.environ.get("OPENAI_API_KEY", ""))
    return TransformersLlm.load(config.llm_model, device)


def import_transformers(option: str) -> Any:
    """The module transformers; raises UserError that names the option which needs it."""
    try:
        import transformers
    except ModuleNotFoundError:
        raise UserError(f"{option} {MISSING}") from None
    return transformers


def first_line(error: Exception) -> str:
    """The first line of a message, at most 300 characters."""
    return str(error).strip().split("\n")[0][:300]
