"""Training examples whose order and random draws are functions of (seed, global sample index) alone.

The state of the whole data pipeline is therefore one integer, the next step. Training resumes exactly, on any number
of ranks, because sample i is the same wherever it is drawn. Shapes: B clips, T frames, C latent channels, h x w latent
size, S tokens of width D, E width of an image embedding.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from svd.core.errors import UserError
from svd.diffusion.edm import DiscreteSchedule, LogNormal, offset_noise
from svd.latents.cache import DamagedSample, LatentCache, Sample

logger = logging.getLogger(__name__)
Batch = dict[str, Tensor]
DAMAGED_SHARE = 0.01
SUBSTITUTES = 1 << 40  # epochs apart from each other and from all that a training reaches: other orders of the samples


def generator(seed: int, index: int, stream: str) -> torch.Generator:
    """Make a CPU generator for one quantity (`stream`) of one global sample.

    Quantities are independent: a new one leaves the numbers of all others as they are.
    """
    key = hashlib.blake2b(f"{seed}/{index}/{stream}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "little"))


def shuffled(position: int, size: int, key: str) -> int:
    """Map `position` through a pseudo-random permutation of range(size), chosen by `key`.

    A Feistel network with cycle walking: O(1) memory, and it can start anywhere. An array for 10^8 clips would take
    0.8 GB per rank.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for turn in range(4):
            block = hashlib.blake2b(f"{key}/{turn}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(block, "little") & mask)
        position = (left << half) | right
        if position < size:
            return position


@dataclass(frozen=True)
class Draws:
    """The random draws of a sample: ln sigma ~ N(p_mean, p_std^2) (D.2), captions by probability (E.2.2), dropout per
    signal for classifier-free guidance, the conditioning frame's noise ln sigma ~ N(conditioning_p_mean,
    conditioning_p_std^2) (D.4).

    strata: above 0 for validation, whose draws are fixed: sigma runs through that many quantiles of its distribution,
    the posterior's mean is used, nothing is dropped and the first caption is taken. pixels: the conditioning frame is
    needed as an image too. image_share: share of the clips that unrelated images replace (joint training).
    """

    seed: int
    p_mean: float
    p_std: float
    objective: Literal["edm", "discrete-v"] = "edm"
    offset_noise: float = 0.0
    text_dropout: float = 0.0
    image_dropout: float = 0.0
    conditioning_p_mean: float = -3.0
    conditioning_p_std: float = 0.5
    caption_probabilities: tuple[tuple[str, float], ...] = ()
    pixels: bool = False
    image_share: float = 0.0
    strata: int = 0

    @property
    def joint(self) -> bool:
        """Whether some samples are images; validation uses clips alone, whatever training mixes in."""
        return self.image_share > 0 and not self.strata

    def images(self, index: int) -> bool:
        """Return whether a global sample is made of unrelated images."""
        return self.joint and torch.rand((), generator=generator(self.seed, index, "joint")).item() < self.image_share

    def sigma(self, index: int) -> Tensor:
        """Draw the noise level of a global sample, ()."""
        if self.strata:
            quantile = torch.tensor((index % self.strata + 0.5) / self.strata, dtype=torch.float64)
            if self.objective == "discrete-v":
                return DiscreteSchedule().sigmas[int(quantile * DiscreteSchedule().steps)]
            return (self.p_mean + self.p_std * math.sqrt(2) * torch.erfinv(2 * quantile - 1)).exp().float()
        source = generator(self.seed, index, "sigma")
        schedule = LogNormal(self.p_mean, self.p_std) if self.objective == "edm" else DiscreteSchedule()
        return schedule.sample(1, source)[0]

    def kept(self, index: int, stream: str, dropout: float) -> bool:
        """Return whether a conditioning signal survives the dropout."""
        return bool(self.strata) or torch.rand((), generator=generator(self.seed, index, stream)).item() >= dropout


class Examples(Dataset[Batch]):
    """Training examples by global sample index: cached samples with all draws made, in a new order every epoch.

    `frames` T may be fewer than a sample holds; then a window of it is drawn. It is the first frames when pixels are
    needed and in validation, because the conditioning frame is cached for the whole sample.

    With `draws.image_share` some samples are T frames of as many samples drawn at random (with replacement), each with
    a caption of its own. The temporal layers are switched off for them, as the mixers of the released code provide for.
    Their motion bucket is 0, their fps that of the clip they replace. The paper states neither the images nor their
    ids. One sigma for all T of them is our choice: the network takes one per sample.

    An example: latents (T, C, h, w) scaled; noise, the same shape; sigma (); text (S, D), the empty prompt's when
    dropped or when there is none; image (T, E) and keep_image (), keep_concat () in {0, 1}; conditioning_sigma (); fps,
    motion_bucket, elevation () as numbers; with `draws.pixels` frame and frame_noise (3, H, W), else latent_noise
    (2, C, h, w) for interpolation. In joint training text is (T, S, D), and image_only () tells which samples are
    images.
    """

    def __init__(
        self,
        cache: LatentCache,
        rows: Sequence[Mapping[str, Any]],
        frames: int,
        draws: Draws,
        damaged_share: float = DAMAGED_SHARE,
    ) -> None:
        if not rows:
            raise UserError(f"{cache.folder}: no samples left to train on after filtering; loosen the selection")
        self.cache = cache
        self.rows = rows
        self.frames = frames
        self.draws = draws
        self.damaged: set[str] = set()
        self.allowed_damaged = max(1, int(damaged_share * len(rows)))

    def __len__(self) -> int:
        """Return the samples of one epoch; indices go on beyond it."""
        return len(self.rows)

    def row(self, index: int, turn: int = 0) -> Mapping[str, Any]:
        """Return the index row of a global sample; validation takes the rows in their order, without shuffling.

        turn: another row each, in place of one that can't be read.
        """
        count = len(self.rows)
        if self.draws.strata:
            return self.rows[(index + turn) % count]
        epoch, position = divmod(index, count)
        return self.rows[shuffled(position, count, f"{self.draws.seed}/{epoch + turn * SUBSTITUTES}")]

    def __getitem__(self, index: int) -> Batch:
        draws = self.draws
        images = draws.images(index)
        sample, text = self._images(index) if images else self._clip(index)
        latents = self._latents(sample.moments, index)
        example = {
            "index": torch.tensor(index),
            "latents": latents,
            "text": text,
            "noise": self._noise(latents.shape, index, images),
            "sigma": draws.sigma(index),
            "scaling_factor": torch.tensor(self.cache.scaling_factor),
            "image": sample.image,
            "keep_image": torch.tensor(float(draws.kept(index, "image", draws.image_dropout))),
            "keep_concat": torch.tensor(float(draws.kept(index, "concat", draws.image_dropout))),
            "conditioning_sigma": self._conditioning_sigma(index),
            "fps": torch.tensor(float(sample.row["fps"])),
            "motion_bucket": torch.tensor(float(sample.row["motion_bucket"])),
            "elevation": torch.tensor(float(sample.row["elevation"])),
        }
        if draws.joint:
            example["image_only"] = torch.tensor(images)
        if draws.pixels:
            example["frame"] = sample.frame
            example["frame_noise"] = torch.randn(sample.frame.shape, generator=generator(draws.seed, index, "frame"))
        else:
            shape = (2, *latents.shape[1:])
            example["latent_noise"] = torch.randn(shape, generator=generator(draws.seed, index, "ends"))
        return example

    def __getitems__(self, indices: list[int]) -> list[Batch]:
        """Read the samples of a batch; torch's loader calls it."""
        return self.cache.each(self.__getitem__, indices)

    def _clip(self, index: int) -> tuple[Sample, Tensor]:
        """Read a sample cut to T frames, and its text: (S, D), in joint training (T, S, D)."""
        sample = self._read(self.row(index, turn) for turn in range(len(self.rows)))
        window = self._window(len(sample.moments), index)
        text = self._text(sample, index)
        if self.draws.joint:
            text = text.expand(self.frames, -1, -1)
        return replace(sample, moments=sample.moments[window], image=sample.image[window]), text

    def _read(self, candidates: Iterable[Mapping[str, Any]]) -> Sample:
        """Read the first sample that isn't damaged of `candidates`, which are a function of the index as well.

        Each damaged sample is named in the log once. Raises UserError when there are more than `damaged_share` allows,
        in this process: workers count for themselves.
        """
        for row in candidates:
            try:
                return self.cache.read(row)
            except DamagedSample as error:
                self._note(row, error)
        raise UserError(f"{self.cache.folder}: no sample can be read; run the stage 'latents' again")

    def _note(self, row: Mapping[str, Any], error: DamagedSample) -> None:
        if row["sample_id"] in self.damaged:
            return
        self.damaged.add(row["sample_id"])
        if len(self.damaged) > self.allowed_damaged:
            raise UserError(
                f"{self.cache.folder}: {len(self.damaged)} of {len(self.rows)} samples are damaged, which is more than "
                f"{self.allowed_damaged}; delete the damaged shards and run the stage 'latents' again. Last: {error}"
            ) from None
        logger.warning("clip %s is left out: %s (%d damaged so far)", row["clip_id"], error, len(self.damaged))

    def sources(self, index: int) -> list[Mapping[str, Any]]:
        """Return the index rows that a global sample is read from: of its clip, or of each of its unrelated images."""
        if self.draws.images(index):
            return [sample.row for sample in self._drawn(generator(self.draws.seed, index, "images"))]
        return [self._read(self.row(index, turn) for turn in range(len(self.rows))).row]

    def _drawn(self, source: torch.Generator) -> list[Sample]:
        """Draw T samples for the images of a global sample."""
        count = len(self.rows)
        chosen = torch.randint(count, (self.frames,), generator=source).tolist()
        return [self._read(self.rows[(number + turn) % count] for turn in range(count)) for number in chosen]

    def _images(self, index: int) -> tuple[Sample, Tensor]:
        """Draw T frames, each of a sample of its own, in place of a clip, and their texts (T, S, D)."""
        source = generator(self.draws.seed, index, "images")
        samples = self._drawn(source)
        frames = [int(torch.randint(len(sample.moments), (), generator=source)) for sample in samples]
        moments, image = (
            torch.stack([getattr(sample, name)[frame] for sample, frame in zip(samples, frames, strict=True)])
            for name in ("moments", "image")
        )
        texts = [self._text(sample, index, f"/{number}") for number, sample in enumerate(samples)]
        row = {**self.row(index), "motion_bucket": 0}
        return Sample(moments, image, samples[0].frame, (), row), torch.stack(texts)

    def _noise(self, shape: Sequence[int], index: int, images: bool) -> Tensor:
        """Draw noise (T, C, h, w); the frames of a clip share one offset, unrelated images have one each."""
        draws = self.draws
        noise = torch.randn(shape, generator=generator(draws.seed, index, "noise"))
        apart = noise[:, None] if images else noise[None]
        return offset_noise(apart, draws.offset_noise, generator(draws.seed, index, "offset")).view(shape)

    def _window(self, available: int, index: int) -> slice:
        """Choose the frames of a cached sample that are used."""
        free = available - self.frames
        if free == 0 or self.draws.pixels or self.draws.strata:
            return slice(0, self.frames)
        start = int(torch.randint(free + 1, (), generator=generator(self.draws.seed, index, "window")))
        return slice(start, start + self.frames)

    def _latents(self, moments: Tensor, index: int) -> Tensor:
        """Sample the posterior (its mean in validation), scaled to unit variance: (T, C, h, w)."""
        mean, log_variance = moments.chunk(2, dim=1)
        if not self.draws.strata:
            posterior = torch.randn(mean.shape, generator=generator(self.draws.seed, index, "posterior"))
            mean = mean + (0.5 * log_variance).exp() * posterior
        return mean * self.cache.scaling_factor

    def _conditioning_sigma(self, index: int) -> Tensor:
        """Draw the noise level of the conditioning frame, (); in validation its median."""
        draws = self.draws
        if draws.strata:
            return torch.tensor(math.exp(draws.conditioning_p_mean))
        level = LogNormal(draws.conditioning_p_mean, draws.conditioning_p_std)
        return level.sample(1, generator(draws.seed, index, "conditioning"))[0]

    def _text(self, sample: Sample, index: int, part: str = "") -> Tensor:
        """Draw one of the sample's captions by its captioner's probability: (S, D).

        It is the empty prompt when dropped or when there is none. The probabilities of the captioners that a sample has
        are scaled to a sum of 1; several captions of one captioner share its probability. part: tells the images of one
        index apart.
        """
        draws = self.draws
        if not sample.texts or not draws.kept(index, f"text{part}", draws.text_dropout):
            return self.cache.null_text
        if draws.strata:
            return sample.texts[0][1]
        weights = dict(draws.caption_probabilities)
        several = Counter(captioner for captioner, _ in sample.texts)
        shares = torch.tensor([weights.get(captioner, 0.0) / several[captioner] for captioner, _ in sample.texts])
        shares = shares if shares.sum() > 0 else torch.ones_like(shares)
        chosen = torch.multinomial(shares, 1, generator=generator(draws.seed, index, f"caption{part}"))
        return sample.texts[int(chosen)][1]
