"""The Pareto front of a run: `pareto.csv`, and ways to choose one student from it.

Accuracies are fractions. Students are chosen by their validation accuracy; `test_accuracy` is only
reported, so that it stays an honest estimate.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from moodistill.errors import UserError
from moodistill.store import write_atomic, write_json_atomic

STAGES = ("teacher", "searched", "distilled")
WEIGHTS = ("accuracy", "params", "latency")
_FLAT = 1e-9


@dataclass(frozen=True)
class Student:
    """One row of `pareto.csv`; the teacher is the row whose stage is `teacher`.

    Attributes:
        student: short name, unique within its stage.
        stage: `teacher`, `searched` (weights inherited) or `distilled` (a finalist).
        search_accuracy: what the search saw, on its part of the validation images.
        accuracy: on all validation images; None where it was not measured (never if distilled).
        test_accuracy: None unless a finalist or the teacher.
        latency_ms, latency_ms_low, latency_ms_high: median and its 95% interval.
        teacher_latency_ms: of the teacher in the same measurement.
        onnx: path relative to the run folder, empty if not exported.
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

    @property
    def validation_accuracy(self) -> float:
        """`accuracy`, or `search_accuracy` where that was not measured."""
        known = self.search_accuracy if self.accuracy is None else self.accuracy
        if known is None:
            raise UserError(f"{self.student} has no accuracy; expected one: resume its run")
        return known


@dataclass(frozen=True)
class Constraints:
    """Limits a chosen student must keep; None is no limit."""

    max_latency_ms: float | None = None
    max_parameters: float | None = None
    min_accuracy: float | None = None
    max_size_bytes: float | None = None

    def __post_init__(self) -> None:
        """Refuse limits that are no numbers, negative, or an accuracy in percent."""
        for name, limit in self.active().items():
            if not (math.isfinite(limit) and limit >= 0):
                raise UserError(f"{name} is {limit:g}; expected a number >= 0")
        if self.min_accuracy is not None and self.min_accuracy > 1:
            raise UserError(
                f"min_accuracy is {self.min_accuracy:g}; expected a fraction: 0.85 means 85%"
            )

    def active(self) -> dict[str, float]:
        """The limits that are set."""
        return {name: limit for name, limit in asdict(self).items() if limit is not None}


@dataclass(frozen=True)
class GivesUp:
    """A student against its teacher; `str()` gives one phrase.

    Attributes:
        accuracy_points: teacher minus student, in percentage points (negative: the student is
            better).
        times_fewer_parameters, times_faster: teacher over student.
    """

    accuracy_points: float
    times_fewer_parameters: float
    times_faster: float

    def __str__(self) -> str:
        """One phrase, for a terminal."""
        change = "lost" if self.accuracy_points >= 0 else "gained"
        return (
            f"{abs(self.accuracy_points):.2f} accuracy points {change}, "
            f"{self.times_fewer_parameters:.2f}x fewer parameters, {self.times_faster:.2f}x faster"
        )


@dataclass(frozen=True)
class Choice:
    """A chosen student, one sentence on why, and what it gives up against the teacher."""

    student: Student
    reason: str
    gives_up: GivesUp

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Limit:
    field: str
    sign: int  # 1: at most, -1: at least
    rule: str
    best: str


_LIMITS = {
    "max_latency_ms": _Limit(
        "latency_ms", 1, "latency <= {:.6g} ms", "the fastest takes {:.4g} ms"
    ),
    "max_parameters": _Limit(
        "parameters", 1, "parameters <= {:,.0f}", "the smallest has {:,.0f} parameters"
    ),
    "min_accuracy": _Limit(
        "validation_accuracy", -1, "accuracy >= {:.6g}", "the most accurate has {:.4f}"
    ),
    "max_size_bytes": _Limit(
        "size_bytes", 1, "size <= {:,.0f} bytes", "the smallest file has {:,.0f} bytes"
    ),
}


# ------------------------------------------------------------------ geometry of a front


def non_dominated(objectives: np.ndarray) -> np.ndarray:
    """Which rows of `(n, m)` minimised objectives no other row dominates: `(n,)` bool.

    Of equal rows only the first is kept; a row with a NaN never is.
    """
    values = np.asarray(objectives, dtype=float)
    mask = np.zeros(len(values), dtype=bool)
    if values.size == 0:
        return mask
    usable = np.flatnonzero(~np.isnan(values).any(axis=1))
    # In lexicographic order only an earlier row can dominate a later one.
    _, first = np.unique(values[usable], axis=0, return_index=True)
    kept: list[int] = []
    for index in usable[first]:
        if not (values[kept] <= values[index]).all(axis=1).any():
            kept.append(int(index))
    mask[kept] = True
    return mask


def _unit(objectives: np.ndarray) -> np.ndarray:
    """`(n, 3)` [error, parameters, latency] scaled to 0..1, the last two on a log2 scale."""
    values = np.array(objectives, dtype=float)
    values[:, 1:] = np.log2(np.maximum(values[:, 1:], 1e-12))
    low = values.min(axis=0)
    span = values.max(axis=0) - low
    return np.where(span > _FLAT, (values - low) / np.where(span > _FLAT, span, 1.0), 0.0)


def _extremes(unit: np.ndarray) -> list[int]:
    """The best row of each objective; among equals the one that is best overall."""
    total = unit.sum(axis=1)
    return [int(np.lexsort((total, unit[:, j]))[0]) for j in range(unit.shape[1])]


def _knee_index(unit: np.ndarray) -> int:
    """The row that bulges furthest towards the ideal `(0, 0, 0)`; see `knee`."""
    corners = unit[list(dict.fromkeys(_extremes(unit)))]
    bulge = np.zeros(len(unit))
    normal = np.zeros(3)
    if len(corners) == 3:
        normal = np.cross(corners[1] - corners[0], corners[2] - corners[0])
    if np.linalg.norm(normal) > _FLAT:
        normal /= np.linalg.norm(normal)
        offset = float(normal @ corners[0])
        # Positive on the ideal's side of the plane; if the ideal lies in it, below the plane.
        side = offset if abs(offset) > _FLAT else float(normal.sum())
        bulge = (offset - unit @ normal) * (1.0 if side >= 0 else -1.0)
    elif len(corners) > 1:
        pairs = itertools.combinations(corners, 2)
        start, end = max(pairs, key=lambda pair: float(np.linalg.norm(pair[1] - pair[0])))
        along = (end - start) / np.linalg.norm(end - start)
        across = (unit - start) - np.outer((unit - start) @ along, along)
        bulge = np.linalg.norm(across, axis=1) * np.where(across.sum(axis=1) < 0, 1.0, -1.0)
    best = int(np.argmax(bulge))
    if bulge[best] > _FLAT:
        return best
    # Parameters and latency fall together, so the error counts as much as both.
    distance = np.linalg.norm(unit * (math.sqrt(2.0), 1.0, 1.0), axis=1).round(9)
    return int(np.lexsort((unit[:, 0], distance))[0])


def pick_finalists(
    objectives: np.ndarray, count: int, min_accuracy: float | None = None
) -> list[int]:
    """Rows of `(n, 3)` minimised [error, parameters, latency] that are worth distilling.

    The most accurate, the knee, the fastest and the smallest of the non-dominated rows, then always
    the row farthest from those picked (normalised, parameters and latency on a log scale), up to
    `count`. Rows below `min_accuracy` are left out if any other row is left. Deterministic; fewer
    than `count` if the front is smaller.
    """
    if count < 1:
        raise UserError(f"{count} finalists are too few; expected at least 1")
    values = np.asarray(objectives, dtype=float).reshape(-1, 3)
    front = np.flatnonzero(non_dominated(values) & np.isfinite(values).all(axis=1))
    if min_accuracy is not None:
        hopeful = front[1.0 - values[front, 0] >= min_accuracy]
        front = hopeful if len(hopeful) else front
    if len(front) == 0:
        return []
    unit = _unit(values[front])
    accurate, smallest, fastest = _extremes(unit)
    picked = list(dict.fromkeys([accurate, _knee_index(unit), fastest, smallest]))[:count]
    while len(picked) < min(count, len(front)):
        gaps = np.linalg.norm(unit[:, None] - unit[None, picked], axis=2).min(axis=1)
        gaps[picked] = -1.0
        picked.append(int(np.argmax(gaps)))
    return [int(front[index]) for index in picked]


# ------------------------------------------------------------------ choosing one student


def choose(rows: Sequence[Student], constraints: Constraints | None = None) -> Choice:
    """The most accurate finalist that keeps the constraints (ties: faster, then smaller).

    Searched students stand in if there is no finalist.

    Raises:
        UserError: if none keeps them; says how close the best comes.
    """
    constraints = constraints or Constraints()
    fitting = _fitting(rows, constraints)
    return _choice(rows, min(fitting, key=_preference), "the most accurate", fitting, constraints)


def knee(rows: Sequence[Student], constraints: Constraints | None = None) -> Choice:
    """The finalist where the front of those that keep the constraints bends most.

    That is the largest distance, towards the ideal, from the plane through the best student of each
    objective (1 - accuracy, log2 parameters, log2 latency, each scaled to 0..1). If one student is
    best in two objectives, the line through the two remaining extremes replaces the plane. If no
    student lies on the ideal's side (one or two students, or a front without a bend), it is the one
    nearest to the ideal, with the error counted as much as parameters and latency together.
    """
    constraints = constraints or Constraints()
    fitting = _fitting(rows, constraints)
    front = _front_of(fitting)
    student = front[_knee_index(_unit(_objectives(front)))]
    return _choice(rows, student, "the knee of the front", fitting, constraints)


def weighted(
    rows: Sequence[Student],
    weights: Mapping[str, float],
    constraints: Constraints | None = None,
) -> Choice:
    """The finalist with the smallest weighted sum of objectives, each scaled to 0..1.

    Args:
        rows: the front.
        weights: of `accuracy`, `params` and `latency`; those left out are 0.
        constraints: only finalists that keep them take part (and set the scale).
    """
    expected = f"expected {', '.join(WEIGHTS)} with numbers >= 0, one of them positive"
    for name, weight in weights.items():
        if name not in WEIGHTS:
            raise UserError(f"unknown weight {name!r}; {expected}")
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"the weight of {name} is {weight:g}; {expected}")
    largest = max(weights.values(), default=0.0)
    if largest <= 0:
        raise UserError(f"all weights are 0; {expected}")
    constraints = constraints or Constraints()
    fitting = _fitting(rows, constraints)
    front = _front_of(fitting)
    scale = np.array([weights.get(name, 0.0) / largest for name in WEIGHTS])
    sums = (_unit(_objectives(front)) @ scale).round(9)
    best = min(range(len(front)), key=lambda i: (sums[i], *_preference(front[i])))
    given = ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
    return _choice(rows, front[best], f"the best by weights ({given})", fitting, constraints)


def _preference(row: Student) -> tuple[float, float, int]:
    return -row.validation_accuracy, row.latency_ms, row.parameters


def _objectives(rows: Sequence[Student]) -> np.ndarray:
    return np.array(
        [[1 - row.validation_accuracy, row.parameters, row.latency_ms] for row in rows], float
    )


def _front_of(rows: Sequence[Student]) -> list[Student]:
    # Sorted so that the result does not depend on the order of the rows.
    rows = sorted(rows, key=lambda row: (*_preference(row), row.student))
    mask = non_dominated(_objectives(rows))
    return [row for row, keep in zip(rows, mask, strict=True) if keep]


def _candidates(rows: Sequence[Student]) -> list[Student]:
    finalists = [row for row in rows if row.stage == "distilled"]
    found = finalists or [row for row in rows if row.stage == "searched"]
    if not found:
        raise UserError(
            "the front holds no student, only the teacher; expected searched or distilled rows: "
            "let the search finish with --resume"
        )
    return found


def _rules(constraints: Constraints) -> str:
    return " and ".join(_LIMITS[k].rule.format(v) for k, v in constraints.active().items())


def _keeps(row: Student, name: str, value: float) -> bool:
    limit = _LIMITS[name]
    return bool(limit.sign * getattr(row, limit.field) <= limit.sign * value)


def _fitting(rows: Sequence[Student], constraints: Constraints) -> list[Student]:
    active = constraints.active()
    pool = _candidates(rows)
    fitting = [row for row in pool if all(_keeps(row, k, v) for k, v in active.items())]
    if fitting:
        return fitting
    noun = "finalist" if pool[0].stage == "distilled" else "searched student"
    hopeless = [k for k, v in active.items() if not any(_keeps(row, k, v) for row in pool)]
    if hopeless:
        lines = [
            f"no {noun} has {_LIMITS[k].rule.format(active[k])}; {_best(pool, k)}" for k in hopeless
        ]
    else:
        lines = [f"no {noun} has {_rules(constraints)} together"]
        for name in active:
            others = [
                row
                for row in pool
                if all(_keeps(row, k, v) for k, v in active.items() if k != name)
            ]
            if others:
                lines.append(f"with the other limits kept, {_best(others, name)}")
    relax = " or ".join(hopeless or active)
    raise UserError("; ".join([*lines, f"relax {relax}, or search with a larger budget"]))


def _best(pool: Sequence[Student], name: str) -> str:
    limit = _LIMITS[name]
    row = min(pool, key=lambda r: (limit.sign * getattr(r, limit.field), *_preference(r)))
    text = limit.best.format(getattr(row, limit.field))
    if name == "min_accuracy":
        return f"{text} at {row.latency_ms:.4g} ms and {row.parameters:,} parameters"
    return f"{text} at accuracy {row.validation_accuracy:.4f}"


def _choice(
    rows: Sequence[Student],
    student: Student,
    title: str,
    fitting: Sequence[Student],
    constraints: Constraints,
) -> Choice:
    teacher = next((row for row in rows if row.stage == "teacher"), None)
    if teacher is None:
        raise UserError("the front has no teacher row; expected one to compare students with")
    pool = _candidates(rows)
    noun = "finalists" if pool[0].stage == "distilled" else "searched students"
    rules = _rules(constraints)
    among = f"{len(fitting)} of {len(pool)} {noun}" + (f" with {rules}" if rules else "")
    return Choice(
        student,
        f"{student.student} is {title} among {among}.",
        GivesUp(
            accuracy_points=100 * (teacher.validation_accuracy - student.validation_accuracy),
            times_fewer_parameters=teacher.parameters / student.parameters,
            times_faster=student.teacher_latency_ms / student.latency_ms,
        ),
    )


# ------------------------------------------------------------------ pareto.csv


def write_front(path: Path, rows: Sequence[Student]) -> None:
    """Write `pareto.csv` (a path, or the folder it goes into) and its `.json` twin, atomically."""
    path = _csv_path(path)
    table = io.StringIO(newline="")
    csv.writer(table, lineterminator="\n").writerow(_COLUMNS)
    for row in rows:
        # float() first: the repr of a NumPy scalar is not a number.
        values = (getattr(row, name) for name in _COLUMNS)
        cells = [repr(float(v)) if isinstance(v, float) else v for v in values]
        # csv leaves a lone carriage return unquoted and then reads it as the end of a line.
        if any("\r" in str(cell) for cell in cells):
            csv.writer(table, lineterminator="\n", quoting=csv.QUOTE_ALL).writerow(cells)
        else:
            csv.writer(table, lineterminator="\n").writerow(cells)
    write_json_atomic(path.with_suffix(".json"), [asdict(row) for row in rows])
    write_atomic(path, table.getvalue().encode())


def read_front(folder: Path) -> list[Student]:
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
    rows: dict[tuple[str, str], Student] = {}
    for line, cells in lines[1:]:
        if len(cells) != len(header):
            raise UserError(f"{path} line {line}: {len(cells)} cells, expected {len(header)}")
        row = _student(dict(zip(header, cells, strict=True)), f"{path} line {line}, column")
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


_TYPES = {field.name: str(field.type) for field in fields(Student)}
_COLUMNS = tuple(_TYPES)


def _csv_path(path: Path) -> Path:
    return path if path.suffix == ".csv" else path / "pareto.csv"


def _student(cells: dict[str, str], where: str) -> Student:
    values = {
        name: _cell(kind, name, cells[name], f"{where} {name}") for name, kind in _TYPES.items()
    }
    if values["stage"] not in STAGES:
        raise UserError(
            f"{where} stage: {values['stage'][:40]!r}; expected one of {', '.join(STAGES)}"
        )
    onnx = PurePosixPath(values["onnx"])
    if onnx.is_absolute() or ".." in onnx.parts:
        raise UserError(f"{where} onnx: {values['onnx']!r}; expected a path in the run folder")
    if values["accuracy"] is None and (
        values["stage"] == "distilled" or values["search_accuracy"] is None
    ):
        raise UserError(f"{where} accuracy: empty; expected a fraction between 0 and 1")
    return Student(**values)


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
