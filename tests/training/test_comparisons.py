"""What a network takes from another clip's caption: whose it is given, and that the size of batches doesn't matter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toy_training import toy_context, toy_preset

from svd.model.formats.folders import load_unet
from svd.training import runner
from svd.training.comparisons import Validation
from svd.training.stages import run_image_pretraining


@pytest.mark.parametrize(
    "clips, others",
    [
        ("aaabbb", [3, 3, 3, 0, 0, 0]),  # windows of a clip follow each other in an index
        ("abcabc", [1, 2, 3, 4, 5, 0]),
        ("aaa", [0, 1, 2]),
    ],
)
def test_the_other_is_of_another_clip(clips: str, others: list[int]) -> None:
    test: Any = SimpleNamespace(row=lambda index: {"clip_id": clips[index]})
    unused: Any = None
    assert Validation(unused, unused, "v", unused, test, len(clips), batch=2).others == others


def test_one_clip_at_a_time_is_given_another_ones_caption_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Validation] = []
    compare = runner.compare

    def keep(training: runner.Training, *arguments: Any) -> Any:
        found.append(training.comparison())
        return compare(training, *arguments)

    monkeypatch.setattr(runner, "compare", keep)
    context = toy_context(tmp_path, "images", toy_preset())
    run_image_pretraining(context)
    (together,) = found
    unet, draw = load_unet(context.output / "unet"), torch.Generator().manual_seed(0)
    with torch.no_grad():  # a few steps teach nothing of captions
        for weight in unet.parameters():
            weight.normal_(0, 0.2, generator=draw)
    one, all_ = (replace(together, batch=size).losses_swapped(unet) for size in (1, 8))
    assert torch.allclose(one, all_, rtol=1e-4)
    own = together.losses(unet, together.task)
    assert not torch.isclose(one, own, rtol=1e-3).any(), "every sample loses or gains"
