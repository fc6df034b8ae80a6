"""Files that a kill leaves whole: the old content or the new one."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp"


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a kill leaves the old content or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say which file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_orphans(folder: Path, older_s: float = 0.0) -> int:
    """Delete what killed writers left in `folder` and below; returns how many files.

    A folder that other processes write to needs `older_s`: the age at which a file is left over.
    """
    removed = 0
    for path in folder.rglob(f".*{TEMPORARY}"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime >= older_s:
                path.unlink()
                removed += 1
    return removed


def write_json_atomic(path: Path, obj: Any) -> None:
    """Write strict JSON (a NaN is a ValueError) so that a kill leaves the old file or the new."""
    text = json.dumps(obj, indent=2, allow_nan=False, default=_plain)
    write_atomic(path, f"{text}\n".encode())


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
