"""The captioner `coca`: CoCa of open_clip on the middle frame of a clip (§3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from svd.config import CaptionsConfig
from svd.core.errors import UserError
from svd.curation.captions.base import CaptionRequest, first_line
from svd.curation.captions.beam_search import beam_search

START, END = 49406, 49407  # tokens of CLIP's tokenizer


class CocaCaptioner:
    """CoCa: an image encoder and a text decoder, with beam search over the decoder."""

    name = "coca"

    def __init__(self, model: torch.nn.Module, preprocess: Any, device: str, batch: int = 16) -> None:
        self.model = model.to(device).eval()
        self.preprocess = preprocess
        self.device, self.batch = device, batch

    @classmethod
    def load(cls, model: str, weights: str, device: str) -> CocaCaptioner:
        """Load a CoCa of open_clip by name and pretrained tag or path; raises UserError when that fails."""
        import open_clip  # takes a second, so only when it is used

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
        """Return one caption per clip."""
        captions: list[str | None] = []
        for start in range(0, len(requests), self.batch):
            images = [Image.fromarray(r.frames[1]) for r in requests[start : start + self.batch]]
            pixels = torch.stack([self.preprocess(image) for image in images]).to(self.device)
            seen = self.model(pixels)
            captions += [
                self._decode(latent[None], embeddings[None])
                for latent, embeddings in zip(seen["image_features"], seen["image_embs"], strict=True)
            ]
        return captions

    def _decode(self, latent: torch.Tensor, embeddings: torch.Tensor) -> str | None:
        """Return the best caption of one image: latent (1, E), embeddings (1, N, E)."""
        import open_clip

        def step(tokens: torch.Tensor) -> torch.Tensor:
            """Return the logits of the next token, (K, V), after each of K sequences."""
            count = len(tokens)
            seen = {"image_latent": latent.expand(count, -1), "image_embs": embeddings.expand(count, -1, -1)}
            return self.model(None, tokens.to(self.device), **seen, output_labels=False)["logits"][:, -1]

        tokens = beam_search(step, START, END)
        return open_clip.decode(torch.tensor(tokens)).strip(" .") or None


def make_coca(config: CaptionsConfig, device: str) -> CocaCaptioner:
    """Load the configured CoCa; raises UserError when that fails."""
    return CocaCaptioner.load(config.coca_model, config.coca_weights, device)
