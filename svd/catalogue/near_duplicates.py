"""Near-duplicate clips by similarity of embeddings: reported for every clip, dropped only when a filter asks for it.

A clip is represented by the mean of the embeddings of its three frames. Each clip is compared with *earlier* clips (in
the order of the catalogue), so the first of a group of duplicates stays. Up to `EXACT` clips all pairs are compared.
Above that, only pairs within a cell of a seeded k-means are compared, as SemDeDup does; this bounds time and memory.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
from safetensors import safe_open

EXACT = 50_000
CELL = 5_000  # mean number of clips per cell
BLOCK = 2_048
ITERATIONS = 8


def read_embeddings(clips: pl.DataFrame, folder: Path) -> np.ndarray:
    """Read the unit-length mean embeddings of the clips, (N, E) float32, from `folder`/clips-<unit>.safetensors."""
    vectors = np.zeros((0, 0), np.float32)  # filled in place: a copy of ten million rows would not fit into memory
    for (unit,), group in clips.with_row_index("row").group_by("unit", maintain_order=True):
        with safe_open(folder / f"clips-{unit:06d}.safetensors", framework="numpy") as file:
            for row, name in group.select("row", "clip_id").iter_rows():
                vector = file.get_tensor(name).astype(np.float32).mean(0)
                if not vectors.size:
                    vectors = np.empty((len(clips), len(vector)), np.float32)
                vectors[row] = vector / max(float(np.linalg.norm(vector)), 1e-12)
    return vectors


def near_duplicates(clips: pl.DataFrame, folder: Path) -> pl.DataFrame:
    """Add `duplicate_of` (clip id) and `duplicate_similarity` (cosine) of the most similar earlier clip.

    Both are null for a clip that has no earlier clip to compare with.
    """
    if not len(clips):
        return clips.with_columns(duplicate_of=pl.lit(None, pl.String), duplicate_similarity=pl.lit(None, pl.Float32))
    similarity, partner = most_similar_earlier(read_embeddings(clips, folder))
    names = clips["clip_id"].to_list()
    return clips.with_columns(
        pl.Series("duplicate_of", [names[p] if p >= 0 else None for p in partner], pl.String),
        pl.Series("duplicate_similarity", np.where(partner >= 0, similarity, np.nan).round(4), pl.Float32).fill_nan(
            None
        ),
    )


def most_similar_earlier(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the highest cosine of each unit-length vector (N, E) with an earlier one, and its index (-1: none)."""
    similarity = np.full(len(vectors), -1.0, np.float32)
    partner = np.full(len(vectors), -1, np.int64)
    for members in _cells(vectors):
        for start in range(0, len(members), BLOCK):
            rows = members[start : start + BLOCK]
            cosines = vectors[rows] @ vectors[members[: start + len(rows)]].T
            # Row r of the block is member start + r; the columns from there on are not earlier.
            cosines[np.arange(cosines.shape[1])[None] >= (start + np.arange(len(rows)))[:, None]] = -2
            best = cosines.argmax(1)
            value = cosines[np.arange(len(rows)), best]
            found = value > -2
            similarity[rows[found]], partner[rows[found]] = value[found], members[best[found]]
    return similarity, partner


def _cells(vectors: np.ndarray) -> list[np.ndarray]:
    """Return the indices of the vectors of each cell, ascending; one cell for up to EXACT vectors."""
    if len(vectors) <= EXACT:
        return [np.arange(len(vectors))]
    count = -(-len(vectors) // CELL)
    generator = np.random.default_rng(0)
    sample = vectors[generator.choice(len(vectors), min(len(vectors), 64 * count), replace=False)]
    centres = sample[:count].copy()
    for _ in range(ITERATIONS):
        owner = _nearest(sample, centres)
        for cell in np.unique(owner):
            mean = sample[owner == cell].mean(0)
            centres[cell] = mean / max(float(np.linalg.norm(mean)), 1e-12)
    owner = _nearest(vectors, centres)
    order = np.argsort(owner, kind="stable")
    return [cell for cell in np.split(order, np.searchsorted(owner[order], np.arange(1, count))) if len(cell)]


def _nearest(vectors: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return the index of the nearest centre of each vector, (N,), block by block to bound memory."""
    parts = [(vectors[i : i + BLOCK] @ centres.T).argmax(1) for i in range(0, len(vectors), BLOCK)]
    return np.concatenate(parts)
