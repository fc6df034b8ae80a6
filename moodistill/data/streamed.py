"""Images that are read when they are asked for: the indexing of an array, without holding it.

`images[...]` gives pixels, of an array and of streamed images alike; `chosen` picks some of either
without reading any. Whoever goes through many reads them by `batches` or `read_batches`: worker
processes of torch's `DataLoader` then read ahead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np

from moodistill.data.ahead import read_ahead
from moodistill.data.index import CHUNK, ImageIndex

FEW = 48  # images that are read at once by this process alone


class Source(Protocol):
    """What images are read from."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> np.ndarray:
        """One image, uint8 of that shape; raises a UserError if it cannot be had."""
        ...


class StreamedImages:
    """uint8 images `(N, H, W, C)` of a source, some of them or all, in any order.

    Attributes:
        index: `(N,)` numbers of the images in the source.
        known: what is known of them without reading them.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, source: Source, known: ImageIndex, index: np.ndarray | None = None) -> None:
        self.source, self.known = source, known
        self.index = np.arange(len(source)) if index is None else index

    def __len__(self) -> int:
        return len(self.index)

    @property
    def shape(self) -> tuple[int, ...]:
        """As an array of all would have."""
        return (len(self.index), *self.source.shape)

    @property
    def ndim(self) -> int:
        """Axes of that array."""
        return len(self.shape)

    def chosen(self, which: slice | np.ndarray) -> StreamedImages:
        """Some of them; none is read."""
        return StreamedImages(self.source, self.known.part(which), self.index[which])

    def __getitem__(self, which: Any) -> np.ndarray:
        """One image `(H, W, C)` of a number, several `(n, H, W, C)` of a slice or an array."""
        index = self.index[which]
        if np.ndim(index) == 0:
            return self.source.read(int(index))
        if len(index) <= FEW:
            return self._stacked(index)
        parts = [index[start : start + CHUNK] for start in range(0, len(index), CHUNK)]
        images = np.empty((len(index), *self.source.shape), np.uint8)
        for start, part in zip(range(0, len(index), CHUNK), self._ahead(parts), strict=True):
            images[start : start + CHUNK] = part
        return images

    def batches(self, chosen: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The images of each of some arrays of numbers, in order, read ahead."""
        return self._ahead(self.index[numbers] for numbers in chosen)

    def _ahead(self, parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        return read_ahead(self._stacked, parts)

    def _stacked(self, index: np.ndarray) -> np.ndarray:
        images = np.empty((len(index), *self.source.shape), np.uint8)
        for place, number in enumerate(index):
            images[place] = self.source.read(int(number))
        return images


Images = np.ndarray | StreamedImages


def chosen(images: Images, which: slice | np.ndarray) -> Images:
    """Some of the images, without reading any that are streamed."""
    return images.chosen(which) if isinstance(images, StreamedImages) else images[which]


def read_batches(images: Images, numbers: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The images of each of some arrays of numbers `(n,)`, in order."""
    if isinstance(images, StreamedImages):
        return images.batches(numbers)
    return (images[one] for one in numbers)


def batches(images: Images, size: int) -> Iterator[np.ndarray]:
    """All images in order, at most `size` at a time."""
    if not isinstance(images, StreamedImages):
        return (images[start : start + size] for start in range(0, len(images), size))
    starts = range(0, len(images), size)
    return images.batches(np.arange(s, min(s + size, len(images))) for s in starts)


def digest_each(images: Images) -> list[bytes]:
    """SHA-256 of each image's pixels."""
    if isinstance(images, StreamedImages):
        return [row.tobytes() for row in images.known.digests]
    return [hashlib.sha256(image.tobytes()).digest() for image in images]
