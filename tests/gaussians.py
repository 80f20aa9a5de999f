"""The Fréchet distance by its definition, a reference for `evaluation.frechet.distances.frechet`."""

from __future__ import annotations

import numpy as np

from evaluation.frechet.distances import Frechet


def _square_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T


def frechet_of_gaussians(
    mean_1: np.ndarray, covariance_1: np.ndarray, mean_2: np.ndarray, covariance_2: np.ndarray
) -> Frechet:
    """Distance of N(mean_1, covariance_1) and N(mean_2, covariance_2), means (d,), covariances (d, d)."""
    cross = np.linalg.svd(_square_root(covariance_1) @ _square_root(covariance_2), compute_uv=False).sum()
    difference = mean_1 - mean_2
    spread = float(np.trace(covariance_1) + np.trace(covariance_2) - 2.0 * cross)
    return Frechet(float(difference @ difference), spread)
