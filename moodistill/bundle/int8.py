"""INT8 twins of distilled students: made, measured, and refused where they are no gain."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moodistill.bundle.model import Origin, ShipOptions, ship
from moodistill.data.images import ImageData
from moodistill.errors import UserError
from moodistill.io.atomic import write_atomic, write_json_atomic
from moodistill.io.records import parse_json
from moodistill.onnx.quantise import int8_scheme, quantise_measured
from moodistill.onnx.runtime import onnx_accuracy
from moodistill.pareto.evaluation import Latency
from moodistill.storage.folder import MODEL_FILE, RESULT_FILE

CALIBRATION_IMAGES = 256


@dataclass(frozen=True)
class Int8Config:
    """When an INT8 student is worth keeping.

    Attributes:
        wanted: whether finalists get an INT8 twin at all.
        max_loss: of validation accuracy against the float student, a fraction.
    """

    wanted: bool = True
    max_loss: float = 0.01

    def __post_init__(self) -> None:
        """Refuse a loss that is none."""
        if not -1 <= self.max_loss <= 1:
            raise UserError(
                f"max_loss of INT8 is {self.max_loss:g}; expected a fraction: 0.01 is one point"
            )


@dataclass(frozen=True)
class Int8Result:
    """What became of one INT8 student; `students/<id>-int8/result.json`.

    Attributes:
        student: its id.
        float_sha256: of the bare float model that it was made from.
        scheme: types of activations and weights.
        excluded: nodes that stay in float because INT8 spoils them.
        accuracy: on all validation images.
        test_accuracy: None unless it was kept.
        size_bytes: of `model.onnx`.
        refused: why it is not offered; empty if it is.
    """

    student: str
    float_sha256: str
    scheme: dict[str, Any]
    excluded: tuple[str, ...]
    accuracy: float
    test_accuracy: float | None
    size_bytes: int
    refused: str = ""


def quantise_student(
    bare: bytes,
    name: str,
    accuracy: float,
    data: ImageData,
    origin: Origin,
    folder: Path,
    device: Mapping[str, Any],
    config: Int8Config,
    options: ShipOptions | None = None,
) -> Int8Result:
    """Write the INT8 twin of a float student into `folder`; its speed is judged later.

    A result already there for the same float model is read back.

    Args:
        bare: the float student's ONNX file without preprocessing.
        name: the twin's id.
        accuracy: of the float student on all validation images.
        data: calibrated on training images, judged on validation images.
        origin: written into the file.
        folder: of the twin.
        device: fingerprint of the target, which decides the types.
        config: what it may lose.
        options: how the file takes images.
    """
    digest = hashlib.sha256(bare).hexdigest()
    found = read_int8(folder)
    if found is not None and found.float_sha256 == digest:
        return found
    threads = torch.get_num_threads()
    small = data.validation.head(1000).held()

    def score(model: bytes) -> float:
        return onnx_accuracy(model, data, small, threads)

    floor = score(bare) - config.max_loss
    images = data.calibration(CALIBRATION_IMAGES).numpy()
    made = quantise_measured(bare, images, int8_scheme(device), score, floor)
    reached = onnx_accuracy(made.model, data, data.validation, threads)
    model = ship(made.model, data, origin, options or ShipOptions())
    lost = accuracy - reached
    refused = ""
    if lost > config.max_loss:
        refused = (
            f"loses {100 * lost:.2f} points of validation {data.metric_label}, "
            f"more than the {100 * config.max_loss:.2f} allowed"
        )
    result = Int8Result(
        name, digest, asdict(made.scheme), made.excluded, reached, None, len(model), refused
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / MODEL_FILE, model)
    save_int8(folder, result)
    return result


def judge_speed(result: Int8Result, latency: Latency, float_latency: Latency) -> Int8Result:
    """The result, refused unless its interval lies below the float student's time."""
    if latency.high_ms < float_latency.latency_ms:
        return result
    return replace(
        result,
        refused=f"is not faster: {latency.latency_ms:.3f} ms "
        f"({latency.low_ms:.3f}-{latency.high_ms:.3f}) against {float_latency.latency_ms:.3f} ms",
    )


def save_int8(folder: Path, result: Int8Result) -> None:
    """Write `result.json`; of a refused student nothing else stays."""
    if result.refused and folder.is_dir():
        for path in folder.iterdir():
            if path.is_file() and path.name != RESULT_FILE:
                path.unlink()
    write_json_atomic(folder / RESULT_FILE, asdict(result))


def read_int8(folder: Path) -> Int8Result | None:
    """The complete result in a twin's folder, or None."""
    try:
        result = parse_json((folder / RESULT_FILE).read_bytes(), Int8Result)
    except (OSError, ValueError):
        return None
    return result if result.refused or (folder / MODEL_FILE).is_file() else None
