"""How the ranks of a training share its clips: groups of `context_ranks` each have the frames of the same clips."""

from __future__ import annotations

from svd.config import Phase, TrainingCompute


def unshareable(phase: Phase, compute: TrainingCompute, ranks: int) -> str | None:
    """Say why `ranks` can't share the frames or the batches of a phase, and what to change; None when they can."""
    shared, parts = compute.context_ranks, compute.gradient_accumulation
    if ranks % shared:
        return f"{ranks} ranks can't form groups of {shared} that share a clip; change 'context_ranks' or 'devices'"
    groups = ranks // shared
    for size in phase.by_bucket:
        if size.frames < shared:
            return f"{shared} ranks can't share clips whose 'frames' are {size.frames}; lower 'context_ranks'"
        if size.batch_size % (groups * parts):
            sharing = f"{groups} ranks" if shared == 1 else f"{groups} groups of {shared} ranks"
            key = "batch_size" if size.size == phase.size else "batch_multiple"
            return (
                f"a batch of {size.batch_size} clips can't be shared by {sharing} x {parts} accumulation steps; "
                f"change '{key}'"
            )
    return None
