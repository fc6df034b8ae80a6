"""One row of a run's front: a student, or the teacher, with what was measured of it.

Accuracies are fractions. `test_accuracy` is only reported, so that it stays an honest estimate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import PurePosixPath
from typing import Any

from moodistill.errors import UserError

STAGES = ("teacher", "searched", "distilled")
PRECISIONS = ("fp32", "int8")
SUFFIX = "-int8"  # of an INT8 twin's id
LARGEST = 10**18  # of a whole number


@dataclass(frozen=True)
class FrontRow:
    """One row of a front; the teacher is the row whose stage is `teacher`.

    Attributes:
        student: short name, unique within its stage.
        stage: `teacher`, `searched` (weights inherited) or `distilled` (a finalist).
        search_accuracy: what the search saw, on its part of the validation images.
        accuracy: on all validation images; None where it was not measured (never if distilled).
        test_accuracy: None unless a finalist or the teacher.
        latency_ms, latency_ms_low, latency_ms_high: median and its 95% interval, measured again
            after the search.
        teacher_latency_ms: of the teacher as calibrated when the run began; every latency is its
            ratio to the teacher's in the same rounds, times this.
        onnx: path relative to the run folder, empty if not exported.
        precision: `fp32` or `int8`.
        search_latency_ms: what the search saw; None for an INT8 student.
        latency_ms_p90: 90th percentile, None where there were fewer than 64 timings.
        latency_samples: timings behind `latency_ms`.
        memory_bytes: weights and largest activations at batch 1, computed (of the float student).
        on_devices: where a run timed its front on several devices, ms on each.
        metric: what the three accuracies are, `accuracy` or the name of another metric.
    """

    student: str
    stage: str
    search_accuracy: float | None
    accuracy: float | None
    test_accuracy: float | None
    parameters: int
    macs: int
    latency_ms: float
    latency_ms_low: float
    latency_ms_high: float
    teacher_latency_ms: float
    size_bytes: int
    onnx: str
    genome_hash: str
    summary: str
    precision: str = "fp32"
    search_latency_ms: float | None = None
    latency_ms_p90: float | None = None
    latency_samples: int = 0
    memory_bytes: int = 0
    on_devices: Mapping[str, float] = field(default_factory=dict)
    metric: str = "accuracy"

    @property
    def validation_accuracy(self) -> float:
        """`accuracy`, or `search_accuracy` where that was not measured."""
        known = self.search_accuracy if self.accuracy is None else self.accuracy
        if known is None:
            raise UserError(f"{self.student} has no accuracy; expected one: resume its run")
        return known


METRIC = "metric"  # a column that tables of earlier versions lack
COLUMNS = {
    one.name: str(one.type) for one in fields(FrontRow) if one.name not in ("on_devices", METRIC)
}


def fault(name: str, value: Any) -> str | None:
    """What was expected of a field, None if `value`, which has the field's type, is that."""
    if value is None:
        return None
    if name == "stage":
        return None if value in STAGES else f"expected one of {', '.join(STAGES)}"
    if name == "precision":
        return None if value in PRECISIONS else f"expected one of {', '.join(PRECISIONS)}"
    if name == "onnx":
        path = PurePosixPath(value)
        inside = not path.is_absolute() and ".." not in path.parts
        return None if inside else "expected a path in the run folder"
    if isinstance(value, str):
        return None if value or name == "summary" else "expected text"
    if COLUMNS.get(name) == "int":
        good = (name == "parameters") <= value < LARGEST
        return None if good else "expected a positive whole number"
    if name.endswith("accuracy"):
        return None if 0 <= value <= 1 else "expected a fraction between 0 and 1"
    return None if math.isfinite(value) and value > 0 else "expected a positive number"


def check_row(row: FrontRow, where: str) -> None:
    """Refuse a row that no search writes.

    Args:
        row: its fields have their types.
        where: file and line; the field's name follows.

    Raises:
        UserError: names the field, its value and what was expected.
    """
    values = {name: getattr(row, name) for name in COLUMNS}
    for name, value in (*values.items(), *row.on_devices.items()):
        if expected := fault(name, value):
            raise UserError(f"{where} {name}: {str(value)[:40]!r}; {expected}")
    if row.accuracy is None and (row.stage == "distilled" or row.search_accuracy is None):
        raise UserError(f"{where} accuracy: empty; expected a fraction between 0 and 1")


def check_front(rows: Iterable[tuple[str, FrontRow]], source: str) -> list[FrontRow]:
    """The rows, each of which comes with where it was found; unique, with one teacher.

    Raises:
        UserError: names the row that was there before, or says how many teachers there are.
    """
    found: dict[tuple[str, str], FrontRow] = {}
    for where, row in rows:
        check_row(row, where)
        if (row.student, row.stage) in found:
            raise UserError(
                f"{where} student: {row.student!r} was {row.stage} before; expected once"
            )
        found[row.student, row.stage] = row
    teachers = sum(row.stage == "teacher" for row in found.values())
    if teachers != 1:
        raise UserError(f"{source}: {teachers} rows have 'teacher' as their stage, expected 1")
    return list(found.values())
