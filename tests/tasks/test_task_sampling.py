"""Every task has its own sampling: no evaluation's options steer what users, servers and previews get."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows.serving.model import VideoModel
from svd.config import Preset
from svd.config.load import load_preset
from svd.tasks.base import Task
from svd.tasks.registry import TASKS, task_of_stage, tasks_of_channels
from svd.tasks.text_to_video import IMAGE

EVALUATIONS = {
    f"{part}.sampling": {"steps": 3, "guidance": 1.25, "solver": "heun", "sigma_max": 7.0}
    for part in ("evaluation.ucf101", "evaluation.multiview", "threshold_calibration")
}
OWN = {"steps": 4, "guidance": 9.5}


@pytest.mark.parametrize("task", [*TASKS, IMAGE], ids=lambda task: task.name)
def test_a_task_is_sampled_by_its_own_options(task: Task) -> None:
    plain = task.preset_sampling(load_preset("tiny"))
    assert task.preset_sampling(load_preset("tiny", dict(EVALUATIONS))) == plain
    others = {f"generation.{other.section}.sampling": OWN for other in TASKS if other.section != task.section}
    assert task.preset_sampling(load_preset("tiny", others)) == plain
    changed = task.preset_sampling(load_preset("tiny", {f"generation.{task.section}.sampling": OWN}))
    assert (changed.steps, changed.guidance) == (4, 9.5) != (plain.steps, plain.guidance)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_without_options_a_task_has_its_default(task: Task) -> None:
    assert task.preset_sampling(load_preset("tiny", {"generation": {}})) == task.sampling
    assert (task.sampling.steps, task.sampling.guidance) == ((50, 7) if task.name == "text-to-video" else (25, 3))


def served_request(preset: Preset) -> Any:
    model = VideoModel()
    model._stage, model._preset = "high-quality-finetuning", preset
    model._task, model._config = task_of_stage(model._stage), preset.high_quality_finetuning
    return model._request({"prompt": "a ball"}, {"fps": 7, "motion_bucket": 127}, seed=0)


def test_a_served_request_is_sampled_by_the_tasks_options() -> None:
    plain = served_request(load_preset("tiny")).sampling
    assert served_request(load_preset("tiny", dict(EVALUATIONS))).sampling == plain
    changed = served_request(load_preset("tiny", {"generation.text_to_video.sampling": OWN})).sampling
    assert (changed.steps, changed.guidance) == (4, 9.5)


def test_every_section_of_generation_is_a_task(tmp_path: Path) -> None:
    assert {task.section for task in TASKS} == set(type(load_preset("tiny").generation).model_fields)
    root = Path(__file__).parents[2]
    assert all((root / "svd/tasks" / f"{task.section}.py").is_file() for task in TASKS)


def test_channels_follow_from_the_table() -> None:
    assert [task.in_channels() for task in TASKS] == [4, 8, 8, 9]
    assert [task.in_channels(16) for task in TASKS] == [16, 32, 32, 33]
    assert tasks_of_channels(8) == "image-to-video or multi-view"
    assert tasks_of_channels(5) == "unknown"
