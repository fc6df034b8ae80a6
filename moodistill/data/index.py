"""What is known of each image without holding it: its digest, the sums of its bytes, its file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CHUNK = 16  # images that a worker is given at a time
# What `read_picture` has seen of a file, as whole numbers.
SEEN = ("height", "width", "tagged", "frames", "transparent")


@dataclass(frozen=True)
class ImageIndex:
    """Of `N` images of `C` channels.

    Attributes:
        digests: `(N, 32)` uint8, SHA-256 of each image's pixels.
        sums: `(N, 2, C)` int64, of the bytes of each channel and of their squares.
        seen: `(N, 5)` int64, see `SEEN`; zeros where there are no files.
    """

    digests: np.ndarray
    sums: np.ndarray
    seen: np.ndarray

    def part(self, which: slice | np.ndarray) -> ImageIndex:
        """Of some of the images."""
        return ImageIndex(self.digests[which], self.sums[which], self.seen[which])

    def facts(self) -> list[dict[str, Any]]:
        """What was seen of each file, as `read_picture` says it."""
        return [
            {"size": (height, width), "tagged": bool(tagged), "frames": frames,
             "transparent": bool(transparent)}
            for height, width, tagged, frames, transparent in self.seen.tolist()
        ]  # fmt: skip


def image_row(pixels: np.ndarray, seen: Sequence[int] = (0,) * len(SEEN)) -> ImageIndex:
    """The index of one image `(H, W, C)`."""
    digest = np.frombuffer(hashlib.sha256(pixels.tobytes()).digest(), np.uint8)
    flat = pixels.reshape(-1, pixels.shape[-1])
    wide = flat.astype(np.float64)  # sums of squares below 2^53 are exact
    sums = np.stack([flat.sum(0, dtype=np.int64), (wide * wide).sum(0).astype(np.int64)])
    return ImageIndex(digest, sums, np.array(seen, np.int64))


def stacked(rows: Sequence[ImageIndex]) -> ImageIndex:
    """One index of the rows of several images."""
    return ImageIndex(
        np.stack([row.digests for row in rows]),
        np.stack([row.sums for row in rows]),
        np.stack([row.seen for row in rows]),
    )


def joined(parts: Sequence[ImageIndex]) -> ImageIndex:
    """One index of several."""
    return ImageIndex(
        np.concatenate([part.digests for part in parts]),
        np.concatenate([part.sums for part in parts]),
        np.concatenate([part.seen for part in parts]),
    )
