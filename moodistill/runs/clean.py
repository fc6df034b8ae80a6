"""Freeing what a run, or the cache, can make again."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from moodistill.bundle.int8 import read_int8
from moodistill.errors import UserError
from moodistill.finalists.distil import CHECKPOINT_FILES, read_finalist
from moodistill.io.atomic import TEMPORARY
from moodistill.storage.folder import STUDENTS
from moodistill.storage.store import Store


@dataclass(frozen=True)
class Freed:
    """What was deleted."""

    files: int
    size_bytes: int


def clean_run(folder: Path) -> Freed:
    """Delete a run's unfinished students, checkpoints, and the leftovers of killed writers.

    Evaluations, finished finalists and tables stay. The run must not be going on.

    Raises:
        UserError: if the folder is no run, or another process writes to it.
    """
    with Store.open(folder):
        unfinished = [
            path
            for path in (folder / STUDENTS).glob("*")
            if path.is_dir() and read_finalist(path) is None and read_int8(path) is None
        ]
        checkpoints = [path for path in folder.glob(f"{STUDENTS}/*/{CHECKPOINT_FILES}")
                       if path.parent not in unfinished]  # fmt: skip
        return _delete([*unfinished, *checkpoints, *folder.rglob(f".*{TEMPORARY}")])


def clean_cache(cache: Path) -> Freed:
    """Delete statistics, logits and probes; the next run makes what it needs again.

    Whatever else is in the folder stays.

    Raises:
        UserError: if a file cannot be deleted.
    """
    if not cache.is_dir():
        return Freed(0, 0)
    kinds = ("samples-*", "logits-*", "accuracy-*", "simd-*", f".*{TEMPORARY}")
    return _delete([path for kind in kinds for path in cache.glob(kind)])


def _delete(paths: list[Path]) -> Freed:
    files = [
        file
        for path in paths
        for file in (path.rglob("*") if path.is_dir() else [path])
        if file.is_file()
    ]
    size = sum(file.stat().st_size for file in files)
    try:
        for path in paths:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be deleted ({error.strerror}); check its rights") from error
    return Freed(len(files), size)
