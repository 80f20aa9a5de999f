"""The previews of a training are sampled as the preset generates the task that is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy_training import toy_context, toy_preset

from svd.config import Preset
from svd.tasks.base import Task
from svd.tasks.registry import TASKS
from svd.tasks.text_to_video import IMAGE
from svd.training import stages
from svd.training.runner import Training


@pytest.mark.parametrize("task", [*TASKS, IMAGE], ids=lambda task: task.name)
def test_previews_take_the_sampling_of_their_task(task: Task, tmp_path: Path) -> None:
    def training(preset: Preset) -> Training:
        context = toy_context(tmp_path, "preview", preset)
        return stages._training(context, "video-pretraining", task, preset.video_pretraining, None)

    def with_sampling(guidance: float, *places: str) -> Preset:
        values = toy_preset().model_dump(mode="json")
        for part, name in (place.split(".") for place in places):
            values[part][name]["sampling"] = {"steps": 3, "guidance": guidance}
        return Preset.model_validate(values)

    plain = training(toy_preset()).preview().sampling
    assert plain.steps == 2  # of compute.*.sample_steps
    assert plain.guidance == task.preset_sampling(toy_preset()).guidance
    assert training(with_sampling(9.5, "evaluation.ucf101", "evaluation.multiview")).preview().sampling == plain
    own = training(with_sampling(8.25, f"generation.{task.section}")).preview().sampling
    assert (own.steps, own.guidance) == (2, 8.25)
    others = [f"generation.{other.section}" for other in TASKS if other.section != task.section]
    assert training(with_sampling(8.25, *others)).preview().sampling == plain
