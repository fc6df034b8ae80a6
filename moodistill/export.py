"""A student as an ONNX file that has been compared with torch on real images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import fx

from moodistill.data import ImageData, Split
from moodistill.errors import UserError
from moodistill.files import write_atomic
from moodistill.onnx_writer import to_onnx

MAX_LOGIT_DIFFERENCE = 1e-3


@dataclass(frozen=True)
class Parity:
    """Torch against ONNX Runtime on `images` real images."""

    images: int
    max_difference: float
    same_predictions: int

    @property
    def passed(self) -> bool:
        """Logits within 1e-3 and every prediction equal."""
        return self.max_difference <= MAX_LOGIT_DIFFERENCE and self.same_predictions == self.images


@torch.no_grad()
def compare(
    model: bytes, student: fx.GraphModule, data: ImageData, split: Split, batch: int = 250
) -> Parity:
    """Run both on the images of `split`; logits are compared absolutely."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    worst, same = 0.0, 0
    for start in range(0, len(split), batch):
        images = data.normalise(split.images[start : start + batch])
        expected = student(images).numpy()
        (found,) = session.run(None, {"input": images.numpy()})
        difference = np.abs(expected - found).max()
        worst = max(worst, float(difference) if np.isfinite(difference) else np.inf)
        same += int((expected.argmax(1) == found.argmax(1)).sum())
    return Parity(len(split), worst, same)


def export_onnx(student: fx.GraphModule, data: ImageData, path: Path, images: int = 1000) -> Parity:
    """Write `path` only if ONNX Runtime agrees with torch on held-out images.

    Raises:
        UserError: if it does not; no file is left then.
    """
    model = to_onnx(student, data.input_shape)
    parity = compare(model, student, data, data.validation.head(images))
    if not parity.passed:
        raise UserError(
            f"{path.name} was not written: ONNX Runtime differs from torch by "
            f"{parity.max_difference:.2e} in a logit (at most {MAX_LOGIT_DIFFERENCE} allowed) and "
            f"agrees on {parity.same_predictions} of {parity.images} predictions"
        )
    write_atomic(path, model)
    return parity
