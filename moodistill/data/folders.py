"""Data of one's own: folders of pictures and map-style datasets, made into `ImageData`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moodistill.data.datasets import from_splits
from moodistill.data.images import ImageData, Metric, Split, fraction_right
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
