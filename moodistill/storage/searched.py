"""The usable students of a store, and their front."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from moodistill.pareto import geometry as pareto
from moodistill.pareto.evaluation import Evaluation, Latency
from moodistill.pareto.objectives import DEFAULT, Limits, objective_values
from moodistill.storage.store import Store


def student_id(number: int) -> str:
    """The name of the student that was evaluated as number `number`."""
    return f"s{number:04d}"


@dataclass(frozen=True)
class Searched:
    """The usable students of a store.

    Attributes:
        teacher: the first evaluation.
        students: name to evaluation, in order, without failed and infeasible ones.
        objectives: what the search minimised, `accuracy` first.
        limits: hard ones, which a latency that is measured again is held to as well.
    """

    teacher: Evaluation
    students: dict[str, Evaluation]
    objectives: tuple[str, ...] = DEFAULT
    limits: Limits = Limits()

    @staticmethod
    def read(store: Store, limits: Limits, objectives: tuple[str, ...]) -> Searched | None:
        """What the store holds, or None if not even the teacher was scored."""
        evaluations = store.numbered()
        teacher = evaluations.get(0)
        if teacher is None or teacher.latency is None:
            return None
        students = {student_id(n): e for n, e in evaluations.items() if n > 0 and limits.keeps(e)}
        return Searched(teacher, students, objectives, limits)

    def values(self) -> np.ndarray:
        """`(n, m)` objectives of the students, in order, all minimised."""
        enough = self.teacher.accuracy
        rows = [objective_values(one, self.objectives, enough) for one in self.students.values()]
        return np.array(rows, dtype=float).reshape(-1, len(self.objectives))

    def front(self) -> dict[str, Evaluation]:
        """The non-dominated students."""
        return self._where(pareto.non_dominated(self.values()))

    def near_front(self, slack: float) -> dict[str, Evaluation]:
        """The front, and students that a latency smaller by `slack` (a fraction) would bring in."""
        if "latency" not in self.objectives:
            return self.front()
        column = self.objectives.index("latency")
        return self._where(pareto.near_front(self.values(), slack, column))

    def _where(self, mask: np.ndarray) -> dict[str, Evaluation]:
        pairs = zip(self.students.items(), mask, strict=True)
        return {name: one for (name, one), keep in pairs if keep}

    def confirmed(self, latencies: Mapping[str, Latency]) -> Searched:
        """Only the students that were measured again, with their new latency, within the limits."""
        students = {
            name: replace(one, latency=latencies[name])
            for name, one in self.students.items()
            if name in latencies
        }
        kept = {name: one for name, one in students.items() if self.limits.keeps(one)}
        return replace(self, students=kept)

    def beyond(self, latencies: Mapping[str, Latency]) -> list[str]:
        """Students that a latency measured again has put beyond the limits."""
        kept = self.confirmed(latencies).students
        return [name for name in self.students if name in latencies and name not in kept]
