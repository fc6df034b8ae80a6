"""`ImageData` from map-style datasets, or from arrays of splits."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moodistill.data.dataset_images import DatasetImages, stream_dataset
from moodistill.data.images import ImageData, Metric, Split, fraction_right, sha256_array
from moodistill.data.memory import are_held
from moodistill.data.preparation import Preparation
from moodistill.data.streamed import Images, StreamedImages, batches, digest_each
from moodistill.data.table import DataTable, count_classes, equal_pictures
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
) -> ImageData:
    """Map-style datasets of `(image, label)`.

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

    Raises:
        UserError: if an image has another size or form, or `preparation` gives other pixels than
            the datasets.
    """
    given = {"train": train, "validation": validation, "test": test}
    sources = {k: _source(one, k) for k, one in given.items() if one is not None}
    bytes_each = int(np.prod(sources["train"].shape))
    held = are_held(sum(map(len, sources.values())), bytes_each, in_memory)
    splits = {k: _collect(s) if held else _streamed(s, reporter) for k, s in sources.items()}
    held_out = [splits[part] for part in ("validation", "test") if part in splits]
    preparation = checked_preparation(validation, held_out, preparation)
    if preparation is None:  # then nothing can be compared with the files
        splits = {part: replace(split, files=()) for part, split in splits.items()}
    return from_splits(name, splits, labels, mean, std, metric, preparation)


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

    Raises:
        UserError: if the splits do not fit together, or there are too few names or statistics.
    """
    splits = {
        part: _shuffled(replace(split, labels=whole_labels(split.labels, part)))
        for part, split in splits.items()
    }
    if "test" not in splits:
        whole = splits["validation"]
        splits["validation"] = whole.part(slice(None, None, 2))
        splits["test"] = whole.part(slice(1, None, 2))
    images = splits["train"].images
    for part, split in splits.items():
        if len(split) == 0 or split.images.shape[1:] != images.shape[1:]:
            raise UserError(
                f"the {part} split has images of shape {split.images.shape}, expected "
                f"(n, {', '.join(map(str, images.shape[1:]))}) with n > 0"
            )
    low, high = (f(int(f(split.labels)) for split in splits.values()) for f in (min, max))
    names = list(labels) if labels is not None else [str(i) for i in range(high + 1)]
    if low < 0:
        raise UserError(f"a label is {low}; expected whole numbers from 0")
    if len(names) <= high:
        raise UserError(
            f"labels name {len(names)} classes, the data have {high + 1}; name them all"
        )
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
    digests = {part: digest_each(split.images) for part, split in splits.items()}
    parts = [digest_of(digests[part], split.labels) for part, split in splits.items()]
    digest = _data_digest(parts, mean, std, preparation, (images.shape[1], images.shape[2]))
    table = _counted(table or DataTable(name, tuple(names), {}), splits, digests, folder)
    table = replace(
        table, classes=tuple(names),
        prepared=preparation.describe(images.shape[-1]) if preparation else "",
    )  # fmt: skip
    return ImageData(
        name, splits["train"], splits["validation"], splits["test"],
        mean, std, tuple(names), digest, metric, preparation, table, folder,
    )  # fmt: skip


def digest_of(digests: Sequence[bytes], labels: np.ndarray) -> str:
    """Of a split, from the digests of its images: the same whether they are held or streamed."""
    return hashlib.sha256(b"".join(digests)).hexdigest() + sha256_array(labels)


def former_digest(data: ImageData) -> str:
    """What an earlier version had for the digest: of all pixels at once, which must be read."""
    parts = []
    for split in (data.train, data.validation, data.test):
        content = hashlib.sha256()
        for pixels in batches(split.images, 256):
            content.update(np.ascontiguousarray(pixels).tobytes())
        parts.append(content.hexdigest() + sha256_array(split.labels))
    _, height, width = data.input_shape
    return _data_digest(parts, data.mean, data.std, data.preparation, (height, width))


def _data_digest(
    parts: Sequence[str],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    preparation: Preparation | None,
    size: tuple[int, int],
) -> str:
    # With the normalisation, on which everything that is cached of a teacher depends.
    made_of = f"{''.join(parts)} {mean} {std}"
    if preparation not in (None, Preparation(size=size)):
        made_of += f" {preparation}"
    return hashlib.sha256(made_of.encode()).hexdigest()


def whole_labels(labels: Any, part: str) -> np.ndarray:
    """Labels `(N,)` or `(N, 1)`, whole numbers of any type, as int64 `(N,)`.

    Raises:
        UserError: names what they are instead; `part` says of which split.
    """
    labels = np.asarray(labels)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    expected = "expected one whole number an image, the index of its class"
    if labels.ndim != 1:
        raise UserError(f"the {part} labels are {labels.dtype} {labels.shape}; {expected}")
    if labels.dtype.kind not in "biuf":
        raise UserError(f"the {part} labels are of type {labels.dtype}; {expected}")
    broken = np.flatnonzero(~np.isfinite(labels) | (labels != np.trunc(labels)))
    if len(broken):
        raise UserError(
            f"the {part} labels are {labels.dtype} {labels.shape}, number {broken[0]} is "
            f"{labels[broken[0]]:g}; {expected} (targets of a regression are not supported)"
        )
    return labels.astype(np.int64)


def _counted(
    table: DataTable,
    splits: Mapping[str, Split],
    digests: Mapping[str, Sequence[bytes]],
    folder: Path | None,
) -> DataTable:
    """The table with the images of each class and split, and those that are equal."""
    named = {
        part: (
            digests[part],
            split.labels,
            [os.path.relpath(file, folder) if folder else file for file in split.files],
        )
        for part, split in splits.items()
    }
    between_splits, between_classes = equal_pictures(named)
    return replace(
        table,
        pictures={
            part: count_classes(split.labels, len(table.classes)) for part, split in splits.items()
        },
        between_splits=between_splits,
        between_classes=between_classes,
    )


def _shuffled(split: Split) -> Split:
    return split.ordered(np.random.default_rng(0).permutation(len(split)))


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


def _source(dataset: Any, part: str) -> DatasetImages:
    if not len(dataset):
        raise UserError(f"the {part} dataset is empty; expected images")
    return DatasetImages(dataset, part, _item)


def _item(item: Any, where: str) -> tuple[np.ndarray, Any]:
    """Pixels and label of what a dataset gives."""
    picture, label = item[:2]
    return _pixels(picture, where), _one_label(label, where)


def _collect(source: DatasetImages) -> Split:
    items = [source.item(index) for index in range(len(source))]
    images = np.stack([pixels for pixels, _ in items])
    return Split(images, np.array([label for _, label in items]), files_of(source.dataset))


def _streamed(source: DatasetImages, reporter: Reporter | None) -> Split:
    images, labels = stream_dataset(source, reporter)
    return Split(images, np.array(labels), files_of(source.dataset))


def _one_label(label: Any, where: str) -> Any:
    """A label as a plain number (of whatever type it is), out of an array of one."""
    array = label.detach().cpu().numpy() if hasattr(label, "detach") else np.asarray(label)
    if array.shape not in ((), (1,)):
        raise UserError(
            f"{where} has a label of type {array.dtype} and shape {array.shape}; expected one "
            "whole number, the index of its class"
        )
    return array.reshape(()).item()


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
            "floats in [0, 1]: leave the normalisation to mean and std"
        )
    return np.ascontiguousarray((array * 255.0).round().clip(0, 255).astype(np.uint8))
