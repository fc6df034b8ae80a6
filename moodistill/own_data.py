"""Data of one's own: folders of pictures and map-style datasets, made into `ImageData`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moodistill.data import ImageData, Metric, Split, fraction_right, sha256_array
from moodistill.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
PARTS = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}


def load_image_folder(
    folder: Path | str,
    size: tuple[int, int] = (32, 32),
    channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    metric: Metric = fraction_right,
) -> ImageData:
    """Pictures in one folder a class, resized to `size` and held in memory as uint8.

    Either `folder/{train,validation,test}/<class>/*` (also `val`, `valid`; a missing validation or
    test split is cut from `train`), or `folder/<class>/*`: then every class is cut 80 : 10 : 10, by
    the digest of the files' names, so that a new picture moves no old one.

    Args:
        folder: of the pictures.
        size: `(height, width)` that they are resized to (bilinear, aspect ratio not kept).
        channels: 3 (RGB), 1 (grey) or 4 (RGBA).
        mean, std: of each channel of pixels in [0, 1]; None measures them on the training split.
            Give those that the teacher was trained with.
        metric: in place of accuracy.

    Raises:
        UserError: if the folder has no such form, a split or class is empty, or a picture is
            damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; expected pictures in {folder}/<class>/")
    found = {
        part: next((folder / n for n in names if (folder / n).is_dir()), None)
        for part, names in PARTS.items()
    }
    root = found["train"]
    classes = _classes(root or folder)
    files: dict[str, list[tuple[Path, int]]] = {part: [] for part in PARTS}
    for label, name in enumerate(classes):
        for part in PARTS:
            place = found[part]
            if place is not None:
                files[part] += [(path, label) for path in _pictures(place / name)]
        if root is None:
            for path in _pictures(folder / name):
                files[_part_of(path, True, True)].append((path, label))
    if root is not None and not (found["validation"] and found["test"]):
        # What is not there is cut from the training pictures.
        rest = files["train"]
        files["train"] = []
        for path, label in rest:
            part = _part_of(path, found["validation"] is None, found["test"] is None)
            files[part].append((path, label))
    splits = {}
    for part, chosen in files.items():
        present = {label for _, label in chosen}
        if len(present) < len(classes):
            absent = next(n for i, n in enumerate(classes) if i not in present)
            raise UserError(
                f"{folder} has no {part} picture of class {absent!r}; expected some of every class "
                f"(formats: {', '.join(PICTURES)})"
            )
        images = np.stack([_read(path, size, channels) for path, _ in chosen])
        splits[part] = Split(images, np.array([label for _, label in chosen], np.int64))
    return from_splits(folder.name, splits, classes, mean, std, metric)


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
    splits = {part: _shuffled(split) for part, split in splits.items()}
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


def _classes(folder: Path) -> list[str]:
    names = sorted(
        path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    if len(names) < 2:
        raise UserError(
            f"{folder} holds {len(names)} class folders, expected at least 2: "
            f"{folder}/<class>/picture.png"
        )
    return names


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)


def _part_of(path: Path, validation: bool, test: bool) -> str:
    """The split of a picture, by its name alone; a tenth each where wanted."""
    place = int(hashlib.sha256(f"{path.parent.name}/{path.name}".encode()).hexdigest()[:8], 16) % 10
    if place == 0 and validation:
        return "validation"
    return "test" if place == 1 and test else "train"


def _read(path: Path, size: tuple[int, int], channels: int) -> np.ndarray:
    from PIL import Image

    mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(channels)
    if mode is None:
        raise UserError(f"channels is {channels}; expected 1, 3 or 4")
    try:
        with Image.open(path) as opened:
            picture = _eight_bits(opened, path)
            resized = picture.convert(mode).resize((size[1], size[0]), Image.Resampling.BILINEAR)
            return np.asarray(resized, np.uint8).reshape(*size, channels)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no readable picture ({error}); mend or delete it") from error


def _eight_bits(picture: Image.Image, path: Path) -> Image.Image:
    """Grey pictures of 16 bits as bytes: Pillow itself would make white of all above 255."""
    from PIL import Image

    if picture.mode == "F":
        raise UserError(f"{path} has floating-point pixels; expected 8 or 16 bits: convert it")
    if not picture.mode.startswith("I"):
        return picture
    values = np.asarray(picture).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise UserError(f"{path} has pixels of more than 16 bits; expected 8 or 16: convert it")
    return Image.fromarray((values / 257.0).round().astype(np.uint8))


def _collect(dataset: Any, part: str) -> Split:
    images, labels = [], []
    for index in range(len(dataset)):
        picture, label = dataset[index][:2]
        images.append(_pixels(picture, f"{part} picture {index}"))
        labels.append(int(label))
        if images[-1].shape != images[0].shape:
            raise UserError(
                f"{part} picture {index} is {images[-1].shape}, the first {images[0].shape}; "
                "resize them in the dataset"
            )
    if not images:
        raise UserError(f"the {part} dataset is empty; expected pictures")
    return Split(np.stack(images), np.array(labels, np.int64))


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
