"""The cache: where it lies, and the one way to read or make a file in it.

A file of the cache is named by a digest of all that it was made from. A damaged one is deleted and
made again; a cache that cannot be written is refused in one line, before any work.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from moodistill.errors import UserError

T = TypeVar("T")
VARIABLE = "MOODISTILL_CACHE"


def default_cache_dir() -> Path:
    """`$MOODISTILL_CACHE`, or `~/.cache/moodistill`; everything in it can be made again.

    Raises:
        UserError: if the variable is not set and this user has no home.
    """
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given)
    try:
        return Path.home() / ".cache" / "moodistill"
    except RuntimeError as error:
        raise UserError(
            f"there is no home folder for the cache ({error}); set {VARIABLE} to a folder that can "
            "be written"
        ) from error


def cache_key(*made_of: object) -> str:
    """16 hex digits over all that a file of the cache is made from."""
    return hashlib.sha256(" ".join(map(str, made_of)).encode()).hexdigest()[:16]


def cached(
    path: Path | None,
    read: Callable[[Path], T],
    make: Callable[[], T],
    write: Callable[[T, Path], None],
) -> T:
    """What a file of the cache holds; made, and written, if there is none or it is damaged.

    Args:
        path: of the file; None keeps nothing.
        read: the content of the file; a UserError, ValueError or KeyError says that it is damaged.
        make: the content anew.
        write: the content into the file, atomically.

    Raises:
        UserError: if the cache cannot be written; before `make` if it shows by then.
    """
    found = read_or_none(path, read)
    if found is not None:
        return found
    if path is None:
        return make()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError("the folder is read-only")
    made = make()
    with writing(path):
        write(made, path)
    return made


def read_or_none(path: Path | None, read: Callable[[Path], T]) -> T | None:
    """What a file of the cache holds; None, and the file is gone, if it is damaged."""
    if path is None:
        return None
    try:
        return read(path) if path.is_file() else None
    except (UserError, ValueError, KeyError):
        with contextlib.suppress(OSError):  # of a cache that is read-only
            path.unlink()
    except OSError as error:
        raise _refusal(path, "read", error) from error
    return None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """A block that writes `path`, a file of the cache.

    Raises:
        UserError: if it cannot be written; says how to give another cache.
    """
    try:
        yield
    except OSError as error:
        raise _refusal(path, "written", error) from error


def _refusal(path: Path, verb: str, error: OSError) -> UserError:
    return UserError(
        f"the cache {path.parent} cannot be {verb} ({error}); set {VARIABLE} to a folder that can "
        "be written and has space"
    )
