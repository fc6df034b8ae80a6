"""Layer-wise crossover: whole layers change hands, sometimes blocks within a layer."""

from __future__ import annotations

from typing import Any

import numpy as np
from pymoo.core.crossover import Crossover

from moodistill.genome.layout import GenomeLayout, Group


class LayerCrossover(Crossover):
    """Two parents, two children.

    The genes of one channel group (its mask, the connections and bypasses of the layers that
    write it) travel together; merge edges travel one Add at a time. Half of the matings exchange
    one run of layers (so that what fits together stays together), half every group by a coin. In
    `within` of the exchanged groups only some blocks of channels change hands.
    """

    def __init__(self, layout: GenomeLayout, within: float = 0.2) -> None:
        super().__init__(2, 2, prob=1.0)
        self.layout = layout
        self.within = within
        # Of a frozen group (the output) the connections of its layers are heritable.
        written = {n.groups[0] for n in layout.layers if f"block/{n.name}" in layout.slices}
        self.heritable = [g for g in layout.groups.values() if not g.frozen or g.name in written]
        # What travels with each of them.
        self.genes = [
            [layout.slices[name] for name in self._genes(group) if name in layout.slices]
            for group in self.heritable
        ]
        self.merge_genes = [layout.slices[f"merge/{merge.name}"] for merge in layout.merges]

    def _genes(self, group: Group) -> list[str]:
        writers = [n.name for n in self.layout.layers if n.groups[0] == group.name]
        edges = [f"{kind}/{name}" for name in writers for kind in ("block", "bypass")]
        return [f"mask/{group.name}", *edges]

    def _do(
        self,
        problem: Any,
        X: np.ndarray,
        *args: Any,
        random_state: np.random.Generator,
        **kwargs: Any,
    ) -> np.ndarray:
        """`(2, matings, n_var)` parents to as many children (copies)."""
        children = X.copy()
        for mating in range(X.shape[1]):
            swap = self._swap(random_state)
            children[0, mating, swap] = X[1, mating, swap]
            children[1, mating, swap] = X[0, mating, swap]
        return children

    def _swap(self, rng: np.random.Generator) -> np.ndarray:
        """`(n_var,)` bool: the bits that change hands."""
        layout = self.layout
        swap = np.zeros(layout.length, dtype=bool)
        count = len(self.heritable)
        if rng.random() < 0.5:
            low, high = sorted(rng.integers(0, count + 1, size=2))
            chosen = np.zeros(count, dtype=bool)
            chosen[low:high] = True
        else:
            chosen = rng.random(count) < 0.5
        for group, genes, taken in zip(self.heritable, self.genes, chosen, strict=True):
            if not taken:
                continue
            if group.blocks > 1 and not group.frozen and rng.random() < self.within:
                blocks = rng.random(group.blocks) < 0.5
                layout.view(swap, f"mask/{group.name}")[:] = blocks[group.block]
                continue
            for place in genes:
                swap[place] = True
        for place in self.merge_genes:
            swap[place] = rng.random() < 0.5
        return swap
