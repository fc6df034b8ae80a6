"""Mask mutation: new widths in whole steps, channels by noisy importance."""

from __future__ import annotations

from typing import Any

import numpy as np
from pymoo.core.mutation import Mutation

from moodistill.evolution.operators.widths import noisy_top, snap
from moodistill.genome.layout import GenomeLayout


class MaskMutation(Mutation):
    """Draws new widths for a few channel groups, now and then for all of them.

    A group's width is multiplied by a log-normal factor and moves by at least one step; the least
    important channels go first, the most important come back first, by noisy (Gumbel) top-k. Bit
    flips would change one channel in thousands and never a whole SIMD step. A group that
    nobody needs (its readers read others beside) goes as a whole now and then.
    """

    def __init__(
        self, layout: GenomeLayout, step: int, groups: float = 2.0, scale: float = 0.4
    ) -> None:
        super().__init__(prob=1.0)
        self.layout = layout
        self.step = step
        self.groups = groups
        self.scale = scale
        self.heritable = [group for group in layout.groups.values() if not group.frozen]

    def _do(
        self,
        problem: Any,
        X: np.ndarray,
        *args: Any,
        random_state: np.random.Generator,
        **kwargs: Any,
    ) -> np.ndarray:
        """`(n, n_var)` genomes to mutated copies."""
        mutated = X.copy()
        for genome in mutated:
            self._mutate(genome, random_state)
        return mutated

    def _mutate(self, genome: np.ndarray, rng: np.random.Generator) -> None:
        everywhere = rng.random() < 0.15
        shared = rng.normal() * self.scale
        rate = 1.0 if everywhere else self.groups / max(1, len(self.heritable))
        for group in self.heritable:
            if rng.random() >= rate:
                continue
            kept = self.layout.view(genome, f"mask/{group.name}")
            if group.name in self.layout.droppable and rng.random() < 0.1:
                kept[:] = False
                continue
            step = group.step(self.step)
            width = int(kept.sum())
            change = shared if everywhere else rng.normal() * self.scale
            target = snap(width * float(np.exp(change)), group.size, step)
            if target == width and not everywhere:
                target = snap(width + step * np.sign(change), group.size, step)
            kept[:] = noisy_top(group, target, 0.3, rng, kept)
