"""Structural distillation as a pymoo problem: error, parameters and latency, all minimised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from pymoo.core.problem import Problem

from moodistill.evaluation import Evaluation

OBJECTIVES = ("1 - accuracy", "parameters", "latency_ms")
# Finite, since NaN and infinity corrupt pymoo's ranking and crowding.
WORST = (1.0, 1e12, 1e9)


@dataclass(frozen=True)
class Score:
    """Objectives `F` `(n, 3)` and constraints `G` `(n, 1)` (violated if > 0)."""

    F: np.ndarray
    G: np.ndarray


class StructuralDistillationProblem(Problem):
    """Genomes as flat boolean vectors; holds no teacher, only a way to have genomes evaluated.

    Args:
        length: bits of a genome.
        evaluate: canonical genomes `(n, length)` to their evaluations.
        min_accuracy: students below it, and failed ones, violate the constraint, so that the
            search does not spend itself on tiny networks that guess.
    """

    def __init__(
        self,
        length: int,
        evaluate: Callable[[np.ndarray], list[Evaluation]],
        min_accuracy: float = 0.0,
    ) -> None:
        super().__init__(n_var=length, n_obj=3, n_ieq_constr=1, xl=False, xu=True, vtype=bool)
        self.evaluate_genomes = evaluate
        self.min_accuracy = min_accuracy

    def score(self, evaluations: list[Evaluation]) -> Score:
        """Objectives and constraint of evaluations."""
        rows, violations = [], []
        for one in evaluations:
            failed = one.objectives is None
            rows.append(one.objectives or WORST)
            violations.append(1.0 if failed else self.min_accuracy - one.accuracy)
        return Score(np.array(rows).reshape(-1, 3), np.array(violations).reshape(-1, 1))

    def _evaluate(self, x: np.ndarray, out: dict, *args: Any, **kwargs: Any) -> None:
        score = self.score(self.evaluate_genomes(x.astype(bool)))
        out["F"], out["G"] = score.F, score.G
