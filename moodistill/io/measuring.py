"""One lock for whoever times something and for trainings: a training waits while it is held.

The lock files lie in the cache folder, so processes that share it take turns. Where they cannot be
written, nobody waits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from moodistill.io.cache_dir import default_cache_dir

MEASURING, STEP = "measuring.lock", "step.lock"
STEP_SECONDS = 60.0  # the longest time that a step of a training is waited for


@contextmanager
def measuring(folder: Path | None = None) -> Iterator[None]:
    """Held while something is timed: one at a time, and not beside a step of a training."""
    folder = folder or default_cache_dir()
    with ExitStack() as held:
        with suppress(OSError, NotImplementedError):
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(folder / MEASURING))
            # The step that goes on is waited for; the next one waits for `MEASURING`.
            with suppress(Timeout), FileLock(folder / STEP, timeout=STEP_SECONDS):
                pass
        yield


@contextmanager
def training_step(folder: Path | None = None) -> Iterator[float]:
    """One step of a training, not begun while something is timed; gives the seconds waited.

    Of several trainings in one cache folder, those that are timed wait for the step of one.
    """
    folder = folder or default_cache_dir()
    began = time.monotonic()
    with ExitStack() as held:
        with suppress(OSError, NotImplementedError):
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / MEASURING), suppress(Timeout):
                held.enter_context(FileLock(folder / STEP, blocking=False))
        yield time.monotonic() - began
