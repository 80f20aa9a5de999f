"""The stage `encoders`: the text and image encoders that every later stage shares.

For released weights it fetches and checks them and writes their name. For `toy-clip` it trains a small open_clip
model with CLIP's own objective on frames and captions of synthetic worlds, drawn with a seed that no other stage
uses; it is judged on a test world, whose objects and backgrounds are combinations that the training world doesn't have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from svd.config import Preset
from svd.core.files import atomic_file
from svd.model.encoders import ImageEncoder, TextEncoder, from_uint8
from svd.model.formats.clip import build_clip, released_file, save_reference, save_toy, toy_config
from svd.model.safetensors import read_tensors
from svd.stage import Report, StageContext, publish
from svd.synthetic.scenes import Split, Style, World, render_scene
from svd.training.card_contents import encoders_card
from svd.training.model_card import write_card

_SEED_OFFSET = 104_729  # worlds of this stage must not be those that the sources show
_TRAIN_CLIPS = 2048
_TEST_CLIPS = 200
_HEIGHT, _WIDTH = 64, 96
_BATCH = 64
_LEARNING_RATE = 1e-3
_WARMUP = 20
_CHECKPOINT_EVERY = 50
_MAX_LOGIT_SCALE = 100.0


@dataclass(frozen=True)
class Pairs:
    """N rendered clips: frames (N, K, H, W, 3) uint8, K per clip, and one caption per clip."""

    frames: NDArray[np.uint8]
    captions: list[str]


def run(context: StageContext) -> Report:
    """Train the toy-clip, or check released weights; `svd.model.formats.encoders.load_encoders` reads the output."""
    finished = context.work / "finished"
    config = context.preset.encoders
    if config.kind == "open_clip":
        tensors = read_tensors(released_file(config), config.sha256)
        save_reference(config, finished)
        parameters = sum(torch.Size(tensor.shape).numel() for tensor in tensors.values())
        report = Report({"parameters": parameters}, f"{config.model} {config.weights}")
        return publish(finished, context.output, report)
    metrics = _train_toy(context, finished)
    accuracy, chance = metrics["retrieval_top1"], metrics["retrieval_top1_chance"]
    summary = f"toy-clip finds the caption of {accuracy:.0%} of unseen clips (chance {chance:.1%})"
    report = Report(metrics, summary)
    write_card(finished, encoders_card(context, _TRAIN_CLIPS, config.toy_iterations), context, report)
    return publish(finished, context.output, report)


def _train_toy(context: StageContext, finished: Path) -> dict[str, float]:
    preset = context.preset
    config = preset.encoders
    architecture = toy_config(config.toy_width, preset.model.unet.cross_attention_dim, config.toy_tokens)
    clip = _fresh(architecture, preset.seed)
    test = render_pairs(preset.seed + _SEED_OFFSET, "test", _TEST_CLIPS, frames=1, styles=config.toy_worlds)
    before = retrieval(clip, test)
    train_clip(clip, context)
    after = retrieval(clip, test)
    save_toy(clip, architecture, finished)
    return after | {f"{name}_before": before[name] for name in ("retrieval_top1", "retrieval_top5", "caption_auc")}


def _fresh(architecture: dict[str, Any], seed: int) -> open_clip.CLIP:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_clip(architecture, "the toy-clip preset")


def render_pairs(seed: int, split: Split, clips: int, frames: int, styles: Sequence[Style] = ("textured",)) -> Pairs:
    """Render the first `clips` scenes of worlds of these styles in turn: `frames` frames each, one second apart.

    Captions don't repeat, but those of a plain training world, which has only 432.
    """
    worlds = [World(seed, split, style) for style in styles]
    pictures: list[NDArray[np.uint8]] = []
    captions: list[str] = []
    index = 0
    with tqdm(total=clips, desc=f"render {split} clips", unit="clip", leave=False) as bar:
        while len(pictures) < clips:
            world = worlds[index % len(worlds)]
            scene = world.scene(index // len(worlds))
            index += 1
            repeats = world.style == "plain" and split == "train"
            if scene.caption in captions and not repeats:
                continue
            captions.append(scene.caption)
            pictures.append(render_scene(scene, frames, _HEIGHT, _WIDTH, fps=1))
            bar.update()
    return Pairs(np.stack(pictures), captions)


def train_clip(clip: open_clip.CLIP, context: StageContext) -> None:
    """Train `clip` in place for `encoders.toy_iterations` steps; continue from the checkpoint in `context.work`."""
    preset, path = context.preset, context.work / "toy-clip.pt"
    steps = preset.encoders.toy_iterations
    keep_context(clip)
    learned = [parameter for parameter in clip.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    start = _resume(path, clip, optimizer)
    if start == steps:
        return
    text, image = TextEncoder(clip), ImageEncoder(clip.visual)
    styles = preset.encoders.toy_worlds
    pairs = render_pairs(preset.seed + _SEED_OFFSET, "train", _TRAIN_CLIPS, frames=2, styles=styles)
    tokens = text.tokens(pairs.captions)
    clip.train()
    for step in tqdm(range(start, steps), desc="train toy-clip", initial=start, total=steps, unit="step"):
        chosen, moment = _draw(preset, step, len(pairs.captions))
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, steps)
        frames = from_uint8(pairs.frames[chosen, moment])
        loss, accuracy = contrastive(image(frames), text.project(tokens[chosen]), clip.logit_scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        context.tracker.log_metrics({"loss": float(loss.detach()), "batch_accuracy": accuracy}, step)
        if (step + 1) % _CHECKPOINT_EVERY == 0 or step + 1 == steps:
            _checkpoint(path, clip, optimizer, step + 1)
    clip.eval()


def keep_context(clip: open_clip.CLIP) -> None:
    """Let only the text tower's last layer and projection learn: the context that U-Nets read stays as drawn.

    Single frames teach nothing of motion. A tower that learned from them would bring two captions that differ in motion
    alone to one context (docs/experiments.md); random layers tell all words apart.
    """
    for module in (clip.token_embedding, clip.ln_final, *clip.transformer.resblocks[:-1]):
        module.requires_grad_(False)
    clip.positional_embedding.requires_grad_(False)


def _draw(preset: Preset, step: int, clips: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw the clips of a batch and a frame of each; a function of (seed, step) alone, so that resuming is exact."""
    generator = np.random.default_rng((preset.seed, _SEED_OFFSET, step))
    return generator.choice(clips, _BATCH, replace=False), generator.integers(0, 2, _BATCH)


def _learning_rate(step: int, steps: int) -> float:
    """Return the rate at a step: linear warm-up, then half a cosine down to zero."""
    progress = step / steps
    return _LEARNING_RATE * min(1.0, (step + 1) / _WARMUP) * 0.5 * (1 + float(np.cos(np.pi * progress)))


def contrastive(images: Tensor, texts: Tensor, logit_scale: Tensor) -> tuple[Tensor, float]:
    """Return CLIP's symmetric loss (arXiv 2103.00020, Fig. 3), and the share of images whose own text scores highest.

    images, texts: (B, E), row i of one belongs to row i of the other. logit_scale: logarithm of the inverse
    temperature, capped at ln 100.
    """
    scale = logit_scale.exp().clamp(max=_MAX_LOGIT_SCALE)
    logits = scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    own = torch.arange(len(logits), device=logits.device)
    loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    return loss, float((logits.argmax(1) == own).float().mean())


@torch.no_grad()
def retrieval(clip: open_clip.CLIP, pairs: Pairs) -> dict[str, float]:
    """Measure how well images find their captions among all captions of `pairs` (first frames, N x N scores).

    retrieval_top1, retrieval_top5: share of images whose caption is the first, or among the first five.
    caption_auc: how often an image's own caption scores above another clip's.
    """
    clip.eval()
    images = ImageEncoder(clip.visual).features(from_uint8(pairs.frames[:, 0]))
    scores = images @ TextEncoder(clip).features(pairs.captions).T
    own = scores.diagonal()[:, None]
    above = (scores > own).sum(1)
    others = len(scores) - 1
    return {
        "retrieval_top1": float((above < 1).float().mean()),
        "retrieval_top5": float((above < 5).float().mean()),
        "retrieval_top1_chance": 1 / len(scores),
        "caption_auc": float(1 - above.double().mean() / others),
        "test_clips": len(scores),
    }


def _checkpoint(path: Path, clip: open_clip.CLIP, optimizer: torch.optim.Optimizer, step: int) -> None:
    with atomic_file(path) as temporary, temporary.open("wb") as stream:
        torch.save({"model": clip.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, stream)


def _resume(path: Path, clip: open_clip.CLIP, optimizer: torch.optim.Optimizer) -> int:
    """Load the checkpoint if there is one; return the number of steps done."""
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True)
    clip.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])
