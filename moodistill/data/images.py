"""Images in three splits, in memory or streamed, and the metric that scores answers to them.

Splits (documented in docs/method.md): the teacher trains on `train`, the search scores students on
`validation`, and `test` chooses nothing: finalists are tested when they are done.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from moodistill.data.cut import Cut
from moodistill.data.preparation import Preparation
from moodistill.data.streamed import Images, StreamedImages, chosen
from moodistill.data.table import DataTable
from moodistill.heads.head import Head
from moodistill.heads.heads import Arrays, Heads
from moodistill.heads.metrics import Metric
from moodistill.heads.outputs import OUTPUT

__all__ = ["ImageData", "Metric", "Split", "fraction_right", "metric_name", "sha256_array"]

Targets = np.ndarray | dict[str, np.ndarray]  # of one output, or by the names of several


def fraction_right(logits: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy, the metric that is used unless another is given."""
    return float((logits.argmax(1) == labels).mean())


@dataclass(frozen=True)
class Split:
    """Images `(N, H, W, C)` uint8 and labels `(N,)` int64, and the files that they are of.

    `images[...]` gives pixels in any case; parts of streamed images are picked without reading.

    Attributes:
        images: an array, or streamed.
        labels: or other targets `(N, ...)`, by name where a network has several outputs; an empty
            dict where there are none.
        files: paths, one an image; empty if there are none or they are not known.
    """

    images: Images
    labels: Targets
    files: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def targets(self) -> dict[str, np.ndarray]:
        """The targets by the name of the output."""
        return self.labels if isinstance(self.labels, dict) else {OUTPUT: self.labels}

    def head(self, count: int) -> Split:
        """The first `count` images (all of them if there are fewer)."""
        return self.part(slice(None, count))

    def behind(self, count: int) -> Split:
        """All images but the first `count`."""
        return self.part(slice(count, None))

    def part(self, which: slice) -> Split:
        """Some of the images."""
        return Split(chosen(self.images, which), targets_at(self.labels, which), self.files[which])

    def ordered(self, order: np.ndarray) -> Split:
        """The images with these indices `(n,)`."""
        files = tuple(self.files[index] for index in order) if self.files else ()
        return Split(chosen(self.images, order), targets_at(self.labels, order), files)

    def held(self) -> Split:
        """The same with its images in memory, for a split that is gone through often."""
        if not isinstance(self.images, StreamedImages):
            return self
        return Split(self.images[:], self.labels, self.files)


def targets_at(targets: Targets, which: Any) -> Targets:
    """Some of the targets, by a slice or indices."""
    if isinstance(targets, dict):
        return {name: array[which] for name, array in targets.items()}
    return targets[which]


AT_ONCE = 2**19  # pixels; the maps of more may not fit into a small machine's memory


@dataclass(frozen=True)
class ImageData:
    """A data set with fixed splits, its normalisation and its digest.

    Attributes:
        mean, std: of each channel of pixels scaled to [0, 1].
        labels: names of the classes, in the order of the logits; empty where there are none.
        metric: of a classifier's logits `(n, classes)` and labels `(n,)`, where no `heads` say it.
        preparation: how files became these images; None if that is not known.
        table: classes, splits and files; None for the data sets that the project knows.
        folder: that the files lie in; None if they do not come from one folder.
        heads: what the network's outputs mean; None is a classifier with one output.
    """

    pictures: ClassVar[bool] = True  # pixels, which may be mirrored, shifted and compressed
    scale: ClassVar[float] = 255.0  # that inputs are divided by before `mean` and `std`

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
    heads: Heads | None = None

    @property
    def meaning(self) -> Heads:
        """What the network's outputs mean."""
        own = None if self.metric is fraction_right else self.metric
        return self.heads or Heads({OUTPUT: Head(metric=own, labels=self.labels)})

    @property
    def metric_label(self) -> str:
        """What people call the metric."""
        return self.meaning.metric_name

    @property
    def by_accuracy(self) -> bool:
        """Whether the metric is the fraction of inputs whose one class is answered rightly."""
        return self.meaning.plain_classes

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
    def input_shape(self) -> tuple[int, ...]:
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
        return max(1, min(most, AT_ONCE // math.prod(self.input_shape[1:])))

    def score(self, answers: Iterable[Arrays], split: Split) -> float:
        """The metric of a network's answers to a split, batch by batch and in order.

        Raises:
            UserError: if it is not a number from 0 to 1.
        """
        return self.meaning.score(answers, split.targets)

    def calibration(self, count: int) -> torch.Tensor:
        """`(count, C, H, W)` normalised training images, spread evenly over the split."""
        count = min(count, len(self.train))
        index = np.linspace(0, len(self.train) - 1, count).astype(int)
        return self.normalise(self.train.images[index])


def metric_name(data: ImageData) -> str:
    """Where the data's metric is defined, for a run's record: the same in every process."""
    if data.heads is None:
        return _name_of(data.metric)
    return "; ".join(
        f"{name}: {head.kind} {_name_of(head.metric) if head.own_metric else head.metric_key}"
        + (f" x{head.weight:g}" if head.weight != 1 else "")
        + (f" loss {_name_of(head.loss)}" if head.loss is not None else "")
        for name, head in data.heads.by_output.items()
    )


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
