"""The Pareto front of a run: the rows of `pareto.csv`, written and read strictly.

Accuracies are fractions. `test_accuracy` is only reported, so that it stays an honest estimate.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from moodistill.errors import UserError
from moodistill.io.atomic import write_atomic, write_json_atomic

STAGES = ("teacher", "searched", "distilled")
PRECISIONS = ("fp32", "int8")
ON_DEVICE = "latency_ms_on_"  # and the device's name: the column of one of several devices


@dataclass(frozen=True)
class FrontRow:
    """One row of `pareto.csv`; the teacher is the row whose stage is `teacher`.

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
        on_devices: where a run timed its front on several devices, ms on each; a column
            `latency_ms_on_<device>` each.
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

    @property
    def validation_accuracy(self) -> float:
        """`accuracy`, or `search_accuracy` where that was not measured."""
        known = self.search_accuracy if self.accuracy is None else self.accuracy
        if known is None:
            raise UserError(f"{self.student} has no accuracy; expected one: resume its run")
        return known


def write_front(path: Path, rows: Sequence[FrontRow]) -> None:
    """Write `pareto.csv` (a path, or the folder it goes into) and its `.json` twin, atomically."""
    path = _csv_path(path)
    table = io.StringIO(newline="")
    devices = list(dict.fromkeys(device for row in rows for device in row.on_devices))
    header = [*_COLUMNS, *(ON_DEVICE + device for device in devices)]
    csv.writer(table, lineterminator="\n").writerow(header)
    for row in rows:
        # float() first: the repr of a NumPy scalar is not a number.
        values = [getattr(row, name) for name in _COLUMNS]
        values += [row.on_devices.get(device) for device in devices]
        cells = [repr(float(v)) if isinstance(v, float) else v for v in values]
        # csv leaves a lone carriage return unquoted and then reads it as the end of a line.
        if any("\r" in str(cell) for cell in cells):
            csv.writer(table, lineterminator="\n", quoting=csv.QUOTE_ALL).writerow(cells)
        else:
            csv.writer(table, lineterminator="\n").writerow(cells)
    write_json_atomic(path.with_suffix(".json"), [asdict(row) for row in rows])
    write_atomic(path, table.getvalue().encode())


def read_front(folder: Path) -> list[FrontRow]:
    """The rows of `pareto.csv` in a run folder (or of that file).

    Raises:
        UserError: if there is none or it is damaged; names the line and the column.
    """
    path = _csv_path(folder)
    if not path.is_file():
        raise UserError(f"{path} does not exist; expected the front of a finished run")
    try:
        # Not read_text, which would change line ends inside quoted cells.
        text = path.read_bytes().decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        lines = [(reader.line_num, cells) for cells in reader if cells]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no readable CSV ({error}); restore it") from error
    header = lines[0][1] if lines else []
    for name in _COLUMNS:
        if (count := header.count(name)) != 1:
            raise UserError(f"{path} line 1: {count} columns {name}, expected 1")
    rows: dict[tuple[str, str], FrontRow] = {}
    for line, cells in lines[1:]:
        if len(cells) != len(header):
            raise UserError(f"{path} line {line}: {len(cells)} cells, expected {len(header)}")
        row = _row(dict(zip(header, cells, strict=True)), f"{path} line {line}, column")
        if (row.student, row.stage) in rows:
            raise UserError(
                f"{path} line {line}, column student: {row.student!r} was {row.stage} before; "
                "expected once"
            )
        rows[row.student, row.stage] = row
    teachers = sum(row.stage == "teacher" for row in rows.values())
    if teachers != 1:
        raise UserError(f"{path}: {teachers} rows have 'teacher' in column stage, expected 1")
    return list(rows.values())


_TYPES = {one.name: str(one.type) for one in fields(FrontRow) if one.name != "on_devices"}
_COLUMNS = tuple(_TYPES)


def _csv_path(path: Path) -> Path:
    return path if path.suffix == ".csv" else path / "pareto.csv"


def _row(cells: dict[str, str], where: str) -> FrontRow:
    values = {
        name: _cell(kind, name, cells[name], f"{where} {name}") for name, kind in _TYPES.items()
    }
    if values["stage"] not in STAGES:
        raise UserError(
            f"{where} stage: {values['stage'][:40]!r}; expected one of {', '.join(STAGES)}"
        )
    if values["precision"] not in PRECISIONS:
        raise UserError(
            f"{where} precision: {values['precision'][:40]!r}; expected one of "
            f"{', '.join(PRECISIONS)}"
        )
    onnx = PurePosixPath(values["onnx"])
    if onnx.is_absolute() or ".." in onnx.parts:
        raise UserError(f"{where} onnx: {values['onnx']!r}; expected a path in the run folder")
    if values["accuracy"] is None and (
        values["stage"] == "distilled" or values["search_accuracy"] is None
    ):
        raise UserError(f"{where} accuracy: empty; expected a fraction between 0 and 1")
    values["on_devices"] = {
        name.removeprefix(ON_DEVICE): _cell("float", name, text, f"{where} {name}")
        for name, text in cells.items()
        if name.startswith(ON_DEVICE) and text
    }
    return FrontRow(**values)


def _cell(kind: str, column: str, text: str, where: str) -> Any:
    if kind == "str":
        if not text and column in ("student", "stage", "genome_hash"):
            raise UserError(f"{where}: empty; expected text")
        return text
    if not text and "None" in kind:
        return None
    # Stricter than int() and float(), which also take "1_0", " 1" and "nan".
    if kind == "int":
        if not re.fullmatch(r"[0-9]{1,18}", text) or (column == "parameters" and int(text) == 0):
            raise UserError(f"{where}: {text[:40]!r}; expected a positive whole number")
        return int(text)
    plain = re.fullmatch(r"[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?", text)
    value = float(text) if plain else math.nan
    if column.endswith("accuracy"):
        if not 0 <= value <= 1:
            raise UserError(f"{where}: {text[:40]!r}; expected a fraction between 0 and 1")
    elif not (math.isfinite(value) and value > 0):
        raise UserError(f"{where}: {text[:40]!r}; expected a positive number")
    return value


SUFFIX = "-int8"
