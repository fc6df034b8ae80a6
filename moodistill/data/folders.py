"""Folders of images, made into `ImageData`; every file is read, passed over or refused."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from moodistill.data.arrangement import class_of, cut_anew, keep_cut, sorted_out, split_folders
from moodistill.data.cut import Cut
from moodistill.data.datasets import from_splits
from moodistill.data.images import ImageData, Metric, Split, fraction_right
from moodistill.data.kept_index import FolderImages, FolderIndex, quiet_pillow, read_or_reason
from moodistill.data.memory import are_held
from moodistill.data.pixels import MODES
from moodistill.data.preparation import Preparation
from moodistill.data.streamed import Images, StreamedImages
from moodistill.data.table import DataTable
from moodistill.errors import UserError
from moodistill.progress import QuietReporter, Reporter

LATER = "not there when the run began"
NAMED = 200  # damaged files that a message names


def load_image_folder(
    folder: Path | str,
    size: tuple[int, int] = (32, 32),
    channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    metric: Metric = fraction_right,
    *,
    resize: str = "squash",
    interpolation: str = "bilinear",
    channel_order: str = "RGB",
    exif: bool = True,
    shorter_side: int | None = None,
    fill: int = 0,
    heads: Any = None,
    cut: Cut | None = None,
    in_memory: bool | None = None,
    reporter: Reporter | None = None,
) -> ImageData:
    """Images in one folder a class, prepared alike, as uint8.

    They are held in memory, or, where they take more than a quarter of it, read from their files
    whenever they are needed. Then the first start reads all of them once and keeps in the cache
    what it must know of them; later starts read the files that have changed since.

    Either `folder/{train,validation,test}/<class>/...` (also val, valid, dev, training, testing, in
    any case; a split that is not there is cut from `train`), or `folder/<class>/...`. Images may
    lie deeper in the folder of their class. What is cut is cut within each class: a tenth for the
    validation and a tenth for the test, at least one image each (see `cut.cut_class`).

    The data carry a `DataTable` of every file and the `Preparation`.

    Args:
        folder: of the images.
        size: `(height, width)` that they are brought to.
        channels: 3 (RGB or BGR), 1 (grey) or 4 (RGBA).
        mean, std: of each channel of pixels in [0, 1]; None measures them on the training split.
            Give those that the teacher was trained with.
        metric: in place of accuracy.
        resize, interpolation, channel_order, exif, shorter_side, fill: see `Preparation`.
        cut: of a run, which keeps its own; None cuts anew.
        in_memory: whether the images are held; None decides by how much memory they take.
        reporter: is told how far the reading of all images is; None is quiet.

    Raises:
        UserError: if the folder has no such form, a class is not in every split, images are
            damaged (all of them are named), or they are to be held and do not fit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; expected images in {folder}/<class>/")
    if channels not in MODES:
        raise UserError(f"channels is {channels}; expected 1, 3 or 4")
    preparation = Preparation(
        resize, (int(size[0]), int(size[1])), interpolation, channel_order, exif, shorter_side, fill
    )
    preparation.check_channels(channels)
    places = split_folders(folder)
    by_class, passed = sorted_out(folder, places)
    classes, parts = (
        cut_anew(folder, places, by_class) if cut is None else keep_cut(folder, places, cut)
    )
    for name in classes:
        if any(unicodedata.category(one) in ("Cc", "Cs") for one in name):
            raise UserError(
                f"{folder}: the class {name!r} has a line break, a control character or bytes that "
                "are no UTF-8 in its name; rename its folder"
            )
    if cut is not None:
        known = cut.places()
        for files in by_class.values():
            for file in files:
                if file not in known:
                    passed.setdefault(LATER, []).append(file)
    count, (height, width) = sum(map(len, parts.values())), preparation.size
    held = are_held(count, height * width * channels, in_memory)
    reader = _Reader(folder, channels, preparation)
    images, seen = reader.hold(parts) if held else reader.stream(parts, reporter)
    number = {name: place for place, name in enumerate(classes)}
    splits = {
        split: Split(
            images[split],
            np.array([number[class_of(file, places)] for file in files], np.int64),
            tuple(os.path.abspath(folder / file) for file in files),
        )
        for split, files in parts.items()
    }
    table = _table(folder, classes, passed, seen, preparation)
    return from_splits(
        folder.resolve().name, splits, classes, mean, std, metric, preparation, table,
        Path(os.path.abspath(folder)), heads,
    )  # fmt: skip


class _Reader:
    """Reads the images of a folder; damaged ones are named all at once."""

    def __init__(self, folder: Path, channels: int, preparation: Preparation) -> None:
        self.folder, self.channels, self.settings = folder, channels, preparation.settings()
        self.shape = (*preparation.size, channels)

    def hold(
        self, parts: Mapping[str, Sequence[str]]
    ) -> tuple[dict[str, Images], list[dict[str, Any]]]:
        """The images `(N, H, W, C)` of each split, and what was seen of each file."""
        images: dict[str, np.ndarray] = {}
        seen, damaged = [], []

        def read(file: str) -> tuple[np.ndarray, dict[str, Any]] | str:
            return read_or_reason(self.folder, file, self.channels, self.settings)

        with quiet_pillow(), ThreadPoolExecutor(os.cpu_count()) as pool:
            for split, files in parts.items():
                images[split] = np.empty((len(files), *self.shape), np.uint8)
                for place, found in enumerate(pool.map(read, files)):
                    if isinstance(found, str):
                        damaged.append(found)
                        continue
                    images[split][place] = found[0]
                    seen.append(found[1])
        self._refuse(damaged)
        return dict(images), seen

    def stream(
        self, parts: Mapping[str, Sequence[str]], reporter: Reporter | None
    ) -> tuple[dict[str, Images], list[dict[str, Any]]]:
        """As `hold`, with images that are read when they are needed."""
        index = FolderIndex(self.folder, self.channels, self.settings)
        files = [file for part in parts.values() for file in part]
        known, stamp = index.update(files, reporter or QuietReporter())
        self._refuse(index.damaged)
        source = FolderImages(self.folder, files, stamp, self.shape, self.settings)
        images: dict[str, Images] = {}
        start = 0
        for split, part in parts.items():
            numbers = np.arange(start, start + len(part))
            images[split] = StreamedImages(source, known.part(numbers), numbers)
            start += len(part)
        return images, known.facts()

    def _refuse(self, damaged: Sequence[str]) -> None:
        if damaged:
            more = f", and {len(damaged) - NAMED} more" if len(damaged) > NAMED else ""
            raise UserError(
                f"{self.folder} holds {len(damaged)} file(s) that are no readable image: "
                f"{', '.join(damaged[:NAMED])}{more}; mend or delete them"
            )


def _table(
    folder: Path,
    classes: Sequence[str],
    passed: Mapping[str, Sequence[str]],
    seen: Sequence[Mapping[str, Any]],
    preparation: Preparation,
) -> DataTable:
    height, width = preparation.size
    ratios = [one["size"][1] / one["size"][0] * height / width for one in seen]
    return DataTable(
        source=str(folder),
        classes=tuple(classes),
        pictures={},
        passed_over={reason: tuple(files) for reason, files in sorted(passed.items())},
        turned=sum(one["tagged"] for one in seen),
        exif=preparation.exif,
        reshaped=sum(not 0.98 < ratio < 1.02 for ratio in ratios),
        resize=preparation.resize,
        more_frames=sum(one["frames"] > 1 for one in seen),
        transparent=sum(one["transparent"] for one in seen),
    )
