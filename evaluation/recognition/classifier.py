"""A small classifier of what a clip shows, trained on real clips of the training worlds, from a seed, in seconds.

It judges generated clips, so it must not depend on the models that made them: it sees pixels alone. How far it can be
trusted is its accuracy on real clips of worlds that it was not trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from evaluation.recognition.labels import RECOGNISED, LabelledClip
from svd.media.video import Frames

SHORT_SIDE = 32  # pixels that it sees of a clip's short side
BATCH = 32
RATE = 6e-3
_WIDTH = 24
_NOISE = 0.1  # greatest deviation of the noise on training clips, in [-1, 1] units
_BLUR = 0.5  # share of training clips that are blurred, as an autoencoder blurs


def _block(channels: int, out: int, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> nn.Sequential:
    padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
    convolution = nn.Conv3d(channels, out, kernel, stride, padding, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm3d(out), nn.ReLU())


class ClipClassifier(nn.Module):
    """Three 3D convolutions and a linear layer per attribute; `classes`: the answers of each attribute, in order."""

    def __init__(self, classes: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.classes = {name: tuple(answers) for name, answers in classes.items()}
        self.body = nn.Sequential(
            _block(3, _WIDTH, (1, 5, 5), (1, 2, 2)),
            _block(_WIDTH, 2 * _WIDTH, (3, 3, 3), (1, 2, 2)),
            _block(2 * _WIDTH, 3 * _WIDTH, (3, 3, 3), (2, 2, 2)),
        )
        self.heads = nn.ModuleDict({name: nn.Linear(6 * _WIDTH, len(answers)) for name, answers in classes.items()})

    def forward(self, clips: Tensor) -> dict[str, Tensor]:
        """Return for each attribute the scores of its answers, (B, K), for clips (B, 3, T, h, w) in [-1, 1]."""
        seen = self.body(clips)
        pooled = torch.cat([seen.mean((2, 3, 4)), seen.amax((3, 4)).mean(2)], 1)
        return {name: head(pooled) for name, head in self.heads.items()}

    @torch.no_grad()
    def answers(self, clips: Sequence[Frames]) -> dict[str, list[str]]:
        """Return for each attribute the likeliest answer of each clip (T, H, W, 3) uint8."""
        self.eval()
        scores = [self(batch) for batch in as_input(clips).split(BATCH)]
        return {
            name: [answers[int(k)] for part in scores for k in part[name].argmax(1)]
            for name, answers in self.classes.items()
        }


def as_input(clips: Sequence[Frames]) -> Tensor:
    """Scale clips of one shape (T, H, W, 3) uint8 to the classifier's input, (N, 3, T, h, w) in [-1, 1]."""
    pixels = torch.from_numpy(np.stack(clips)).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
    height, width = pixels.shape[-2:]
    scale = SHORT_SIDE / min(height, width)
    size = (round(height * scale), round(width * scale))
    small = F.interpolate(pixels.flatten(0, 1), size, mode="bilinear", antialias=True, align_corners=False)
    return small.unflatten(0, pixels.shape[:2]).transpose(1, 2).contiguous()


def train_classifier(clips: Sequence[LabelledClip], steps: int, seed: int) -> ClipClassifier:
    """Train a classifier for `steps` batches on clips and their labels; a function of its arguments.

    Training clips get noise and blur, because a generated clip is never as sharp as a real one.
    """
    classes = {name: sorted({clip.labels[name] for clip in clips}) for name in RECOGNISED}
    targets = {n: torch.tensor([answers.index(c.labels[n]) for c in clips]) for n, answers in classes.items()}
    inputs, draw = as_input([clip.frames for clip in clips]), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ClipClassifier(classes)
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for _ in tqdm(range(steps), "classifier", unit="step", leave=False, delay=2):
        chosen = torch.randint(len(clips), (BATCH,), generator=draw)
        scores = network(_worsened(inputs[chosen], draw))
        loss = sum((F.cross_entropy(scores[name], target[chosen]) for name, target in targets.items()), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def _worsened(clips: Tensor, draw: torch.Generator) -> Tensor:
    """Blur some of the clips (B, 3, T, h, w) and add noise of a random strength to each."""
    soft = F.avg_pool3d(clips, (1, 3, 3), stride=1, padding=(0, 1, 1), count_include_pad=False)
    blurred = torch.rand(len(clips), 1, 1, 1, 1, generator=draw) < _BLUR
    strength = _NOISE * torch.rand(len(clips), 1, 1, 1, 1, generator=draw)
    return torch.where(blurred, soft, clips) + strength * torch.randn(clips.shape, generator=draw)
