"""Ways to choose one student from a run's front.

Students are chosen by their validation accuracy, a fraction; the test accuracy is never looked at,
so that it stays an honest estimate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moodistill.errors import UserError
from moodistill.pareto.geometry import knee_index, non_dominated, normalise
from moodistill.pareto.table import FrontRow

WEIGHTS = ("accuracy", "params", "latency")


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
            better); of the metric that accuracies are.
        times_fewer_parameters, times_faster: teacher over student.
    """

    accuracy_points: float
    times_fewer_parameters: float
    times_faster: float
    metric: str = "accuracy"

    def __str__(self) -> str:
        """One phrase, for a terminal."""
        change = "lost" if self.accuracy_points >= 0 else "gained"
        return (
            f"{abs(self.accuracy_points):.2f} {self.metric} points {change}, "
            f"{self.times_fewer_parameters:.2f}x fewer parameters, {self.times_faster:.2f}x faster"
        )


@dataclass(frozen=True)
class Choice:
    """A chosen student, one sentence on why, and what it gives up against the teacher."""

    student: FrontRow
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


def choose(rows: Sequence[FrontRow], constraints: Constraints | None = None) -> Choice:
    """The most accurate finalist that keeps the constraints (ties: faster, then smaller).

    Searched students stand in if there is no finalist.

    Raises:
        UserError: if none keeps them; says how close the best comes.
    """
    constraints = constraints or Constraints()
    fitting = _fitting(rows, constraints)
    best = min(fitting, key=_preference)
    title = "the most accurate" if best.metric == "accuracy" else f"the best by {best.metric}"
    return _choice(rows, best, title, fitting, constraints)


def knee(rows: Sequence[FrontRow], constraints: Constraints | None = None) -> Choice:
    """The finalist where the front of those that keep the constraints bends most.

    That is the largest distance, towards the ideal, from the plane through the best student of each
    objective (1 - accuracy, log2 parameters, log2 latency, each scaled to 0..1). If one student is
    best in two objectives, the line through the two remaining extremes replaces the plane. If no
    student lies on the ideal's side (one or two students, or a front without a bend), it is the one
    nearest to the ideal, with the error counted as much as parameters and latency together.

    Raises:
        UserError: if none keeps the constraints; says how close the best comes.
    """
    constraints = constraints or Constraints()
    fitting = _fitting(rows, constraints)
    front = _front_of(fitting)
    student = front[knee_index(normalise(_objectives(front)))]
    return _choice(rows, student, "the knee of the front", fitting, constraints)


def weighted(
    rows: Sequence[FrontRow],
    weights: Mapping[str, float],
    constraints: Constraints | None = None,
) -> Choice:
    """The finalist with the smallest weighted sum of objectives, each scaled to 0..1.

    Args:
        rows: the front.
        weights: of `accuracy`, `params` and `latency`; those left out are 0.
        constraints: only finalists that keep them take part (and set the scale).

    Raises:
        UserError: if a weight is none of these or no number >= 0, all are 0, or no finalist keeps
            the constraints.
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
    sums = (normalise(_objectives(front)) @ scale).round(9)
    best = min(range(len(front)), key=lambda i: (sums[i], *_preference(front[i])))
    given = ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
    return _choice(rows, front[best], f"the best by weights ({given})", fitting, constraints)


def _preference(row: FrontRow) -> tuple[float, float, int]:
    return -row.validation_accuracy, row.latency_ms, row.parameters


def _objectives(rows: Sequence[FrontRow]) -> np.ndarray:
    return np.array(
        [[1 - row.validation_accuracy, row.parameters, row.latency_ms] for row in rows], float
    )


def _front_of(rows: Sequence[FrontRow]) -> list[FrontRow]:
    # Sorted so that the result does not depend on the order of the rows.
    rows = sorted(rows, key=lambda row: (*_preference(row), row.student))
    mask = non_dominated(_objectives(rows))
    return [row for row, keep in zip(rows, mask, strict=True) if keep]


def _candidates(rows: Sequence[FrontRow]) -> list[FrontRow]:
    finalists = [row for row in rows if row.stage == "distilled"]
    found = finalists or [row for row in rows if row.stage == "searched"]
    if not found:
        raise UserError(
            "the front holds no student, only the teacher; expected searched or distilled rows: "
            "resume the run and let its search finish"
        )
    return found


def _rules(constraints: Constraints, metric: str) -> str:
    return " and ".join(_rule(k, v, metric) for k, v in constraints.active().items())


def _rule(name: str, value: float, metric: str) -> str:
    """A limit in words; that of accuracy by the metric's name."""
    rule = _LIMITS[name].rule.format(value)
    return rule.replace("accuracy", metric) if name == "min_accuracy" else rule


def _keeps(row: FrontRow, name: str, value: float) -> bool:
    limit = _LIMITS[name]
    return bool(limit.sign * getattr(row, limit.field) <= limit.sign * value)


def _fitting(rows: Sequence[FrontRow], constraints: Constraints) -> list[FrontRow]:
    active = constraints.active()
    pool = _candidates(rows)
    fitting = [row for row in pool if all(_keeps(row, k, v) for k, v in active.items())]
    if fitting:
        return fitting
    metric = pool[0].metric
    noun = "finalist" if pool[0].stage == "distilled" else "searched student"
    hopeless = [k for k, v in active.items() if not any(_keeps(row, k, v) for row in pool)]
    if hopeless:
        lines = [f"no {noun} has {_rule(k, active[k], metric)}; {_best(pool, k)}" for k in hopeless]
    else:
        lines = [f"no {noun} has {_rules(constraints, metric)} together"]
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


def _best(pool: Sequence[FrontRow], name: str) -> str:
    limit = _LIMITS[name]
    row = min(pool, key=lambda r: (limit.sign * getattr(r, limit.field), *_preference(r)))
    text = limit.best.format(getattr(row, limit.field))
    if row.metric != "accuracy":
        text = text.replace("the most accurate has", f"the highest {row.metric} is")
    if name == "min_accuracy":
        return f"{text} at {row.latency_ms:.4g} ms and {row.parameters:,} parameters"
    return f"{text} at {row.metric} {row.validation_accuracy:.4f}"


def _choice(
    rows: Sequence[FrontRow],
    student: FrontRow,
    title: str,
    fitting: Sequence[FrontRow],
    constraints: Constraints,
) -> Choice:
    teacher = next((row for row in rows if row.stage == "teacher"), None)
    if teacher is None:
        raise UserError("the front has no teacher row; expected one to compare students with")
    pool = _candidates(rows)
    noun = "finalists" if pool[0].stage == "distilled" else "searched students"
    rules = _rules(constraints, student.metric)
    among = f"{len(fitting)} of {len(pool)} {noun}" + (f" with {rules}" if rules else "")
    return Choice(
        student,
        f"{student.student} is {title} among {among}.",
        GivesUp(
            accuracy_points=100 * (teacher.validation_accuracy - student.validation_accuracy),
            times_fewer_parameters=teacher.parameters / student.parameters,
            times_faster=student.teacher_latency_ms / student.latency_ms,
            metric=student.metric,
        ),
    )
