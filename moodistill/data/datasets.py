"""`ImageData` from map-style datasets, or from arrays of splits."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moodistill.data.images import ImageData, Metric, Split, fraction_right, sha256_array
from moodistill.errors import UserError

if TYPE_CHECKING:
    pass


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
) -> ImageData:
    """Map-style datasets of `(picture, label)` held in memory.

    Pictures are PIL images, uint8 arrays `(H, W)` or `(H, W, C)`, or tensors `(C, H, W)`: uint8, or
    floats in [0, 1] (so before any normalisation), all of one size.

    Args:
        train, validation, test: with `__len__` and `__getitem__`; `test` None takes every second
            picture of `validation` away for it.
        labels: names of the classes; None numbers them.
        mean, std, metric: as in `load_image_folder`.
        name: of the data.

    Raises:
        UserError: if a picture has another size or form.
    """
    splits = {"train": _collect(train, "train"), "validation": _collect(validation, "validation")}
    if test is not None:
        splits["test"] = _collect(test, "test")
    return from_splits(name, splits, labels, mean, std, metric)


def from_splits(
    name: str,
    splits: Mapping[str, Split],
    labels: Sequence[str] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    metric: Metric = fraction_right,
) -> ImageData:
    """`ImageData` of `train`, `validation` and `test`, its statistics measured where not given.

    Pictures are put in a random order that is always the same: often they come class by class, and
    a search looks at the first ones.

    Args:
        name: of the data.
        splits: without `test` every second picture of `validation` is taken away for it.
        labels: names of the classes; None numbers them.
        mean, std, metric: as in `load_image_folder`.

    Raises:
        UserError: if the splits do not fit together, or there are too few names or statistics.
    """
    checked = {p: Split(s.images, whole_labels(s.labels, p)) for p, s in splits.items()}
    splits = {part: _shuffled(split) for part, split in checked.items()}
    if "test" not in splits:
        whole = splits["validation"]
        splits["validation"] = Split(whole.images[::2], whole.labels[::2])
        splits["test"] = Split(whole.images[1::2], whole.labels[1::2])
    images = splits["train"].images
    for part, split in splits.items():
        if len(split) == 0 or split.images.shape[1:] != images.shape[1:]:
            raise UserError(
                f"the {part} split has pictures of shape {split.images.shape}, expected "
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
                f"{what} has {len(values)} values, the pictures {images.shape[-1]} channels; "
                "give one for each"
            )
    parts = [sha256_array(s.images) + sha256_array(s.labels) for s in splits.values()]
    # With the normalisation, on which everything that is cached of a teacher depends.
    digest = hashlib.sha256(f"{''.join(parts)} {mean} {std}".encode()).hexdigest()
    return ImageData(
        name, splits["train"], splits["validation"], splits["test"],
        mean, std, tuple(names), digest, metric,
    )  # fmt: skip


def whole_labels(labels: Any, part: str) -> np.ndarray:
    """Labels `(N,)` or `(N, 1)`, whole numbers of any type, as int64 `(N,)`.

    Raises:
        UserError: names what they are instead; `part` says of which split.
    """
    labels = np.asarray(labels)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    expected = "expected one whole number a picture, the index of its class"
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


def _shuffled(split: Split) -> Split:
    order = np.random.default_rng(0).permutation(len(split))
    return Split(split.images[order], split.labels[order])


def _statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of uint8 `(N, H, W, C)`, in [0, 1].

    From how often each byte occurs: exact, and without a copy as floats.
    """
    found = []
    values = np.arange(256) / 255.0
    for channel in range(images.shape[-1]):
        counts = sum(
            np.bincount(part[..., channel].ravel(), minlength=256)
            for part in np.array_split(images, max(1, len(images) // 1000))
        )
        shares = counts / np.sum(counts)
        mean = float(shares @ values)
        found.append(
            (round(mean, 4), max(1e-3, round(float(shares @ (values - mean) ** 2) ** 0.5, 4)))
        )
    return [mean for mean, _ in found], [std for _, std in found]


def _collect(dataset: Any, part: str) -> Split:
    images, labels = [], []
    for index in range(len(dataset)):
        picture, label = dataset[index][:2]
        images.append(_pixels(picture, f"{part} picture {index}"))
        labels.append(_one_label(label, f"{part} picture {index}"))
        if images[-1].shape != images[0].shape:
            raise UserError(
                f"{part} picture {index} is {images[-1].shape}, the first {images[0].shape}; "
                "resize them in the dataset"
            )
    if not images:
        raise UserError(f"the {part} dataset is empty; expected pictures")
    return Split(np.stack(images), np.array(labels))


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
