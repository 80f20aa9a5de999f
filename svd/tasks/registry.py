"""The table of tasks: a new task is a file beside this one and a line here."""

from __future__ import annotations

from svd.tasks.base import Task
from svd.tasks.image_to_video import IMAGE_TO_VIDEO
from svd.tasks.interpolation import INTERPOLATION
from svd.tasks.multiview import MULTIVIEW
from svd.tasks.text_to_video import TEXT_TO_VIDEO

TASKS: tuple[Task, ...] = (TEXT_TO_VIDEO, IMAGE_TO_VIDEO, MULTIVIEW, INTERPOLATION)


def task_of_stage(stage: str) -> Task:
    """Return the task that a stage trains; raise KeyError for a stage that trains none of the table."""
    return {name: task for task in TASKS for name in task.stages}[stage]


def tasks_of_channels(in_channels: int) -> str:
    """Name the tasks whose networks have so many input channels, for messages; "unknown" when there is none.

    >>> tasks_of_channels(8)
    'image-to-video or multi-view'
    """
    return " or ".join(task.name for task in TASKS if task.in_channels() == in_channels) or "unknown"
