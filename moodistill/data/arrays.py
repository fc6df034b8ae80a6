"""Inputs that are no pictures: signals `(C, L)`, maps `(C, H, W)`, volumes `(C, D, H, W)`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from moodistill.data.digests import content
from moodistill.data.images import AT_ONCE, ImageData, Metric, Split, fraction_right
from moodistill.data.targets import (
    arranged,
    class_names,
    meaning_of,
    sample_of,
    stacked,
)
from moodistill.errors import UserError
from moodistill.heads.heads import outputs_of_words

RANKS = (2, 3, 4)  # axes of an input


@dataclass(frozen=True)
class ArrayData(ImageData):
    """Float inputs `(N, C, *size)` in three splits; no pixels, so nothing shifts or mirrors them.

    `mean` and `std` are those of each channel as the arrays hold it; 0 and 1 leave them as they
    are.
    """

    pictures: ClassVar[bool] = False
    scale: ClassVar[float] = 1.0

    @property
    def input_shape(self) -> tuple[int, ...]:
        """`(C, *size)` of one input."""
        return tuple(self.train.images.shape[1:])

    def normalise(self, images: np.ndarray) -> torch.Tensor:
        """`(N, C, *size)` to normalised float32 of that shape."""
        shape = (1, -1, *[1] * (images.ndim - 2))
        values = torch.from_numpy(np.ascontiguousarray(images, np.float32))
        mean, std = (torch.tensor(one).view(shape) for one in (self.mean, self.std))
        return ((values - mean) / std).contiguous()

    def at_once(self, most: int) -> int:
        """How many inputs, at most `most`, go through a network together in little memory."""
        return max(1, min(most, AT_ONCE // max(1, int(np.prod(self.input_shape[1:])))))


def from_arrays(
    name: str,
    splits: Mapping[str, Split],
    labels: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    metric: Metric = fraction_right,
    heads: Any = None,
) -> ArrayData:
    """`ArrayData` of `train`, `validation` and `test`.

    Args:
        name: of the data.
        splits: inputs `(N, C, *size)` of numbers; without `test` every second input of `validation`
            is taken away for it.
        labels: names of the classes; None numbers them.
        mean, std: of each channel; None leaves the arrays as they are.
        metric, heads: as in `from_datasets`.

    Raises:
        UserError: if the splits do not fit together, or hold what is no finite number.
    """
    splits = {part: replace(one, images=_floats(one.images, part)) for part, one in splits.items()}
    meaning = meaning_of(splits, heads, metric)
    splits = arranged(splits, meaning)
    names = class_names(splits, meaning, labels)
    channels = splits["train"].images.shape[1]
    numbers = {"mean": mean or (0.0,) * channels, "std": std or (1.0,) * channels}
    for what, values in numbers.items():
        if len(values) != channels:
            raise UserError(
                f"{what} has {len(values)} values, the arrays {channels} channels; give one for "
                "each"
            )
    means, deviations = (tuple(map(float, one)) for one in numbers.values())
    if min(deviations) <= 0:
        raise UserError(f"std is {min(deviations):g}; expected positive numbers")
    made_of = f"{content(splits)} {means} {deviations} arrays"
    return ArrayData(
        name, splits["train"], splits["validation"], splits["test"], means, deviations, names,
        hashlib.sha256(made_of.encode()).hexdigest(), metric, heads=meaning,
    )  # fmt: skip


def arrays_of(dataset: Any, part: str) -> Split:
    """A split of the inputs of a map-style dataset, `(input, targets)` or inputs alone.

    Raises:
        UserError: if an input has another shape than the first, or there are none.
    """
    inputs: list[np.ndarray] = []
    targets: list[Any] = []
    for index in range(len(dataset)):
        one, wanted = sample_of(dataset[index])
        array = one.detach().cpu().numpy() if hasattr(one, "detach") else np.asarray(one)
        if inputs and array.shape != inputs[0].shape:
            raise UserError(
                f"{part} input {index} is {array.shape}, the first {inputs[0].shape}; bring them "
                "to one shape in the dataset"
            )
        inputs.append(array)
        targets.append(wanted)
    if not inputs:
        raise UserError(f"the {part} dataset is empty; expected inputs")
    return Split(np.stack(inputs), stacked(targets, part))


def is_array(value: Any) -> bool:
    """Whether it is an array or tensor by itself, so inputs without targets."""
    return isinstance(value, np.ndarray | torch.Tensor)


def split_of_arrays(given: Any, part: str, inputs: str | None) -> Split:
    """A split from a pair of inputs and targets, or from inputs alone.

    Args:
        given: arrays; targets in a dict or tuple for several outputs.
        part: the split's name.
        inputs: `pictures` where they must be uint8 `(N, H, W, C)`, None where they may be.

    Raises:
        UserError: if they are neither pictures nor arrays.
    """
    images, answers = (given, {}) if is_array(given) else given
    images = np.asarray(images)
    if isinstance(answers, Mapping | tuple | list):
        answers = outputs_of_words(answers) if not _is_flat(answers) else np.asarray(answers)
    if isinstance(answers, Mapping):
        labels: Any = {name: np.asarray(one) for name, one in answers.items()}
    else:
        labels = np.asarray(answers)
    pictures = images.dtype == np.uint8 and images.ndim == 4
    named = labels if isinstance(labels, dict) else {"": labels}
    short = any(one.shape[:1] != images.shape[:1] for one in named.values())
    if short or images.ndim < 2 or (not pictures and inputs == "pictures"):
        said = ", ".join(f"{one.dtype} {one.shape}" for one in named.values())
        raise UserError(
            f"{part} is {images.dtype} {images.shape} with labels {said}; expected uint8 "
            "(N, H, W, C), or floats (N, C, *size), and N labels"
        )
    return Split(images, labels)


def _is_flat(answers: Any) -> bool:
    """Whether a list or tuple holds the labels themselves, not those of several outputs."""
    return not isinstance(answers, Mapping) and not any(is_array(one) for one in answers)


def _floats(inputs: Any, part: str) -> np.ndarray:
    array = np.asarray(inputs)
    if array.dtype.kind not in "biuf" or array.ndim - 1 not in RANKS:
        raise UserError(
            f"the {part} inputs are {array.dtype} {array.shape}; expected numbers (N, C, L), "
            "(N, C, H, W) or (N, C, D, H, W)"
        )
    found = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(found).all():
        raise UserError(
            f"the {part} inputs hold NaN or infinity, first in number "
            f"{int(np.argwhere(~np.isfinite(found))[0][0])}; expected finite numbers"
        )
    return found
