"""The captioner `llm`: a language model that merges the captions of frame and clip (§3.1)."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import httpx
import torch

from svd.config import CaptionsConfig
from svd.core.errors import UserError
from svd.curation.captions.base import MOTION, SIDECAR, Captioner, CaptionRequest, first_line, import_transformers

# Captions to merge: what a frame shows and what happens over time, the preferred captioner first.
SPATIAL = ("coca", SIDECAR)
TEMPORAL = ("video", MOTION)

MERGE_INSTRUCTION = (
    "Two captions describe the same short video: one what a single frame shows, one what happens over time. "
    "Write one plain sentence that says both. Do not mention captions, frames or videos; add nothing."
)


MERGE_EXAMPLE = (
    "a man in a red jacket stands on a snowy slope",
    "a person skis down a mountain",
    "A man in a red jacket skis down a snowy mountain slope.",
)


class EndpointLlm:
    """Merges captions through an OpenAI-compatible server (vLLM, llama.cpp, …): POST <endpoint>/chat/completions.

    A busy or failing server is tried `attempts` times, with waits of `wait` seconds that double each time.
    """

    name = "llm"

    def __init__(
        self, endpoint: str, model: str, *, attempts: int = 5, timeout: float = 60.0, wait: float = 1.0, key: str = ""
    ) -> None:
        self.url = endpoint.rstrip("/") + "/chat/completions"
        self.model, self.attempts, self.wait = model, attempts, wait
        self.client = httpx.Client(timeout=timeout, headers={"Authorization": f"Bearer {key}"} if key else {})

    def describe(self, requests: Sequence[CaptionRequest]) -> list[str | None]:
        """Return one merged caption per clip; None where there is nothing to merge."""
        return [self._merge(texts) if (texts := merge_inputs(request)) else None for request in requests]

    def _merge(self, texts: tuple[str, str]) -> str:
        """Ask the server; raises UserError when it does not answer."""
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
        """Return the text of a completion; raises UserError for any other answer."""
        try:
            response.raise_for_status()
            return str(response.json()["choices"][0]["message"]["content"]).strip()
        except (httpx.HTTPStatusError, ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(
                f"curation.captions.llm_endpoint: {self.url} answered what is no chat completion: {first_line(error)}"
            ) from None


class TransformersLlm:
    """Merges captions with a local chat model of transformers."""

    name = "llm"

    def __init__(self, model: Any, tokenizer: Any, device: str) -> None:
        self.model, self.tokenizer, self.device = model.to(device).eval(), tokenizer, device

    @classmethod
    def load(cls, name: str, device: str) -> TransformersLlm:
        """Load a model by hub id or folder; raises UserError when that fails."""
        transformers = import_transformers("curation.captions.llm_model")
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            model = transformers.AutoModelForCausalLM.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise UserError(f"curation.captions.llm_model: '{name}' can't be loaded: {first_line(error)}") from None
        return cls(model, tokenizer, device)

    @torch.inference_mode()
    def describe(self, requests: Sequence[CaptionRequest]) -> list[str | None]:
        """Return one merged caption per clip; None where there is nothing to merge."""
        return [self._merge(texts) if (texts := merge_inputs(request)) else None for request in requests]

    def _merge(self, texts: tuple[str, str]) -> str:
        """Generate greedily, so that equal captions give equal results."""
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
    """Choose the spatial and the temporal caption of a clip; None when one of them is missing."""
    spatial, temporal = (
        next((text for name in names if (text := request.captions.get(name))), None) for names in (SPATIAL, TEMPORAL)
    )
    return (spatial, temporal) if spatial and temporal else None


def merge_messages(spatial: str, temporal: str) -> list[dict[str, str]]:
    """Write the chat that asks for one merged caption, with one worked example."""
    ask = "Frame: {}\nTime: {}".format
    return [
        {"role": "system", "content": MERGE_INSTRUCTION},
        {"role": "user", "content": ask(*MERGE_EXAMPLE[:2])},
        {"role": "assistant", "content": MERGE_EXAMPLE[2]},
        {"role": "user", "content": ask(spatial, temporal)},
    ]


def make_llm(config: CaptionsConfig, device: str) -> Captioner:
    """Make the configured LLM, local or behind an endpoint; raises UserError for a missing option or model."""
    if config.llm_model is None:
        raise UserError("curation.captions: captioner 'llm' needs llm_model, and llm_endpoint when a server runs it")
    if config.llm_endpoint:
        return EndpointLlm(config.llm_endpoint, config.llm_model, key=os.environ.get("OPENAI_API_KEY", ""))
    return TransformersLlm.load(config.llm_model, device)
