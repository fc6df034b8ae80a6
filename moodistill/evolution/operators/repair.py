"""Repair to the canonical form, and the removal of genomes that were seen before."""

from __future__ import annotations

from typing import Any

import numpy as np
from pymoo.core.duplicate import DuplicateElimination
from pymoo.core.repair import Repair

from moodistill.genome.canonical import canonical
from moodistill.genome.layout import GenomeLayout


class CanonicalRepair(Repair):
    """Every genome in its canonical form, with widths of whole multiples of `step`."""

    def __init__(self, layout: GenomeLayout, step: int) -> None:
        super().__init__()
        self.layout = layout
        self.step = step

    def _do(self, problem: Any, X: np.ndarray, **kwargs: Any) -> np.ndarray:
        """`(n, n_var)` genomes to canonical copies."""
        return np.array([canonical(self.layout, genome, self.step) for genome in X.astype(bool)])


class SeenElimination(DuplicateElimination):
    """Drops children equal to one another or to any genome that was ever evaluated.

    pymoo compares within a generation and with the current population only; an evaluation is
    dear enough to remember them all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[bytes] = set()

    def _do(self, pop: Any, other: Any, is_duplicate: np.ndarray) -> np.ndarray:
        known = set(self.seen)
        if other is not None:
            known |= {np.packbits(x.astype(bool)).tobytes() for x in other.get("X")}
        for index, genome in enumerate(pop.get("X")):
            key = np.packbits(genome.astype(bool)).tobytes()
            is_duplicate[index] |= key in known
            known.add(key)
        return is_duplicate
