"""One writer a run folder: the lock that its process holds, and errors of the disk in one line."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moodistill.errors import UserError
from moodistill.storage.folder import LOCK_FILE

# A forked worker would keep the lock alive after its parent was killed, so it lets go at once.
_held_locks: set[int] = set()


def _drop_locks_after_fork() -> None:
    while _held_locks:
        os.close(_held_locks.pop())


@contextmanager
def _guard(path: Path, *also: type[Exception]) -> Iterator[None]:
    try:
        yield
    except (sqlite3.DatabaseError, OSError, UnicodeDecodeError) + also as error:
        raise UserError(
            f"{path} cannot be used ({error}); if it is damaged, restore it from a copy or search "
            "again with another --out; if not, check the disk's space and permissions"
        ) from error


def is_written(folder: Path) -> bool:
    """Whether a process writes to a run's folder at this moment."""
    try:
        lock = os.open(folder / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


@contextmanager
def writer_lock(folder: Path) -> Iterator[int]:
    """Holds the lock of a folder's writer, for who writes to it before there is a store.

    Raises:
        UserError: if another process holds it.
    """
    lock = _take_lock(folder)
    try:
        yield lock
    finally:
        _release_lock(lock)  # unless the store that took it over has


def _take_lock(folder: Path) -> int:
    path = folder / LOCK_FILE
    with _guard(path):
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(lock, 32, 0).decode(errors="replace").strip()
        os.close(lock)
        if isinstance(error, BlockingIOError):
            raise UserError(
                f"{folder} is being written by process {holder or '(unknown)'}; "
                "wait until it ends, stop it, or give another --out"
            ) from error
        raise UserError(f"{path} cannot be locked ({error}); use a local disk") from error
    _held_locks.add(lock)
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def _release_lock(lock: int | None) -> None:
    if lock in _held_locks:
        _held_locks.remove(lock)
        os.ftruncate(lock, 0)
        os.close(lock)
