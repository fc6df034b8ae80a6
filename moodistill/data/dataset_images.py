"""Map-style datasets whose images are read when they are needed, by the dataset itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from moodistill.data.ahead import read_ahead
from moodistill.data.index import CHUNK, ImageIndex, image_row, joined, stacked
from moodistill.data.streamed import StreamedImages
from moodistill.errors import UserError
from moodistill.progress import Percents, QuietReporter, Reporter

READ_TWICE = 3  # images of which it is seen whether they are always the same


class DatasetImages:
    """The source of a dataset's images; see `streamed.Source`.

    Attributes:
        convert: an item and its name in messages, to uint8 pixels and a label.
    """

    def __init__(
        self, dataset: Any, part: str, convert: Callable[[Any, str], tuple[np.ndarray, Any]]
    ) -> None:
        self.dataset, self.part, self.convert = dataset, part, convert
        self.shape = convert(dataset[0], f"{part} image 0")[0].shape

    def __len__(self) -> int:
        return len(self.dataset)

    def item(self, index: int) -> tuple[np.ndarray, Any]:
        """Pixels and label of one image."""
        pixels, label = self.convert(self.dataset[index], f"{self.part} image {index}")
        if pixels.shape != self.shape:
            raise UserError(
                f"{self.part} image {index} is {pixels.shape}, the first {self.shape}; resize them "
                "in the dataset"
            )
        return pixels, label

    def read(self, index: int) -> np.ndarray:
        """See `Source`."""
        return self.item(index)[0]


def stream_dataset(source: DatasetImages, reporter: Reporter | None) -> tuple[StreamedImages, list]:
    """The images of a dataset, and all labels: it is gone through once.

    Raises:
        UserError: if an image has another size or form, or is not the same when it is read again.
    """
    count = len(source)
    for index in np.linspace(0, count - 1, min(READ_TWICE, count)).astype(int):
        if not np.array_equal(source.read(int(index)), source.read(int(index))):
            raise UserError(
                f"{source.part} image {index} is another each time it is read; leave random "
                "transforms out of the dataset (training views are made here), or set "
                "`images_in_memory`"
            )

    def rows(numbers: np.ndarray) -> tuple[ImageIndex, list]:
        made, labels = [], []
        for number in numbers:
            pixels, label = source.item(int(number))
            made.append(image_row(pixels))
            labels.append(label)
        return stacked(made), labels

    parts = np.array_split(np.arange(count), -(-count // CHUNK))
    found: list[ImageIndex] = []
    labels: list = []
    with (reporter or QuietReporter()).stage(f"indexing {source.part}", count, "images") as stage:
        bar = Percents(stage, count)
        for index, some in read_ahead(rows, parts):
            found.append(index)
            labels += some
            bar.update(len(labels))
    return StreamedImages(source, joined(found)), labels
