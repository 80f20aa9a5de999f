"""Scores of views against the truth: one number per view and metric, averaged over novel views, then over objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evaluation.multiview.alignment import pairwise_psnr
from evaluation.multiview.image_metrics import (
    Perceptor,
    clip_similarity,
    image_features,
    image_psnr,
    silhouette,
    silhouette_iou,
    ssim,
)
from evaluation.multiview.protocol import Truth, ViewProtocol, Views
from evaluation.tables import MEASURED, load_baselines
from svd.model.encoders import Encoders


@dataclass(frozen=True)
class Measures:
    """The networks behind the scores."""

    perceptor: Perceptor
    encoders: Encoders
    device: torch.device | str = "cpu"

    @property
    def clip_label(self) -> str:
        """The label of the encoder behind CLIP-S."""
        return self.encoders.label


@dataclass(frozen=True)
class Scores:
    """The scores of a subject.

    values: by metric, (objects, views). pairs: PSNR of every view with every true view, (V, V), averaged over objects.
    """

    subject: str
    values: Mapping[str, NDArray[np.float64]]
    pairs: NDArray[np.float64]

    def novel(self, metric: str) -> float:
        """Return the mean over the views that the model wasn't given, then over objects."""
        return float(self.values[metric][:, :-1].mean())

    def by_object(self, metric: str) -> NDArray[np.float64]:
        """Return the mean over the novel views of each object, (objects,)."""
        return np.asarray(self.values[metric][:, :-1].mean(1))

    def by_view(self, metric: str) -> NDArray[np.float64]:
        """Return the mean over objects for each view, (views,)."""
        return self.values[metric].mean(0)


def views_to_tensor(images: Views) -> Tensor:
    """Convert (V, H, W, 3) uint8 to (V, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255


def score(subject: str, views_of: Callable[[int], Views], truth: Truth, measures: Measures) -> Scores:
    """Score a subject; `views_of(i)` returns its views of object i."""
    collected: dict[str, list[Tensor]] = {}
    pairs = []
    for number in range(len(truth.names)):
        true, views = views_to_tensor(truth.views(number)), views_to_tensor(views_of(number))
        features = image_features(measures.encoders, torch.cat([views, true]), measures.device).chunk(2)
        found = {
            "psnr": image_psnr(views, true),
            "psnr_masked": image_psnr(views, true, silhouette(true)),
            "ssim": ssim(views, true),
            measures.perceptor.name: measures.perceptor(views, true),
            "clip_s": clip_similarity(*features),
            "silhouette_iou": silhouette_iou(views, true),
        }
        for metric, values in found.items():
            collected.setdefault(metric, []).append(values)
        pairs.append(pairwise_psnr(views, true))
    values = {metric: torch.stack(rows).double().numpy() for metric, rows in collected.items()}
    return Scores(subject, values, np.mean(pairs, axis=0))


def rows(scores: Sequence[Scores], truth: Truth, protocol: ViewProtocol, measures: Measures) -> list[dict[str, Any]]:
    """Return the measured rows of the table; each names networks, objects, protocol and renderer."""
    about = {
        "clip_weights": measures.clip_label,
        "perceptual_weights": measures.perceptor.weights,
        "dataset": truth.dataset,
        "objects": len(truth.names),
        "views": protocol.views - 1,
        "protocol": f"{protocol.name} {protocol.digest}",
        "renderer": protocol.renderer,
        "source": MEASURED,
    }
    return [{"subject": s.subject, **{m: round(s.novel(m), 6) for m in s.values}, **about} for s in scores]


def published_rows() -> list[dict[str, Any]]:
    """Return the paper's numbers (Fig. 10a) in the same columns; implementation, objects and cameras are not known."""
    section = load_baselines()["multiview"]
    about = {
        "clip_weights": "not given",
        "perceptual_weights": "LPIPS, network not given",
        "dataset": "GSO, not listed",
        "objects": 50,
        "protocol": "not given",
        "renderer": "not given",
        "source": f"paper: {section['source']}",
    }
    return [
        {"subject": row["name"], "psnr": row["psnr"], "lpips": row["lpips"], "clip_s": row["clip_s"], **about}
        for row in section["rows"]
    ]
