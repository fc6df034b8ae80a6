"""Mask mutation, then connection mutation, as the one operator that NSGA-II takes."""

from __future__ import annotations

from typing import Any

import numpy as np
from pymoo.core.mutation import Mutation


class ComposedMutation(Mutation):
    """Applies every mutation with its probability; a child always gets at least one."""

    def __init__(self, mutations: list[tuple[Mutation, float]]) -> None:
        super().__init__(prob=1.0)
        self.mutations = mutations

    def _do(
        self,
        problem: Any,
        X: np.ndarray,
        *args: Any,
        random_state: np.random.Generator,
        **kwargs: Any,
    ) -> np.ndarray:
        """`(n, n_var)` genomes to mutated copies."""
        result = X.copy()
        applied = random_state.random((len(X), len(self.mutations))) < [
            probability for _, probability in self.mutations
        ]
        applied[~applied.any(axis=1), 0] = True
        for column, (mutation, _) in enumerate(self.mutations):
            chosen = applied[:, column]
            if chosen.any():
                result[chosen] = mutation._do(
                    problem, result[chosen], random_state=random_state, **kwargs
                )
        return result
