"""Where students are scored: one after another here, or on other processes and machines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from moodistill.pareto.evaluation import Evaluation


class Executor(Protocol):
    """Scores genomes somewhere; the order in which they finish is free."""

    def map(self, genomes: Sequence[np.ndarray]) -> Iterator[tuple[int, Evaluation]]:
        """Score `(length,)` genomes; yields an index into them and its evaluation, as each ends."""


class SerialExecutor:
    """Scores one genome after another in this process."""

    def __init__(self, evaluate: Callable[[np.ndarray], Evaluation]) -> None:
        self.evaluate = evaluate

    def map(self, genomes: Sequence[np.ndarray]) -> Iterator[tuple[int, Evaluation]]:
        """Each genome in turn."""
        for index, genome in enumerate(genomes):
            yield index, self.evaluate(genome)
