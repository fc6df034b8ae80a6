"""Old import path, kept for problem files written before: import these from `moodistill`."""

from moodistill.teacher.task import OwnTask, Task, TrainConfig, load_task

__all__ = ["OwnTask", "Task", "TrainConfig", "load_task"]
