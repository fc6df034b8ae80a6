"""Reading ahead: a function of many things, computed by worker processes while others wait."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from moodistill.errors import UserError

MOST_WORKERS = 8


def read_ahead(read: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """`read(item)` of each item, in order, computed by worker processes.

    Raises:
        UserError: if one cannot be read; whatever else a user's code raises is named in one.
    """
    count = _workers()
    loader: DataLoader[Any] = DataLoader(
        _Reads(read),  # type: ignore[arg-type]
        batch_size=None,
        sampler=items,
        num_workers=count,
        collate_fn=_as_it_is,  # arrays go through a pipe: a container's shared memory may be small
        multiprocessing_context="fork" if count else None,
        generator=torch.Generator(),  # the caller's draws are not touched
    )
    for found in loader:
        if isinstance(found, _Failure):
            raise UserError(found.message)
        yield found


def _workers() -> int:
    """Processes that read ahead; 0 where a process cannot simply have others beside it."""
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        return 0
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)))


class _Failure:
    """What went wrong in a worker, in one line: an exception itself comes with its traceback."""

    def __init__(self, error: Exception) -> None:
        reason = " ".join(str(error).split())
        self.message = (
            reason
            if isinstance(error, UserError)
            else f"an image cannot be read ({type(error).__name__}: {reason}); mend the dataset"
        )


class _Reads:
    """A function with the face of a map-style dataset, whose keys are its arguments."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        self.read = read

    def __getitem__(self, item: Any) -> Any:
        try:
            return self.read(item)
        except Exception as error:
            return _Failure(error)


def _as_it_is(found: Any) -> Any:
    return found
