"""CLIP's text and image encoders (§2, D.2, D.4; the released code where the paper is silent).

Frames are (B, 3, H, W) in [-1, 1]. How a task conditions on the embeddings stands in svd.tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import kornia
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from svd.core.errors import UserError


class TextEncoder(nn.Module):
    """CLIP's text tower read at its penultimate layer, as Stable Diffusion 2.1 does: 77 x 1024 for ViT-H/14.

    whole: False for a tower without its last layer and projection, as SD 2.1's folders hold it. It gives the same
    context, but no vectors in the joint space.
    """

    def __init__(self, clip: open_clip.CLIP, whole: bool = True) -> None:
        super().__init__()
        self.token_embedding = clip.token_embedding
        self.positional_embedding = clip.positional_embedding
        self.transformer = clip.transformer
        self.ln_final = clip.ln_final
        self.text_projection = clip.text_projection if whole else None
        self._context_layers = len(clip.transformer.resblocks) - whole
        self.register_buffer("attn_mask", clip.attn_mask, persistent=False)
        self.context_length = int(clip.context_length)
        self._tokenizer = open_clip.SimpleTokenizer(context_length=self.context_length)

    @property
    def width(self) -> int:
        """Return the size D of a token's embedding."""
        return self.positional_embedding.shape[1]

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """Return (B, 77) token ids between start and end token, zero padded; longer captions are cut."""
        return self._tokenizer(list(captions)).to(self.positional_embedding.device)

    def _hidden(self, tokens: Tensor, layers: int) -> Tensor:
        length = tokens.shape[1]
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        mask = self.attn_mask[:length, :length].to(x.dtype)
        for block in self.transformer.resblocks[:layers]:
            x = block(x, attn_mask=mask)
        return self.ln_final(x)

    def forward(self, captions: Sequence[str]) -> Tensor:
        """Return context tokens (B, 77, D): the last layer but one, through the final layer norm."""
        return self._hidden(self.tokens(captions), self._context_layers)

    def project(self, tokens: Tensor) -> Tensor:
        """Project token ids (B, L) to (B, E) in the joint space, not normalised, from the last layer's end token.

        Raises UserError for a tower that isn't whole.
        """
        if self.text_projection is None:
            raise UserError(
                "this text encoder has no last layer and no projection, so texts can't be compared with pictures; "
                "give the output of the stage 'encoders'"
            )
        end = tokens.argmax(1)
        # Attention is causal: what stands behind the end token can't change the result, so it isn't computed.
        x = self._hidden(tokens[:, : int(end.max()) + 1], len(self.transformer.resblocks))
        return x[torch.arange(len(x), device=x.device), end] @ self.text_projection

    def features(self, captions: Sequence[str]) -> Tensor:
        """Return (B, E) unit vectors in the space shared with `ImageEncoder.features`."""
        return F.normalize(self.project(self.tokens(captions)), dim=-1)


class ImageEncoder(nn.Module):
    """CLIP's image tower with its projection: one vector per image, 1024 for ViT-H/14 (D.4; released code)."""

    mean: Tensor
    std: Tensor

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual
        self.register_buffer("mean", torch.tensor(open_clip.OPENAI_DATASET_MEAN).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(open_clip.OPENAI_DATASET_STD).reshape(3, 1, 1), persistent=False)

    @property
    def width(self) -> int:
        """Return the size E of the embedding."""
        return int(self.visual.output_dim)

    def preprocess(self, frames: Tensor) -> Tensor:
        """Convert (B, 3, H, W) in [-1, 1] to CLIP's normalised input (B, 3, S, S).

        The released code's resize: bicubic with aligned corners after a Gaussian blur when the image shrinks; the
        aspect ratio isn't kept. Other resizes shift the embedding.
        """
        return ((self._resize(frames.float()) + 1) / 2 - self.mean) / self.std

    def shrink(self, frames: Tensor) -> Tensor:
        """Resize (B, C, H, W) to (B, C, S, S) as `preprocess` does; that leaves planes of this size as they are."""
        return self._resize(frames.float())

    def _resize(self, planes: Tensor) -> Tensor:
        size = self.visual.image_size
        return kornia.geometry.resize(planes, size, interpolation="bicubic", align_corners=True, antialias=True)

    def forward(self, frames: Tensor) -> Tensor:
        """Embed (B, 3, H, W) in [-1, 1]: projected (B, E), not normalised."""
        return self.visual(self.preprocess(frames).to(self.visual.conv1.weight.dtype))

    def features(self, frames: Tensor) -> Tensor:
        """Return (B, E) unit vectors in the space shared with `TextEncoder.features`."""
        return F.normalize(self(frames), dim=-1)


class Encoders:
    """Frozen encoders. label: names the weights in reports (`toy-clip`, or open_clip model and weights)."""

    def __init__(self, text: TextEncoder | None, image: ImageEncoder | None, label: str) -> None:
        self._text, self._image, self.label = text, image, label

    @property
    def text(self) -> TextEncoder:
        """Return the text encoder; raise UserError when there is none, as in a released image-to-video model."""
        if self._text is None:
            raise UserError(f"{self.label} has no text encoder; give the output of the stage 'encoders'")
        return self._text

    @property
    def image(self) -> ImageEncoder:
        """Return the image encoder; raise UserError when there is none, as in a released text-to-image model."""
        if self._image is None:
            raise UserError(f"{self.label} has no image encoder; give the output of the stage 'encoders'")
        return self._image

    @property
    def widths(self) -> set[int]:
        """Return the cross-attention widths that the encoders can serve."""
        return {encoder.width for encoder in (self._text, self._image) if encoder is not None}

    @torch.no_grad()
    def image_features(self, frames: Tensor) -> Tensor:
        """Return unit vectors (B, E) of frames in [-1, 1]; dot products with `text_features` are CLIP scores."""
        return self.image.features(frames)

    @torch.no_grad()
    def shrink(self, frames: Tensor) -> Tensor:
        """Resize planes (B, C, H, W) in [-1, 1] to the image encoder's size; `image_features` of them are the same."""
        return self.image.shrink(frames)

    @torch.no_grad()
    def text_features(self, captions: Sequence[str]) -> Tensor:
        """Return unit vectors (B, E) of captions."""
        return self.text.features(captions)

    def to(self, *args: Any) -> Encoders:
        """Move both encoders, as nn.Module.to."""
        text = None if self._text is None else self._text.to(*args)
        image = None if self._image is None else self._image.to(*args)
        return Encoders(text, image, self.label)


def from_uint8(frames: NDArray[np.uint8]) -> Tensor:
    """Convert (T, H, W, 3) uint8 to (T, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 127.5 - 1
