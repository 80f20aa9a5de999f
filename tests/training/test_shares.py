"""Which ranks can share the clips of a phase, bucket by bucket."""

from __future__ import annotations

from toy_training import PHASE, SIZE

from svd.config import Phase, TrainingCompute
from svd.training.shares import unshareable


def said(phase: Phase, ranks: int, **compute: int) -> str:
    return unshareable(phase, TrainingCompute(**compute), ranks) or ""


def test_each_bucket_has_to_be_shared_evenly() -> None:
    plain = Phase.model_validate(PHASE)
    assert said(plain, 2, gradient_accumulation=2) == ""
    assert "batch of 4 clips can't be shared by 3 ranks x 1 accumulation steps; change 'batch_size'" in said(plain, 3)
    bucketed = Phase.model_validate(PHASE | {"buckets": [{"frames": 3, "height": SIZE, "width": SIZE}]})
    assert said(bucketed, 1) == ""
    assert "batch of 5 clips can't be shared by 2 ranks x 2 accumulation steps; change 'batch_multiple'" in said(
        bucketed, 2, gradient_accumulation=2
    )
    assert "4 ranks can't share clips whose 'frames' are 3" in said(bucketed, 4, context_ranks=4)
