"""What a file in `problems/` describes: a teacher, its data, how it is trained."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from moodistill.data import ImageData
from moodistill.errors import UserError


@dataclass(frozen=True)
class TrainConfig:
    """How a teacher is trained; `phases` are `(epochs, picture size)` in order."""

    phases: tuple[tuple[int, int], ...] = ((3, 16), (3, 24), (2, 32))
    batch_size: int = 512
    lr: float = 0.15
    momentum: float = 0.85
    weight_decay: float = 5e-4
    warmup: float = 0.1
    pad: int = 3
    flip: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Task:
    """One search task.

    Attributes:
        name: also the name of the file in `problems/`.
        build: the untrained teacher, traceable by `torch.fx`.
        load_data: from a data folder (or None for the default one) to the data in memory.
        weights: the trained teacher's safetensors file.
        train: how `scripts/train_teacher.py` trains it.
    """

    name: str
    build: Callable[[], nn.Module]
    load_data: Callable[[Path | None], ImageData]
    weights: Path
    train: TrainConfig = TrainConfig()


def available_tasks() -> list[str]:
    """Names of the modules in `problems/`."""
    spec = importlib.util.find_spec("problems")
    if spec is None or not spec.submodule_search_locations:
        return []
    folder = Path(next(iter(spec.submodule_search_locations)))
    return sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))


def load_task(name: str) -> Task:
    """The `TASK` of `problems/<name>.py`, or of a Python file given by its path.

    A problem file is code and is executed: load only files that you trust.

    Raises:
        UserError: if there is no such problem, or it defines no `TASK`.
    """
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"problem file {name} does not exist; expected a Python file")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        names = available_tasks()
        if name not in names:
            raise UserError(
                f"unknown model {name!r}; expected one of {', '.join(names)}, "
                "or the path of a problem file ending in .py"
            )
        module = importlib.import_module(f"problems.{name}")
    task = getattr(module, "TASK", None)
    if not isinstance(task, Task):
        raise UserError(f"problem {name!r} defines no TASK; expected TASK = Task(...)")
    return task
