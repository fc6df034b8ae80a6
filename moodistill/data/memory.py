"""Whether images are held in memory, or read from where they lie whenever they are needed."""

from __future__ import annotations

import os
from pathlib import Path

from moodistill.errors import UserError

HELD_SHARE = 0.25  # of memory; images that take more are streamed
UNKNOWN = 8 * 2**30  # bytes that a machine is taken to have if it does not say
# What a container may use, in both versions of Linux's control groups.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_bytes() -> int:
    """Memory of this machine, or of the container that the process runs in."""
    try:
        found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        found = UNKNOWN
    for path in _LIMITS:
        try:
            found = min(found, int(Path(path).read_text("utf-8")))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return found


def are_held(count: int, bytes_each: int, in_memory: bool | None) -> bool:
    """Whether so many images are held in memory.

    Args:
        count: images of all splits.
        bytes_each: of one image as the network sees it.
        in_memory: what the user wants; None holds them where they take at most `HELD_SHARE`.

    Raises:
        UserError: if they are to be held and do not fit.
    """
    needed, there = count * bytes_each, memory_bytes()
    if in_memory is None:
        return needed <= HELD_SHARE * there
    if in_memory and needed > there:
        raise UserError(
            f"`images_in_memory` is True, but {count:,} images take {needed / 2**30:.1f} GiB of "
            f"{there / 2**30:.1f}; expected less than there is: leave it out, and they are read "
            "when they are needed"
        )
    return in_memory
