"""A student as an ONNX file that has been compared with torch on real images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import fx

from moodistill.bundle.model import Origin, ShipOptions, ship
from moodistill.data.images import ImageData, Split
from moodistill.errors import UserError
from moodistill.heads.outputs import outputs_of
from moodistill.io.atomic import write_atomic
from moodistill.onnx.runtime import outputs
from moodistill.onnx.writer import to_onnx

OPSET = 17  # that students are written in; a bundle's file is stamped with the lowest
MAX_LOGIT_DIFFERENCE = 1e-3
COMPARED = 100  # images at once, fewer if they are large


@dataclass(frozen=True)
class Parity:
    """Torch against ONNX Runtime on `images` real images."""

    images: int
    max_difference: float
    same_predictions: int

    @property
    def passed(self) -> bool:
        """Outputs within 1e-3 and every prediction equal."""
        return self.max_difference <= MAX_LOGIT_DIFFERENCE and self.same_predictions == self.images


@torch.no_grad()
def compare(
    model: bytes, student: fx.GraphModule, data: ImageData, split: Split, softmax: bool = False
) -> Parity:
    """Run both on the images of `split`, output by output.

    Outputs are compared absolutely, those that are no classes relative to the largest above 1.
    """
    worst, same, start = 0.0, 0, 0
    heads = data.meaning.by_output
    batch = data.at_once(COMPARED)
    for found in outputs(model, data, split, torch.get_num_threads(), batch):
        count = len(next(iter(found.values())))
        answers = outputs_of(student(data.normalise(split.images[start : start + count])))
        start += count
        equal = np.ones(count, bool)
        for name, answer in answers.items():
            classes = heads[name].kind == "classification"
            expected = (answer.softmax(1) if softmax and classes else answer).numpy()
            scale = 1.0 if classes else max(1.0, float(np.abs(expected).max()))
            difference = np.abs(expected - found[name]).max() / scale
            worst = max(worst, float(difference) if np.isfinite(difference) else np.inf)
            if classes:
                equal &= expected.argmax(1) == found[name].argmax(1)
        same += int(equal.sum())
    return Parity(len(split), worst, same)


def checked_onnx(
    student: fx.GraphModule,
    data: ImageData,
    origin: Origin,
    options: ShipOptions | None = None,
    images: int = 1000,
) -> tuple[bytes, Parity]:
    """The bundle's model, if ONNX Runtime agrees with torch on held-out images.

    Raises:
        UserError: if it does not.
    """
    options = options or ShipOptions()
    bare = to_onnx(student, data.input_shape, options.opset or OPSET)
    model = ship(bare, data, origin, options)
    checked = data.validation.head(images).held()
    parity = compare(model, student, data, checked, options.softmax)
    if not parity.passed:
        raise UserError(
            f"the model was not written: ONNX Runtime differs from torch by "
            f"{parity.max_difference:.2e} in an output (at most {MAX_LOGIT_DIFFERENCE} allowed) "
            f"and agrees on {parity.same_predictions} of {parity.images} predictions"
        )
    return model, parity


def export_onnx(
    student: fx.GraphModule,
    data: ImageData,
    origin: Origin,
    path: Path,
    options: ShipOptions | None = None,
    images: int = 1000,
) -> Parity:
    """Write `checked_onnx`.

    Raises:
        UserError: as that does; no file is left then.
    """
    model, parity = checked_onnx(student, data, origin, options, images)
    write_atomic(path, model)
    return parity
