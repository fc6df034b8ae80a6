"""What a search can minimise, and the hard limits that it can be given."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from moodistill.errors import UserError
from moodistill.pareto.evaluation import Evaluation

# The first is 1 - accuracy; all others are costs, compared on a logarithmic scale.
MEASURES: dict[str, Callable[[Evaluation], float]] = {
    "accuracy": lambda one: 1.0 - one.accuracy,
    "parameters": lambda one: float(one.parameters),
    "latency": lambda one: one.latency.latency_ms if one.latency else float("nan"),
    "macs": lambda one: float(one.macs),
    "size": lambda one: float(one.size_bytes),
    "memory": lambda one: float(one.memory_bytes),
}
# The fields of `Limits` that bound them.
LIMITED = {
    "parameters": "max_parameters", "latency": "max_latency_ms", "macs": "max_macs",
    "size": "max_size_bytes", "memory": "max_memory_bytes",
}  # fmt: skip
DEFAULT = ("accuracy", "parameters", "latency")


def check_objectives(names: Sequence[str]) -> tuple[str, ...]:
    """The names, `accuracy` first.

    Raises:
        UserError: if one is unknown or named twice, if there are fewer than two, or if `accuracy`
            is not among them: without it the smallest network wins.
    """
    for name in names:
        if name not in MEASURES:
            raise UserError(f"unknown objective {name!r}; expected some of {', '.join(MEASURES)}")
    if "accuracy" not in names or len(names) < 2 or len(set(names)) != len(names):
        raise UserError(
            f"objectives are {', '.join(names) or 'none'}; expected accuracy and at least one of "
            f"{', '.join(n for n in MEASURES if n != 'accuracy')}, each once"
        )
    return ("accuracy", *(name for name in names if name != "accuracy"))


def objective_values(
    one: Evaluation, names: Sequence[str], enough: float = 1.0
) -> tuple[float, ...] | None:
    """The values to be minimised, by name; None of a student that failed.

    An accuracy above `enough` counts as `enough`. A search gives the teacher's: what an untrained
    student has beyond it is luck with these images, and no reason to keep a larger one.
    """
    if one.failure is not None or one.latency is None:
        return None
    capped = replace(one, accuracy=min(one.accuracy, enough))
    return tuple(MEASURES[name](capped) for name in names)


@dataclass(frozen=True)
class Limits:
    """Hard limits of a search; a student beyond one is infeasible. None is no limit.

    Attributes:
        min_accuracy: a fraction, on the search's images, before distillation; a run that starts
            with None takes two fifths of the way from chance to the teacher.
    """

    min_accuracy: float | None = None
    max_parameters: float | None = None
    max_latency_ms: float | None = None
    max_macs: float | None = None
    max_size_bytes: float | None = None
    max_memory_bytes: float | None = None

    def __post_init__(self) -> None:
        """Refuse limits that no network keeps."""
        if self.min_accuracy is not None and not 0 <= self.min_accuracy < 1:
            raise UserError(
                f"min_accuracy is {self.min_accuracy:g}; expected a fraction: 0.85 means 85%"
            )
        for name, limit in asdict(self).items():
            if name != "min_accuracy" and limit is not None and not 0 < limit < 1e15:
                raise UserError(f"{name} is {limit:g}; expected a positive number below 1e15")

    @property
    def count(self) -> int:
        """How many `violations` there are: accuracy's, and one for each limit of a cost."""
        return 1 + len(self._costs())

    def violations(self, one: Evaluation) -> tuple[float, ...]:
        """How far a student is beyond each limit, relative to it; at most 0 where it keeps it.

        One that failed is beyond all of them.
        """
        if one.failure is not None or one.latency is None:
            return (1.0,) * self.count
        beyond = [MEASURES[name](one) / limit - 1.0 for name, limit in self._costs().items()]
        return ((self.min_accuracy or 0.0) - one.accuracy, *beyond)

    def most(self, names: Sequence[str]) -> tuple[float, ...]:
        """The largest value that is allowed of each objective; infinity where there is no limit."""
        limits = {"accuracy": 1.0 - (self.min_accuracy or 0.0), **self._costs()}
        return tuple(limits.get(name, math.inf) for name in names)

    def _costs(self) -> dict[str, float]:
        """The limits of costs that there are, by the objective's name."""
        found = {name: getattr(self, field) for name, field in LIMITED.items()}
        return {name: limit for name, limit in found.items() if limit is not None}

    def keeps(self, one: Evaluation) -> bool:
        """Whether a student worked and is within all limits."""
        return max(self.violations(one)) <= 0
