"""Folders of images, made into `ImageData`; every file is read, passed over or refused."""

from __future__ import annotations

import os
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from moodistill.data.arrangement import class_of, cut_anew, keep_cut, sorted_out, split_folders
from moodistill.data.cut import Cut
from moodistill.data.datasets import from_splits
from moodistill.data.images import ImageData, Metric, Split, fraction_right
from moodistill.data.pixels import MODES, read_picture
from moodistill.data.preparation import Preparation
from moodistill.data.table import DataTable
from moodistill.errors import UserError

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
) -> ImageData:
    """Images in one folder a class, prepared alike and held in memory as uint8.

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

    Raises:
        UserError: if the folder has no such form, a class is not in every split, or images are
            damaged; all of them are named.
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
    splits, seen = _read_all(folder, places, classes, parts, channels, preparation)
    table = _table(folder, classes, passed, seen, preparation)
    return from_splits(
        folder.resolve().name, splits, classes, mean, std, metric, preparation, table,
        Path(os.path.abspath(folder)), heads,
    )  # fmt: skip


def _read_all(
    folder: Path,
    places: Mapping[str, str],
    classes: Sequence[str],
    parts: Mapping[str, Sequence[str]],
    channels: int,
    preparation: Preparation,
) -> tuple[dict[str, Split], list[dict[str, Any]]]:
    """The splits, and what was seen of each image; damaged ones are named all at once."""
    from PIL import Image

    settings = preparation.settings()

    def read(file: str) -> tuple[np.ndarray, dict[str, Any]] | str:
        try:
            return read_picture(folder / file, channels, settings)
        except Exception as error:  # Pillow's plugins raise what they like at damaged files
            reason = " ".join(str(error).replace(str(folder / file), "it").split())
            if isinstance(error, Image.DecompressionBombError):
                reason = "larger than Pillow opens, shrink it; " + reason.split(",")[0]
            return f"{file} ({reason or type(error).__name__})"

    splits, seen, damaged = {}, [], []
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        # Pillow warns of odd metadata and of large images; what it cannot read it raises.
        warnings.filterwarnings("ignore", module="PIL")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for split, files in parts.items():
            images = []
            for found in pool.map(read, files):
                if isinstance(found, str):
                    damaged.append(found)
                    continue
                images.append(found[0])
                seen.append(found[1])
            labels = [classes.index(class_of(file, places)) for file in files]
            if not damaged:
                paths = tuple(os.path.abspath(folder / file) for file in files)
                splits[split] = Split(np.stack(images), np.array(labels, np.int64), paths)
    if damaged:
        more = f", and {len(damaged) - NAMED} more" if len(damaged) > NAMED else ""
        raise UserError(
            f"{folder} holds {len(damaged)} file(s) that are no readable image: "
            f"{', '.join(damaged[:NAMED])}{more}; mend or delete them"
        )
    return splits, seen


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
