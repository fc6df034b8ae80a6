"""Pareto fronts of physically smaller CNNs: accuracy, parameters, measured latency.

The names in `__all__` are the public interface (docs/api.md). Everything else lies in packages, one
job each: docs/architecture.md says which one does what, and their docstrings what they may know.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moodistill.version import __version__

if TYPE_CHECKING:
    from moodistill.api import (
        Int8Config,
        LatencyConfig,
        LayerRules,
        Limits,
        Run,
        RunStudent,
        UserError,
        open_run,
        search,
    )  # fmt: skip
    from moodistill.data import (
        ArrayData,
        DataTable,
        ImageData,
        Preparation,
        Split,
        from_arrays,
        from_datasets,
        load_arrays,
        load_cifar10,
        load_digits,
        load_image_folder,
    )  # fmt: skip
    from moodistill.heads import Head
    from moodistill.teacher.task import Task, TrainConfig
    from moodistill.teacher.weights import load_weights

# Loaded when asked for: torch and pymoo take seconds, and `moodistill choose` needs neither.
_HOMES = {
    **dict.fromkeys(
        ("Int8Config", "LatencyConfig", "LayerRules", "Limits", "Run", "RunStudent", "UserError",
         "open_run", "search"),
        "moodistill.api",
    ),
    **dict.fromkeys(
        ("ArrayData", "DataTable", "ImageData", "Preparation", "Split", "from_arrays",
         "from_datasets", "load_arrays", "load_cifar10", "load_digits", "load_image_folder"),
        "moodistill.data",
    ),
    "Head": "moodistill.heads",
    "Task": "moodistill.teacher.task",
    "TrainConfig": "moodistill.teacher.task",
    "load_weights": "moodistill.teacher.weights",
}  # fmt: skip
__all__ = [
    "ArrayData", "DataTable", "Head", "ImageData", "Int8Config", "LatencyConfig", "LayerRules",
    "Limits", "Preparation", "Run", "RunStudent", "Split", "Task", "TrainConfig", "UserError",
    "__version__", "from_arrays", "from_datasets", "load_arrays", "load_cifar10", "load_digits",
    "load_image_folder", "load_weights", "open_run", "search",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name == "int8":  # version 0.1.0 had it without an import of its own
        return import_module("moodistill.int8")
    raise AttributeError(f"module 'moodistill' has no attribute {name!r}")
