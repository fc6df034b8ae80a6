"""A student as an ONNX file that has been compared with torch on real images."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import fx

from moodistill import __version__
from moodistill.data import ImageData, Split
from moodistill.errors import UserError
from moodistill.files import write_atomic
from moodistill.onnx_writer import IR_VERSION, to_onnx
from moodistill.runtime import outputs
from moodistill.ship import ShipOptions, shipped_model

MAX_LOGIT_DIFFERENCE = 1e-3
COMPARED = 100  # images at once, fewer if they are large
OPSET = 17  # with IR version 8: read by every ONNX Runtime since 1.12


@dataclass(frozen=True)
class Origin:
    """Where a student comes from, written into its file.

    Attributes:
        task: the problem's name.
        teacher_digest: SHA-256 of the teacher's weights.
        genome: packed canonical genome.
    """

    task: str
    teacher_digest: str
    genome: bytes


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


def properties(data: ImageData, origin: Origin, options: ShipOptions) -> dict[str, str]:
    """The `metadata_props` of a shipped model."""
    channels = data.input_shape[0]
    inside = options.input != "normalised"
    return {
        "labels": json.dumps(data.labels),
        "input_layout": "NCHW",
        "input_colour": "RGB" if channels == 3 else f"{channels} channel(s)",
        "input_range": "0-255" if inside else "normalised",
        "normalisation": json.dumps(
            {"scale": 1 / 255, "mean": data.mean, "std": data.std, "inside_graph": inside}
        ),
        "opset": str(OPSET),
        "ir_version": str(IR_VERSION),
        "task": origin.task,
        "data": data.name,
        "teacher_sha256": origin.teacher_digest,
        "genome": base64.b64encode(origin.genome).decode(),
        "moodistill_version": __version__,
    }


def ship(model: bytes, data: ImageData, origin: Origin, options: ShipOptions) -> bytes:
    """A bare ONNX file with preprocessing and metadata."""
    facts = properties(data, origin, options)
    return shipped_model(model, data.mean, data.std, options, facts)


@torch.no_grad()
def compare(
    model: bytes, student: fx.GraphModule, data: ImageData, split: Split, softmax: bool = False
) -> Parity:
    """Run both on the images of `split`; outputs are compared absolutely."""
    worst, same = 0.0, 0
    batch = data.at_once(COMPARED)
    answers = outputs(model, data, split, torch.get_num_threads(), batch)
    for place, found in enumerate(answers):
        images = data.normalise(split.images[place * batch : (place + 1) * batch])
        answer = student(images)
        expected = (answer.softmax(1) if softmax else answer).numpy()
        difference = np.abs(expected - found).max()
        worst = max(worst, float(difference) if np.isfinite(difference) else np.inf)
        same += int((expected.argmax(1) == found.argmax(1)).sum())
    return Parity(len(split), worst, same)


def checked_onnx(
    student: fx.GraphModule,
    data: ImageData,
    origin: Origin,
    options: ShipOptions | None = None,
    images: int = 1000,
) -> tuple[bytes, Parity]:
    """The shipped model, if ONNX Runtime agrees with torch on held-out images.

    Raises:
        UserError: if it does not.
    """
    options = options or ShipOptions()
    model = ship(to_onnx(student, data.input_shape, OPSET), data, origin, options)
    parity = compare(model, student, data, data.validation.head(images), options.softmax)
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
