"""Connection mutation: block connections, merge edges and bypass edges."""

from __future__ import annotations

from typing import Any

import numpy as np
from pymoo.core.mutation import Mutation

from moodistill.genome.layout import GenomeLayout


class ConnectionMutation(Mutation):
    """Flips connection genes, tilted by what they cost.

    A block connection is the likelier to go, and the less likely to come back, the smaller its
    share of its layer's weight energy. Bypass and merge edges flip at their own rates: a bypass is
    where connection genes beat masks, so each child has a fair chance of one.
    """

    def __init__(
        self,
        layout: GenomeLayout,
        blocks: float = 0.35,
        bypass: float = 0.5,
        merge: float = 0.3,
    ) -> None:
        super().__init__(prob=1.0)
        self.layout = layout
        self.blocks = blocks
        self.bypass = bypass
        self.merge = merge
        self.sited = [n for n in layout.layers if f"block/{n.name}" in layout.slices]
        self.passable = [n for n in layout.layers if n.bypassable]

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
            if self.sited and random_state.random() < self.blocks:
                self._mutate_blocks(genome, random_state)
            if self.passable and random_state.random() < self.bypass:
                layer = self.passable[random_state.integers(len(self.passable))]
                view = self.layout.view(genome, f"bypass/{layer.name}")
                view[0] = not view[0]
            if self.layout.merges and random_state.random() < self.merge:
                merge = self.layout.merges[random_state.integers(len(self.layout.merges))]
                view = self.layout.view(genome, f"merge/{merge.name}")
                place = random_state.integers(len(view))
                view[place] = not view[place]
        return mutated

    def _mutate_blocks(self, genome: np.ndarray, rng: np.random.Generator) -> None:
        layer = self.sited[rng.integers(len(self.sited))]
        view = self.layout.view(genome, f"block/{layer.name}")
        if rng.random() < 0.2:
            view[:] = True
            return
        energy = np.ones(view.shape) if layer.energy is None else layer.energy
        # 1 for the connection of least energy in its layer, 0 for the one of most.
        cheapness = 1.0 - np.argsort(np.argsort(energy, axis=None)) / max(1, energy.size - 1)
        chance = np.where(view, cheapness.reshape(view.shape), 1.0 - cheapness.reshape(view.shape))
        flips = rng.random(view.shape) < chance * rng.uniform(0.1, 0.5)
        view ^= flips
