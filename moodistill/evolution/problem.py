"""Structural distillation as a pymoo problem: error and costs, all minimised, within limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pymoo.core.problem import Problem

from moodistill.pareto.evaluation import Evaluation
from moodistill.pareto.objectives import DEFAULT, Limits, objective_values

# Finite, since NaN and infinity corrupt pymoo's ranking and crowding.
WORST_ERROR, WORST_COST = 1.0, 1e12


@dataclass(frozen=True)
class Score:
    """Objectives `F` `(n, m)` and constraints `G` `(n, k)` (violated if > 0)."""

    F: np.ndarray
    G: np.ndarray


class StructuralDistillationProblem(Problem):
    """Genomes as flat boolean vectors; holds no teacher, only a way to have genomes evaluated.

    Args:
        length: bits of a genome.
        evaluate: canonical genomes `(n, length)` to their evaluations.
        limits: students beyond one, and failed ones, violate a constraint.
        objectives: names of `moodistill.pareto.objectives.MEASURES`, `accuracy` first.

    Attributes:
        enough: accuracy beyond which more counts for nothing; the search sets the teacher's.
    """

    def __init__(
        self,
        length: int,
        evaluate: Callable[[np.ndarray], list[Evaluation]],
        limits: Limits | None = None,
        objectives: Sequence[str] = DEFAULT,
    ) -> None:
        self.limits = limits or Limits()
        self.objectives = tuple(objectives)
        self.enough = 1.0
        self.evaluate_genomes = evaluate
        super().__init__(
            n_var=length, n_obj=len(self.objectives), n_ieq_constr=self.limits.count,
            xl=False, xu=True, vtype=bool,
        )  # fmt: skip

    def score(self, evaluations: list[Evaluation]) -> Score:
        """Objectives and constraints of evaluations."""
        worst = (WORST_ERROR, *[WORST_COST] * (self.n_obj - 1))
        rows = [objective_values(one, self.objectives, self.enough) or worst for one in evaluations]
        violations = [self.limits.violations(one) for one in evaluations]
        return Score(
            np.array(rows).reshape(-1, self.n_obj),
            np.array(violations).reshape(-1, self.n_ieq_constr),
        )

    def _evaluate(self, x: np.ndarray, out: dict, *args: Any, **kwargs: Any) -> None:
        score = self.score(self.evaluate_genomes(x.astype(bool)))
        out["F"], out["G"] = score.F, score.G
