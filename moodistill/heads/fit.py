"""Whether targets fit a network's outputs; said in one line that names both shapes."""

from __future__ import annotations

from typing import Any

import numpy as np

from moodistill.errors import UserError
from moodistill.heads.head import CLASSES, Head

Shape = tuple[int, ...]


def as_targets(head: Head, given: Any, where: str) -> np.ndarray:
    """Targets `(N, ...)` as the head wants them: class indices int64, values float32.

    Args:
        head: of the output.
        given: an array.
        where: what they are, for messages, such as `the train labels`.

    Raises:
        UserError: names type, shape and value, and what was expected.
    """
    array = np.asarray(given)
    if array.dtype.kind not in "biuf":
        raise UserError(f"{where} are of type {array.dtype}; expected numbers")
    if array.dtype.kind == "f":
        broken = np.argwhere(~np.isfinite(array))
        if len(broken):
            place = tuple(map(int, broken[0]))
            raise UserError(
                f"{where} hold {array[place]:g} at {place}; expected finite numbers: mend them, "
                "or leave those inputs out"
            )
    if head.kind == "regression":
        return array.astype(np.float32)
    whole = array if array.dtype.kind != "f" else np.trunc(array)
    if (whole != array).any():
        place = tuple(map(int, np.argwhere(whole != array)[0]))
        raise UserError(
            f"{where} are {array.dtype} {array.shape} and hold {array[place]:g}; expected whole "
            f"numbers for {head.kind} (of a regression say so: a head 'regression')"
        )
    if head.kind == "multilabel" and array.size and (array.min() < 0 or array.max() > 1):
        raise UserError(
            f"{where} range from {array.min():g} to {array.max():g}; expected 0 or 1 for each label"
        )
    if head.kind == "classification" and array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    return array.astype(np.int64)


def check_targets(head: Head, name: str, output: Shape, targets: np.ndarray, part: str) -> None:
    """Refuse targets `(N, ...)` that do not fit an output of shape `output` (without the batch).

    Raises:
        UserError: names both shapes, or the value that is no class.
    """
    shape = tuple(targets.shape[1:])
    wanted = output[1:] if head.kind in CLASSES else output
    scalar = head.kind == "regression" and shape == () and output in ((1,), ())
    least = {"classification": 1, "segmentation": 2}.get(head.kind, 0)
    if head.kind == "classification" and len(output) != 1:
        raise UserError(
            f"output {name} has shape {output} for one input, a classification needs (classes,): "
            "give a head 'segmentation' where every place has a class"
        )
    if len(output) < least:
        raise UserError(
            f"output {name} has shape {output} for one input, a {head.kind} needs "
            "(classes, *size); give another head"
        )
    if shape != wanted and not scalar:
        raise UserError(
            f"output {name} has shape {output} for one input, the {part} targets have {shape}; "
            f"a {head.kind} needs targets of shape {wanted}"
        )
    if head.kind not in CLASSES or not targets.size:
        return
    seen = targets[targets != head.ignore] if head.kind == "segmentation" else targets
    if not seen.size:
        return
    low, high = int(seen.min()), int(seen.max())
    if low < 0 or high >= output[0]:
        hint = f" ({head.ignore} is left out)" if head.kind == "segmentation" else ""
        raise UserError(
            f"output {name} has {output[0]} classes (shape {output}), the {part} targets "
            f"{tuple(targets.shape)} range from {low} to {high}; expected 0 to "
            f"{output[0] - 1}{hint}"
        )
