"""The GPUs that a plan can name, and the share of their peak that a training is assumed to reach."""

from __future__ import annotations

from dataclasses import dataclass, replace

from svd.core.errors import UserError

# A training step of four clips at 14x320x576 on an H200, eager: 140.9e12 operations in 477 ms (benchmarks/gpu/H200.md).
UTILISATION = 0.30
RESERVE = 1.0  # GiB: CUDA's context, the workspaces of cuBLAS and cuDNN


@dataclass(frozen=True)
class Gpu:
    """A GPU as a plan needs it.

    memory: GiB that a program gets. half, single: TFLOP/s of dense matrix products in bf16, and in float32 without
    TF32, as the vendor states them. None: unknown.
    """

    name: str
    memory: float | None
    half: float | None
    single: float | None

    def peak(self, precision: str) -> float | None:
        """Return the TFLOP/s that a training in this precision could reach at most."""
        return self.single if precision == "32-true" else self.half


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-80", 79, 312, 19.5),
        Gpu("h100", 79, 989, 67),
        Gpu("h200", 139, 989, 67),
        Gpu("rtx4090", 23.5, 165, 82.6),
        Gpu("cpu", None, None, None),
    )
}


def choose_gpu(name: str, memory: float | None = None, peak: float | None = None) -> Gpu:
    """Return a GPU of the table, with other memory (GiB) or another peak (TFLOP/s), or one that both describe.

    Raises UserError for an unknown one.
    """
    if name not in GPUS and (memory is None or peak is None):
        raise UserError(f"no GPU '{name}' in the table: {', '.join(GPUS)}; for another one give --memory and --peak")
    gpu = GPUS.get(name, Gpu(name, None, None, None))
    if memory is not None:
        gpu = replace(gpu, memory=memory)
    return gpu if peak is None else replace(gpu, half=peak, single=peak)
