"""One writer a run folder: the lock that its process holds, and errors of the disk in one line.

The lock is the operating system's (`filelock`: flock, or LockFileEx on Windows), so it goes with
the process that holds it, however that ends.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import lock_descriptor

from moodistill.errors import UserError
from moodistill.storage.folder import LOCK_FILE

# Windows locks the first byte of the file against readers, too: the holder is written behind it.
HOLDER_AT = 1
_held_locks: set[int] = set()


def _drop_locks_after_fork() -> None:
    while _held_locks:
        os.close(_held_locks.pop())


# A forked worker would keep the lock alive after its parent was killed, so it lets go at once.
if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_drop_locks_after_fork)


@contextmanager
def _guard(path: Path, *also: type[Exception]) -> Iterator[None]:
    try:
        yield
    except (sqlite3.DatabaseError, OSError, UnicodeDecodeError) + also as error:
        raise UserError(
            f"{path} cannot be used ({error}); if it is damaged, restore it from a copy or search "
            "again in another folder; if not, check the disk's space and permissions"
        ) from error


def is_written(folder: Path) -> bool:
    """Whether a process writes to a run's folder at this moment."""
    try:
        lock = os.open(folder / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not lock_descriptor(lock, blocking=False)
    except OSError:  # a disk without locks, which no writer can use either
        return False
    finally:
        os.close(lock)


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
        taken = lock_descriptor(lock, blocking=False)
        holder = "" if taken else _read_holder(lock)
    except OSError as error:
        os.close(lock)
        raise UserError(f"{path} cannot be locked ({error}); use a local disk") from error
    if not taken:
        os.close(lock)
        raise UserError(
            f"{folder} is being written by process {holder or '(unknown)'}; "
            "wait until it ends, stop it, or take another folder"
        )
    _held_locks.add(lock)
    _write_holder(lock, f" {os.getpid()}\n")
    return lock


def _release_lock(lock: int | None) -> None:
    if lock in _held_locks:
        _held_locks.remove(lock)
        _write_holder(lock, "")
        os.close(lock)


def _read_holder(lock: int) -> str:
    os.lseek(lock, HOLDER_AT, os.SEEK_SET)
    return os.read(lock, 32).decode(errors="replace").strip()


def _write_holder(lock: int, text: str) -> None:
    os.ftruncate(lock, 0)
    os.lseek(lock, 0, os.SEEK_SET)
    os.write(lock, text.encode())
