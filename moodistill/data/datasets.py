"""`ImageData` from map-style datasets, or from arrays of splits."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moodistill.data.dataset_images import DatasetImages, stream_dataset
from moodistill.data.digests import pictures_digest
from moodistill.data.images import ImageData, Metric, Split, fraction_right
from moodistill.data.memory import are_held
from moodistill.data.preparation import Preparation
from moodistill.data.streamed import Images, StreamedImages, batches, digest_each
from moodistill.data.table import DataTable, count_classes, equal_pictures
from moodistill.data.targets import (
    arranged,
    class_names,
    meaning_of,
    one_label,
    one_of,
    sample_of,
    stacked,
)  # fmt: skip
from moodistill.data.transforms import checked_preparation, files_of
from moodistill.errors import UserError
from moodistill.progress import Reporter


def from_datasets(
    train: Any,
    validation: Any,
    test: Any = None,
    *,
    labels: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    name: str = "own",
    metric: Metric = fraction_right,
    preparation: Preparation | None = None,
    in_memory: bool | None = None,
    reporter: Reporter | None = None,
    heads: Any = None,
) -> ImageData:
    """Map-style datasets of `(image, label)`, or of images alone.

    Images are held in memory, or, where they take more than a quarter of it, read from the datasets
    whenever they are needed, by several processes. Then every start reads all of them once, and an
    image must be the same each time it is read.

    Images are PIL images, uint8 arrays `(H, W)` or `(H, W, C)`, or tensors `(C, H, W)`: uint8, or
    floats in [0, 1] (so before any normalisation), all of one size.

    How the datasets prepare images is read from torchvision's transforms of `validation` (Resize
    and CenterCrop), and believed if it gives the same pixels of the datasets' files. Where it is
    not known, a bundle's `run.py` takes images of exactly the input's size alone.

    Args:
        train, validation, test: with `__len__` and `__getitem__`; `test` None takes every second
            image of `validation` away for it.
        labels: names of the classes; None numbers them.
        mean, std, metric: as in `load_image_folder`.
        name: of the data.
        preparation: how `validation` and `test` prepare the images of files.
        in_memory: whether the images are held; None decides by how much memory they take.
        reporter: is told how far the reading of all images is; None is quiet.
        heads: what the network's outputs mean, as `Heads.of` takes it; None is a classifier, or,
            without labels, fidelity to the teacher. The labels may then be arrays, or dicts or
            tuples of arrays for several outputs.

    Raises:
        UserError: if an image has another size or form, or `preparation` gives other pixels than
            the datasets.
    """
    given = {"train": train, "validation": validation, "test": test}
    described = heads is not None
    sources = {k: _source(one, k, described) for k, one in given.items() if one is not None}
    bytes_each = int(np.prod(sources["train"].shape))
    held = are_held(sum(map(len, sources.values())), bytes_each, in_memory)
    splits = {k: _collect(s) if held else _streamed(s, reporter) for k, s in sources.items()}
    held_out = [splits[part] for part in ("validation", "test") if part in splits]
    preparation = checked_preparation(validation, held_out, preparation)
    if preparation is None:  # then nothing can be compared with the files
        splits = {part: replace(split, files=()) for part, split in splits.items()}
    return from_splits(name, splits, labels, mean, std, metric, preparation, heads=heads)


def from_splits(
    name: str,
    splits: Mapping[str, Split],
    labels: Sequence[str] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    metric: Metric = fraction_right,
    preparation: Preparation | None = None,
    table: DataTable | None = None,
    folder: Path | None = None,
    heads: Any = None,
) -> ImageData:
    """`ImageData` of `train`, `validation` and `test`, its statistics measured where not given.

    Images are put in a random order that is always the same: often they come class by class, and
    a search looks at the first ones.

    Args:
        name: of the data.
        splits: without `test` every second image of `validation` is taken away for it.
        labels: names of the classes; None numbers them.
        mean, std, metric: as in `load_image_folder`.
        preparation: how files became these images, None if that is not known.
        table: what is known of the files; the images are counted here.
        folder: that the files of the splits lie in.
        heads: as in `from_datasets`.

    Raises:
        UserError: if the splits do not fit together, or there are too few names or statistics.
    """
    meaning = meaning_of(splits, heads, metric)
    splits = arranged(splits, meaning)
    images = splits["train"].images
    names = class_names(splits, meaning, labels)
    if mean is None or std is None:
        measured = _statistics(images)
        mean = measured[0] if mean is None else mean
        std = measured[1] if std is None else std
    mean, std = tuple(map(float, mean)), tuple(map(float, std))
    for what, values in (("mean", mean), ("std", std)):
        if len(values) != images.shape[-1]:
            raise UserError(
                f"{what} has {len(values)} values, the images {images.shape[-1]} channels; "
                "give one for each"
            )
    if preparation is not None:
        preparation.check_channels(images.shape[-1])
        if preparation.size != images.shape[1:3]:
            raise UserError(
                f"the preparation gives images of size {preparation.size}, the data are "
                f"{images.shape[1:3]}: give the size of the data"
            )
    digest = pictures_digest(splits, mean, std, preparation)
    if meaning is None or meaning.plain_classes:
        table = _counted(table or DataTable(name, tuple(names), {}), splits, folder)
    else:
        table = None
    if table is not None:
        table = replace(
            table, classes=tuple(names),
            prepared=preparation.describe(images.shape[-1]) if preparation else "",
        )  # fmt: skip
    return ImageData(
        name, splits["train"], splits["validation"], splits["test"],
        mean, std, tuple(names), digest, metric, preparation, table, folder, meaning,
    )  # fmt: skip


def _counted(table: DataTable, splits: Mapping[str, Split], folder: Path | None) -> DataTable:
    """The table with the images of each class and split, and those that are equal."""
    named = {
        part: (
            digest_each(split.images),
            one_of(split.targets),
            [os.path.relpath(file, folder) if folder else file for file in split.files],
        )
        for part, split in splits.items()
    }
    between_splits, between_classes = equal_pictures(named)
    return replace(
        table,
        pictures={
            part: count_classes(one_of(split.targets), len(table.classes))
            for part, split in splits.items()
        },
        between_splits=between_splits,
        between_classes=between_classes,
    )


def _statistics(images: Images) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of uint8 `(N, H, W, C)`, in [0, 1].

    From the sums of the bytes and of their squares: exact, so the same held and streamed.
    """
    if isinstance(images, StreamedImages):
        sums = images.known.sums.sum(0)
    else:
        values = np.arange(256)
        counts = np.zeros((images.shape[-1], 256), np.int64)
        for pixels in batches(images, 1000):
            for channel, found in enumerate(counts):
                found += np.bincount(pixels[..., channel].ravel(), minlength=256)
        sums = np.stack([counts @ values, counts @ values**2])
    total = len(images) * images.shape[1] * images.shape[2] * 255
    means = [int(one) / total for one in sums[0]]
    squares = [int(one) / (total * 255) for one in sums[1]]
    deviations = [max(0.0, s - m * m) ** 0.5 for m, s in zip(means, squares, strict=True)]
    return [round(m, 4) for m in means], [max(1e-3, round(d, 4)) for d in deviations]


def _source(dataset: Any, part: str, described: bool) -> DatasetImages:
    """The images of a dataset; targets as arrays where heads are given, else one label an image."""
    if not len(dataset):
        raise UserError(f"the {part} dataset is empty; expected images")

    def convert(item: Any, where: str) -> tuple[np.ndarray, Any]:
        picture, label = sample_of(item)
        if not described and label is not None:
            label = one_label(label, where)
        return _pixels(picture, where), label

    return DatasetImages(dataset, part, convert)


def _collect(source: DatasetImages) -> Split:
    items = [source.item(index) for index in range(len(source))]
    images = np.stack([pixels for pixels, _ in items])
    labels = stacked([label for _, label in items], source.part)
    return Split(images, labels, files_of(source.dataset))


def _streamed(source: DatasetImages, reporter: Reporter | None) -> Split:
    images, labels = stream_dataset(source, reporter)
    return Split(images, stacked(labels, source.part), files_of(source.dataset))


def _pixels(picture: Any, where: str) -> np.ndarray:
    """uint8 `(H, W, C)`."""
    tensor = hasattr(picture, "detach")
    array = picture.detach().cpu().numpy() if tensor else np.asarray(picture)
    if array.ndim == 2:
        array = array[None] if tensor else array[:, :, None]
    if array.ndim != 3:
        raise UserError(f"{where} has shape {array.shape}; expected (H, W), (H, W, C) or (C, H, W)")
    if tensor:
        array = array.transpose(1, 2, 0)
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.min() < -1e-3 or array.max() > 1 + 1e-3:
        raise UserError(
            f"{where} has values from {array.min():.3g} to {array.max():.3g}; expected uint8, or "
            "floats in [0, 1]: leave the normalisation to mean and std (of inputs that are no "
            "pictures say inputs='arrays')"
        )
    return np.ascontiguousarray((array * 255.0).round().clip(0, 255).astype(np.uint8))
