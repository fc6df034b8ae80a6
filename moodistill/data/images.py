"""Images in three splits, in memory or streamed, and the metric that scores answers to them.

Splits (documented in docs/method.md): the teacher trains on `train`, the search scores students on
`validation`, and `test` chooses nothing: finalists are tested when they are done.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moodistill.data.cut import Cut
from moodistill.data.preparation import Preparation
from moodistill.data.streamed import Images, StreamedImages, chosen
from moodistill.data.table import DataTable
from moodistill.errors import UserError

# Logits `(n, classes)` and labels `(n,)` to a figure in [0, 1], the larger the better.
Metric = Callable[[np.ndarray, np.ndarray], float]


def fraction_right(logits: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy, the metric that is used unless another is given."""
    return float((logits.argmax(1) == labels).mean())


@dataclass(frozen=True)
class Split:
    """Images `(N, H, W, C)` uint8 and labels `(N,)` int64, and the files that they are of.

    `images[...]` gives pixels in any case; parts of streamed images are picked without reading.

    Attributes:
        images: an array, or streamed.
        files: paths, one an image; empty if there are none or they are not known.
    """

    images: Images
    labels: np.ndarray
    files: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def head(self, count: int) -> Split:
        """The first `count` images (all of them if there are fewer)."""
        return self.part(slice(None, count))

    def behind(self, count: int) -> Split:
        """All images but the first `count`."""
        return self.part(slice(count, None))

    def part(self, which: slice) -> Split:
        """Some of the images."""
        return Split(chosen(self.images, which), self.labels[which], self.files[which])

    def ordered(self, order: np.ndarray) -> Split:
        """The images with these indices `(n,)`."""
        files = tuple(self.files[index] for index in order) if self.files else ()
        return Split(chosen(self.images, order), self.labels[order], files)

    def held(self) -> Split:
        """The same with its images in memory, for a split that is gone through often."""
        if not isinstance(self.images, StreamedImages):
            return self
        return Split(self.images[:], self.labels, self.files)


AT_ONCE = 2**19  # pixels; the maps of more may not fit into a small machine's memory


@dataclass(frozen=True)
class ImageData:
    """A data set with fixed splits, its normalisation and its digest.

    Attributes:
        mean, std: of each channel of pixels scaled to [0, 1].
        labels: names of the classes, in the order of the logits.
        metric: what stands wherever this project says accuracy.
        preparation: how files became these images; None if that is not known.
        table: classes, splits and files; None for the data sets that the project knows.
        folder: that the files lie in; None if they do not come from one folder.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    labels: tuple[str, ...]
    digest: str
    metric: Metric = fraction_right
    preparation: Preparation | None = None
    table: DataTable | None = None
    folder: Path | None = None

    @property
    def cut(self) -> Cut | None:
        """Which file of the folder is in which split; None if the data come from none."""
        if self.folder is None:
            return None
        root = self.folder
        parts = [
            tuple(sorted(Path(file).relative_to(root).as_posix() for file in split.files))
            for split in (self.train, self.validation, self.test)
        ]
        return Cut(*parts)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """`(C, H, W)` of one image."""
        height, width, channels = self.train.images.shape[1:]
        return channels, height, width

    def normalise(self, images: np.ndarray) -> torch.Tensor:
        """uint8 `(N, H, W, C)` to normalised float32 `(N, C, H, W)`."""
        mean = torch.tensor(self.mean).view(1, -1, 1, 1)
        std = torch.tensor(self.std).view(1, -1, 1, 1)
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
        return ((pixels.float() / 255.0 - mean) / std).contiguous()

    def at_once(self, most: int) -> int:
        """How many images, at most `most`, go through a network together in little memory."""
        _, height, width = self.input_shape
        return max(1, min(most, AT_ONCE // (height * width)))

    def score(self, logits: np.ndarray, labels: np.ndarray) -> float:
        """The metric of logits `(n, classes)` and labels `(n,)`.

        Raises:
            UserError: if it is not a number from 0 to 1.
        """
        found = float(self.metric(logits, labels))
        if not -1e-6 <= found <= 1 + 1e-6:  # nor NaN
            raise UserError(
                f"the metric {metric_name(self)} gives {found:g}; expected a number from 0 to 1"
            )
        return min(1.0, max(0.0, found))

    def calibration(self, count: int) -> torch.Tensor:
        """`(count, C, H, W)` normalised training images, spread evenly over the split."""
        count = min(count, len(self.train))
        index = np.linspace(0, len(self.train) - 1, count).astype(int)
        return self.normalise(self.train.images[index])


def metric_name(data: ImageData) -> str:
    """Where the data's metric is defined, for a run's record: the same in every process."""
    return _name_of(data.metric)


def _name_of(value: Any) -> str:
    """What a metric, or something that it is made with, is called; without addresses in memory."""
    if isinstance(value, partial):
        return f"{_name_of(value.func)}({_named(value.args, value.keywords)})"
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    if callable(value):
        return f"{_name_of(type(value))}({_named((), getattr(value, '__dict__', {}))})"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _named(values: Sequence[Any], keywords: Mapping[str, Any]) -> str:
    named = [f"{name}={_name_of(value)}" for name, value in sorted(keywords.items())]
    return ", ".join([*map(_name_of, values), *named])


def sha256_array(array: np.ndarray) -> str:
    """Hex SHA-256 of an array's bytes in C order."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
