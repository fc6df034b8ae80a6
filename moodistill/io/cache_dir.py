"""Where the cache lies."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """`$MOODISTILL_CACHE`, or `~/.cache/moodistill`; everything in it can be made again."""
    return Path(os.environ.get("MOODISTILL_CACHE", Path.home() / ".cache" / "moodistill"))
