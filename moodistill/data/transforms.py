"""What can be known of how a `Dataset` prepares images: its files, and torchvision's transforms.

Nothing is believed that does not give the same pixels: see `checked_preparation`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from moodistill.data.images import Split
from moodistill.data.pixels import read_picture
from moodistill.data.preparation import Preparation
from moodistill.errors import UserError

COMPARED = 8  # files of a split
# Transforms that change the form of an image, not its pixels.
_FORMS = {"ToTensor", "PILToTensor", "ToImage", "ToDtype", "ToPureTensor", "ConvertImageDtype"}
_FILTERS = {"nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"}


def files_of(dataset: Any) -> tuple[str, ...]:
    """Paths of a dataset's images in its order; empty if it does not say.

    Read from `samples`, pairs of path and label, as torchvision's `ImageFolder` has them; a
    `torch.utils.data.Subset` is looked through.
    """
    whole, indices = _whole(dataset)
    samples = getattr(whole, "samples", None)
    if not isinstance(samples, Sequence) or len(samples) <= max(indices, default=-1):
        return ()
    try:
        files = tuple(os.path.abspath(samples[index][0]) for index in indices)
    except (TypeError, IndexError, KeyError):
        return ()
    return files if all(map(os.path.isfile, files[:1])) else ()


def checked_preparation(
    dataset: Any, splits: Sequence[Split], given: Preparation | None
) -> Preparation | None:
    """The preparation of a dataset, if it gives the pixels that the dataset gives.

    Args:
        dataset: whose transforms are read if nothing is given.
        splits: images as the datasets gave them, with their files where those are known.
        given: what the caller says; without files it is believed.

    Returns:
        None if it is not known, or what the transforms say does not give the same pixels.

    Raises:
        UserError: if what is given does not.
    """
    preparation = given
    if given is None:
        _, height, width, _ = splits[0].images.shape
        preparation = _preparation_of(dataset, (height, width))
        if preparation is None or not splits[0].files:
            return None
    assert preparation is not None
    preparation.check_channels(splits[0].images.shape[-1])
    for split in splits:
        for index in np.linspace(0, len(split) - 1, min(COMPARED, len(split))).astype(int):
            if not split.files or _same(split, int(index), preparation):
                continue
            if given is None:
                return None
            raise UserError(
                f"the preparation ({preparation.describe(split.images.shape[-1])}) gives other "
                f"pixels of {split.files[index]} than the dataset; give the one that its "
                "transforms do, or none"
            )
    return preparation


def _same(split: Split, index: int, preparation: Preparation) -> bool:
    image = split.images[index]
    try:
        pixels, _ = read_picture(split.files[index], image.shape[-1], preparation.settings())
    except Exception:  # the dataset read it in a way of its own
        return False
    return np.array_equal(pixels, image)


def _whole(dataset: Any) -> tuple[Any, list[int]]:
    """A dataset without the subsets around it, and the indices that they leave."""
    indices = list(range(len(dataset)))
    while hasattr(dataset, "dataset") and hasattr(dataset, "indices"):
        indices = [int(dataset.indices[index]) for index in indices]
        dataset = dataset.dataset
    return dataset, indices


def _preparation_of(dataset: Any, size: tuple[int, int]) -> Preparation | None:
    """What torchvision's transforms of a dataset do to files; None if they do anything else."""
    whole, _ = _whole(dataset)
    transform = getattr(whole, "transform", None)
    steps = getattr(transform, "transforms", [] if transform is None else [transform])
    steps = [step for step in steps if type(step).__name__ not in _FORMS]
    names = [type(step).__name__ for step in steps]
    height, width = int(size[0]), int(size[1])
    if names == ["Resize"]:
        if _ints(steps[0].size) != [height, width]:
            return None
        return _made("squash", steps[0], (height, width), None)
    if names == ["Resize", "CenterCrop"]:
        resized = _ints(steps[0].size)
        if len(resized) != 1 or resized[0] < max(height, width):
            return None
        return _made("crop", steps[0], (height, width), resized[0])
    return None


def _made(
    resize: str, step: Any, size: tuple[int, int], shorter_side: int | None
) -> Preparation | None:
    interpolation = getattr(step.interpolation, "value", step.interpolation)
    if interpolation not in _FILTERS or getattr(step, "max_size", None) is not None:
        return None
    return Preparation(resize, size, interpolation, exif=False, shorter_side=shorter_side)


def _ints(size: Any) -> list[int]:
    return [int(size)] if isinstance(size, int) else [int(one) for one in size]
